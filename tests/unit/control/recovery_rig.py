"""Images and deadlines of the recovery tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ploopd.control.recovery import Deadlines
from ploopd.storage.create import create_image
from tests.support.images import guid, write_delta, write_descriptor

MIB = 1 << 20
SIZE = 4 * MIB
CLUSTER = 64 << 10
SHORT = Deadlines(check=1.0, drain=0.2, close=0.5, open=2.0, replay=0.5, probe=0.5, record=0.5)


def image(directory: Path, name: str = "disk.hds", **changes: int) -> Path:
    options: dict[str, Any] = {"size": SIZE, "cluster_size": CLUSTER, "version": 2} | changes
    path = directory / name
    create_image(path, **options)
    return path


def chain(directory: Path) -> Path:
    """A base with data in every cluster and an empty top: every first write copies."""
    clusters = {index: bytes([index % 251 + 1]) * CLUSTER for index in range(SIZE // CLUSTER)}
    write_delta(directory / "base.hds", SIZE, clusters, cluster_size=CLUSTER)
    write_delta(directory / "top.hds", SIZE, {}, cluster_size=CLUSTER)
    rows = [(guid(1), "Compressed", "base.hds"), (guid(2), "Compressed", "top.hds")]
    return write_descriptor(directory, SIZE, rows, cluster_size=CLUSTER, top_guid=guid(2))
