"""Images of sixteen clusters, and their BATs."""

from __future__ import annotations

import struct
from pathlib import Path

from tests.support import images

CLUSTER = 64 << 10
CLUSTERS = 16
SIZE = CLUSTER * CLUSTERS


def empty(directory: Path, name: str = "disk.hds", **options: int) -> Path:
    return images.write_delta(directory / name, SIZE, {}, cluster_size=CLUSTER, **options)


def chain(directory: Path, count: int = 2, **options: int) -> Path:
    """A chain whose base has every cluster, filled with its number, and whose others are empty."""
    clusters = {index: bytes([index + 1]) * CLUSTER for index in range(CLUSTERS)}
    names = [f"{number}.hds" for number in range(count)]
    images.write_delta(directory / names[0], SIZE, clusters, cluster_size=CLUSTER, **options)
    for name in names[1:]:
        empty(directory, name, **options)
    entries = [(images.guid(n), "Compressed", name) for n, name in enumerate(names)]
    return images.write_descriptor(
        directory, SIZE, entries, cluster_size=CLUSTER, top_guid=entries[-1][0]
    )


def table(path: Path) -> list[int]:
    return list(struct.unpack_from(f"<{CLUSTERS}I", path.read_bytes(), 64))
