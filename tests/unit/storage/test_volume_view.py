"""Views of a volume: what is in one piece of one file, and nothing that is being changed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ploopd.storage.create import create_image
from ploopd.storage.device import views_of, write_views_of
from ploopd.storage.journal import Journal
from ploopd.storage.journaled import JournaledDevice
from tests.support import images
from tests.support.memory_device import MemoryDevice, pattern
from tests.support.volumes import Disk, open_disk, running_engine

CLUSTER = 64 << 10
SIZE = 16 * CLUSTER


@asynccontextmanager
async def disk(shm: Path) -> AsyncIterator[Disk]:
    """Clusters 0 to 3 lie together, 4 and 5 the other way round, the rest are holes."""
    path = shm / "image.hds"
    create_image(path, size=SIZE, cluster_size=CLUSTER)
    async with running_engine() as engine, open_disk(path, engine) as opened:
        for number in (0, 1, 2, 3, 5, 4):
            await opened.write(number * CLUSTER, pattern(CLUSTER, number))
        yield opened


def seen(disk: Disk, offset: int, length: int) -> bytes | None:
    view = disk.volume.try_view(offset, length)
    return None if view is None else bytes(view)


@pytest.mark.trio
async def test_one_cluster_or_several_that_lie_together(shm: Path) -> None:
    async with disk(shm) as opened:
        content = b"".join(pattern(CLUSTER, number) for number in range(6))
        for offset, length in (
            (0, CLUSTER),
            (512, CLUSTER - 512),
            (CLUSTER - 512, 1024),
            (0, 4 * CLUSTER),
            (4 * CLUSTER, CLUSTER),
            (5 * CLUSTER + 512, 512),
        ):
            assert seen(opened, offset, length) == content[offset : offset + length]


@pytest.mark.trio
async def test_none_of_what_is_in_pieces_or_nowhere(shm: Path) -> None:
    async with disk(shm) as opened:
        assert seen(opened, 4 * CLUSTER, 2 * CLUSTER) is None
        assert seen(opened, 4 * CLUSTER - 512, 1024) is None
        assert seen(opened, 8 * CLUSTER, 512) is None
        assert seen(opened, 8 * CLUSTER, 2 * CLUSTER) is None


@pytest.mark.trio
async def test_none_of_a_cluster_that_is_being_changed(shm: Path) -> None:
    async with disk(shm) as opened:
        locks = opened.volume._core.locks
        await locks.acquire(1)
        assert seen(opened, CLUSTER, 512) is None
        assert seen(opened, 0, 3 * CLUSTER) is None
        assert seen(opened, 0, CLUSTER) == pattern(CLUSTER, 0)
        locks.unlock(1)
        assert seen(opened, CLUSTER, 512) == pattern(512, 1)
        await opened.discard(CLUSTER, CLUSTER)
        assert seen(opened, CLUSTER, 512) is None


@pytest.mark.trio
async def test_where_it_can_be_written(shm: Path) -> None:
    async with disk(shm) as opened:
        volume = opened.volume
        for offset, length in ((512, CLUSTER - 512), (CLUSTER - 512, 2 * CLUSTER)):
            view = volume.try_write_view(offset, length)
            assert view is not None
            data = pattern(length, offset)
            view[:] = data
            del view
            assert await opened.read(offset, length) == data
        assert volume.try_write_view(4 * CLUSTER - 512, 1024) is None, "two pieces"
        assert volume.try_write_view(8 * CLUSTER, 512) is None, "a hole"
        assert volume.try_write_view(8 * CLUSTER, 2 * CLUSTER) is None
        await volume._core.locks.acquire(1)
        assert volume.try_write_view(CLUSTER, 512) is None
        assert volume.try_write_view(0, 3 * CLUSTER) is None
        volume._core.locks.unlock(1)
        try_write_view = volume.try_write_view
        assert try_write_view(CLUSTER, 512) is not None
    assert try_write_view(CLUSTER, 512) is None, "it is closed"


@pytest.mark.trio
async def test_only_the_top_is_written_to(shm: Path) -> None:
    image = images.v2_1m(shm)
    lower = image.serve.rename(shm / "lower.hds")
    size = image.raw.stat().st_size
    create_image(shm / "top.hds", size=size, cluster_size=images.MIB)
    rows = [(images.guid(1), "Compressed", lower.name)]
    rows.append((images.TOP_GUID, "Compressed", "top.hds"))
    chain = images.write_descriptor(shm, size, rows)
    content = image.raw.read_bytes()
    place = next(at for at in range(0, size, images.MIB) if any(content[at : at + 512]))
    for read_only in (False, True):
        async with (
            running_engine() as engine,
            open_disk(chain, engine, read_only=read_only) as opened,
        ):
            assert opened.volume.try_view(place, 512) is not None
            assert opened.volume.try_write_view(place, 512) is None
            if not read_only:
                await opened.write(place, pattern(512, 2))
                assert opened.volume.try_write_view(place, 512) is not None


@pytest.mark.trio
async def test_a_closed_volume_has_none(shm: Path) -> None:
    async with disk(shm) as opened:
        try_view = opened.volume.try_view
        assert try_view(0, 512) is not None
    assert try_view(0, 512) is None


@pytest.mark.trio
async def test_a_raw_file_whose_last_cluster_is_cut_short(shm: Path) -> None:
    path = shm / "raw"
    path.write_bytes(pattern(3 * CLUSTER + 512, 1))
    async with running_engine() as engine, open_disk(path, engine, read_only=True) as opened:
        content = pattern(3 * CLUSTER + 512, 1)
        assert seen(opened, 0, 3 * CLUSTER) == content[: 3 * CLUSTER]
        assert seen(opened, 3 * CLUSTER, 512) == content[3 * CLUSTER :]


@pytest.mark.trio
async def test_with_the_journal(shm: Path) -> None:
    async with disk(shm) as opened:
        device = JournaledDevice(opened.volume, Journal(limit=1 << 20), lambda error: None)
        data = pattern(512, 77)
        assert device.try_write(512, memoryview(data))
        assert device.try_view(512, 512) is None, "the storage may lose it"
        assert device.try_view(0, 1024) is None
        assert write_views_of(device)(0, 512) is None, "the journal would not know"
        view = device.try_view(1024, 512)
        assert view is not None
        assert bytes(view) == bytes(opened.volume.try_view(1024, 512) or b"")
        del view


def test_a_device_without_views() -> None:
    assert views_of(MemoryDevice(1 << 20))(0, 512) is None
    assert write_views_of(MemoryDevice(1 << 20))(0, 512) is None
