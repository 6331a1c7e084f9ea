"""Images and changes for tests of the journal, on a storage whose system calls fail when told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ploopd.devices import Device, DeviceOptions
from ploopd.fileio.faults import FaultyOs
from ploopd.storage.create import create_image
from ploopd.storage.journaling import JournalMode
from tests.support.images import guid, write_delta, write_descriptor
from tests.support.served import call, flush, read, write
from tests.support.volumes import shm

__all__ = ["shm"]

MIB = 1 << 20
SIZE = 4 * MIB
CLUSTER = 64 << 10
KEPT = DeviceOptions(journal=JournalMode.ON)
NOT_KEPT = DeviceOptions(journal=JournalMode.OFF)


@pytest.fixture
def faulty() -> Iterator[FaultyOs]:
    """System calls that fail when told."""
    layer = FaultyOs(record=True)
    yield layer
    layer.clear()
    layer.release()


@pytest.fixture(params=["disk", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path, shm: Path) -> Path:
    """Where slow operations are the rule, or the inline ones."""
    return tmp_path if request.param == "disk" else shm


def image(directory: Path) -> Path:
    path = directory / "disk.hds"
    create_image(path, size=SIZE, cluster_size=CLUSTER, version=2)
    return path


def chain(directory: Path) -> Path:
    clusters = {index: bytes([index % 251 + 1]) * CLUSTER for index in range(SIZE // CLUSTER)}
    write_delta(directory / "base.hds", SIZE, clusters, cluster_size=CLUSTER)
    write_delta(directory / "disk.hds", SIZE, {}, cluster_size=CLUSTER)
    rows = [(guid(1), "Compressed", "base.hds"), (guid(2), "Compressed", "disk.hds")]
    return write_descriptor(directory, SIZE, rows, cluster_size=CLUSTER, top_guid=guid(2))


async def change_everything(device: Device) -> bytearray:
    """Flushed content, then changes of every kind that are acknowledged and not flushed; returns
    the disk as it must read."""
    content = bytearray(await whole(device))

    def expect(offset: int, data: bytes) -> None:
        content[offset : offset + len(data)] = data

    for offset in (0, 4 * CLUSTER, 8 * CLUSTER):
        data = b"old." * (3 * CLUSTER // 4)
        await write(device, offset, data)
        expect(offset, data)
    await flush(device)
    await write(device, 2 * CLUSTER, b"0" * 8192)
    await call(device, "write", 2 * CLUSTER, memoryview(b"7" * 512), fua=True)
    expect(2 * CLUSTER, b"7" * 512 + b"0" * (8192 - 512))
    for offset, byte, inline in [
        (4096, b"1", True),
        (CLUSTER - 4096, b"2", False),
        (CLUSTER, b"3", True),
        (CLUSTER - 512, b"4", True),
        (20 * CLUSTER, b"5", True),
        (21 * CLUSTER + 512, b"6", False),
    ]:
        await write(device, offset, byte * 8192, inline=inline)
        expect(offset, byte * 8192)
    await call(device, "write_zeroes", 5 * CLUSTER, 4096)
    expect(5 * CLUSTER, bytes(4096))
    await call(device, "discard", 8 * CLUSTER, 2 * CLUSTER)
    expect(8 * CLUSTER, bytes(2 * CLUSTER))
    return content


async def whole(device: Device) -> bytes:
    return b"".join([await read(device, at, CLUSTER) for at in range(0, SIZE, CLUSTER)])
