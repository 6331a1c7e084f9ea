"""Small deltas with known content, and ways to break them; written by struct, not by our code."""

from __future__ import annotations

import struct
from pathlib import Path

from tests.support.images import write_delta

CLUSTER = 32 << 10
SECTORS = CLUSTER // 512
ENTRIES = 40
SIZE = ENTRIES * CLUSTER
IN_USE = 0x746F6E59

ORDER = (7, 0, 3, 20, 39)
"""Virtual clusters in the order of their places: host clusters 1 to 5."""


def content(cluster: int) -> bytes:
    """What the guest wrote into a virtual cluster."""
    return struct.pack("<I", 0xC0DE0000 | cluster) * (CLUSTER // 4)


def make(path: Path, version: int = 2) -> Path:
    """A sound delta: 40 clusters of 32 KiB, five of them allocated."""
    clusters = {cluster: content(cluster) for cluster in ORDER}
    return write_delta(path, SIZE, clusters, cluster_size=CLUSTER, version=version, order=ORDER)


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def set_entry(path: Path, cluster: int, value: int) -> None:
    """`value` is raw: clusters in version 2, sectors in version 1."""
    patch(path, 64 + 4 * cluster, struct.pack("<I", value))


def set_word(path: Path, offset: int, value: int) -> None:
    patch(path, offset, struct.pack("<I", value))


def append(path: Path, length: int, byte: bytes = b"\xee") -> None:
    with path.open("ab") as file:
        file.write(byte * length)


def truncate(path: Path, length: int) -> None:
    with path.open("r+b") as file:
        file.truncate(length)


def read_tolerantly(data: bytes) -> dict[int, bytes]:
    """Content by virtual cluster; entries that name no whole or partial data cluster have none."""
    scale = SECTORS if data[:16] == b"WithoutFreeSpace" else 1
    first = struct.unpack_from("<I", data, 48)[0] // SECTORS
    found = {}
    for cluster, entry in enumerate(struct.unpack_from(f"<{ENTRIES}I", data, 64)):
        host, rest = divmod(entry, scale)
        if rest == 0 and host >= first and host * CLUSTER < len(data):
            found[cluster] = data[host * CLUSTER : (host + 1) * CLUSTER].ljust(CLUSTER, b"\0")
    return found
