"""A volume that is replaced, abandoned or closed, while its storage fails, hangs or forgets."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from ploopd.errors import StorageError
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.fileio.oslayer import RealOs
from ploopd.storage.check import check_image
from tests.support import images, oracles
from tests.support.volumes import open_disk, running_engine
from tests.unit.storage.small_images import CLUSTER, CLUSTERS, SIZE, chain, empty, table


def test_replacing_the_top_reads_everything_anew(shm: Path) -> None:
    path = chain(shm)
    new = images.write_delta(shm / "new.hds", SIZE, {1: b"\x77" * CLUSTER}, cluster_size=CLUSTER)

    async def run() -> None:
        layer = FaultyOs()
        async with (
            running_engine() as engine,
            open_disk(path, engine, layer=layer, close=False) as old,
        ):
            await old.write(0, b"\x66" * 512)
            identity = old.volume.identity
            layer.power_cut()
            with pytest.raises(StorageError):
                await old.read(0, 512)
            old.volume.abandon()
            async with open_disk(
                path, engine, substitutes={images.guid(1): str(new)}, inherit=old.volume
            ) as disk:
                assert disk.volume.identity == identity
                await disk.volume.probe_write()
                assert await disk.read(0, 512) == b"\x01" * 512
                assert await disk.read(CLUSTER, 512) == b"\x77" * 512
                await disk.write(0, b"\x55" * 512)

    trio.run(run)
    assert check_image(str(new), repair=None).corruptions == 0


def test_the_same_path_again_after_the_storage_came_back(shm: Path) -> None:
    path = empty(shm)

    async def run() -> None:
        layer = FaultyOs()
        async with (
            running_engine() as engine,
            open_disk(path, engine, layer=layer, close=False) as old,
        ):
            await old.write(0, b"\x66" * 512)
            await old.flush()
            layer.power_cut()
            with pytest.raises(StorageError):
                await old.write(512, b"\x01" * 512)
            old.volume.abandon()
            async with open_disk(path, engine, inherit=old.volume) as disk:
                assert await disk.read(0, 1024) == b"\x66" * 512 + bytes(512)
                await disk.write(CLUSTER, b"\x01" * 512)

    trio.run(run)
    assert check_image(str(path), repair=None).corruptions == 0


class Cached(RealOs):
    """A page cache that still has what the storage has lost: reads show `pages` until dropped."""

    def __init__(self, pages: bytes) -> None:
        self.pages: bytes | None = pages

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0, /) -> int:
        if self.pages is None:
            return os.preadv(fd, buffers, offset, flags)
        done = 0
        for buffer in buffers:
            piece = self.pages[offset + done : offset + done + len(buffer)]
            buffer[: len(piece)] = piece
            done += len(piece)
        return done

    def drop_cache(self, fd: int, /) -> None:
        self.pages = None


def test_the_map_of_a_replaced_volume_is_what_the_storage_has_not_what_the_page_cache_has(
    shm: Path,
) -> None:
    """GlusterFS acknowledged BAT entries and lost them; the page cache of FUSE still had them."""
    path = images.write_delta(shm / "disk.hds", SIZE, {0: b"\x11" * 512}, cluster_size=CLUSTER)
    pages = bytearray(path.read_bytes())
    struct.pack_into("<I", pages, 64 + 4 * 5, 2)
    pages += bytes(CLUSTER)
    with path.open("ab") as file:
        file.write(bytes(CLUSTER))

    async def run() -> None:
        async with (
            running_engine() as engine,
            open_disk(path, engine, close=False) as old,
        ):
            old.volume.abandon()
            layer = Cached(bytes(pages))
            async with open_disk(path, engine, layer=layer, inherit=old.volume) as disk:
                assert await disk.read(5 * CLUSTER, 512) == bytes(512)
                await disk.write(5 * CLUSTER, b"\x22" * 512)
        assert table(path)[5] != 0, "the entry was believed to be there"

    trio.run(run)
    raw = oracles.read_through_qemu([("parallels", path)], shm / "seen.raw").read_bytes()
    assert raw[5 * CLUSTER :][:512] == b"\x22" * 512


def test_probe_tells_whether_the_storage_takes_writes(shm: Path) -> None:
    path = empty(shm)

    async def run() -> None:
        layer = FaultyOs()
        async with (
            running_engine() as engine,
            open_disk(path, engine, layer=layer, close=False) as disk,
        ):
            before = path.read_bytes()
            await disk.volume.probe_write()
            assert path.read_bytes() == before
            layer.power_cut(107)
            with pytest.raises(StorageError) as caught:
                await disk.volume.probe_write()
            assert caught.value.errno == 107

    trio.run(run)


def test_abandoning_a_hung_storage_takes_no_time(shm: Path) -> None:
    path = chain(shm)

    async def run() -> None:
        layer = FaultyOs()
        called: list[StorageError | None] = []
        async with running_engine() as engine:
            async with open_disk(path, engine, layer=layer, inline=False, close=False) as disk:
                layer.add(Fault(op="write", hang=True, count=None))
                for cluster in range(4):
                    data = memoryview(b"\x01" * 512)
                    disk.volume.write(cluster * CLUSTER, data, called.append)
                disk.volume.kick()
                await trio.sleep(0.05)
                with trio.fail_after(1):
                    disk.volume.abandon()
                    await trio.lowlevel.checkpoint()
                layer.release()
            assert called == []
            assert table(shm / "1.hds") == [0] * CLUSTERS

    trio.run(run)


def test_closing_a_hung_storage_ends_when_it_is_abandoned(shm: Path) -> None:
    path = empty(shm)

    async def run() -> None:
        layer = FaultyOs()
        async with (
            running_engine() as engine,
            open_disk(path, engine, layer=layer, inline=False, close=False) as disk,
        ):
            layer.add(Fault(op="*", hang=True, count=None))
            disk.volume.write(0, memoryview(b"\x01" * 512), lambda _: None)
            disk.volume.kick()
            with trio.fail_after(2):
                async with trio.open_nursery() as nursery:

                    async def close() -> None:
                        with pytest.raises(StorageError):
                            await disk.volume.close()

                    nursery.start_soon(close)
                    await trio.sleep(0.02)
                    disk.volume.abandon()
            layer.release()

    trio.run(run)
    assert path.read_bytes()[44:48] == b"Ynot"


def test_close_waits_for_what_is_under_way(shm: Path) -> None:
    path = chain(shm)
    ended: list[StorageError | None] = []

    async def run() -> None:
        async with (
            running_engine() as engine,
            open_disk(path, engine, inline=False, io="io_uring") as disk,
        ):
            for cluster in range(CLUSTERS):
                data = memoryview(bytes([cluster]) * 512)
                disk.volume.write(cluster * CLUSTER, data, ended.append)
            disk.volume.kick()
            await disk.volume.close()
            assert ended == [None] * CLUSTERS
            with pytest.raises(StorageError):
                await disk.write(0, b"\x01" * 512, fua=True)

    trio.run(run)
    assert all(table(shm / "1.hds"))
    assert (shm / "1.hds").read_bytes()[44:48] == bytes(4)
