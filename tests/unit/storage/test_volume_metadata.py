"""Header and BAT: by which descriptor they are written, and what is certain of them when."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from ploopd.errors import StorageError
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.fileio.file import CacheMode
from ploopd.fileio.policy import filesystem_type
from ploopd.fileio.ring_engine import RingEngine
from ploopd.storage.check import check_image
from tests.support import images
from tests.support.volumes import open_disk, running_engine

CLUSTER = 32 << 10


class DescriptorLog(FaultyOs):
    """Remembers which writes went past the page cache."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[tuple[int, int, bool]] = []

    def pwritev(
        self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0, /
    ) -> int:
        direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        self.writes.append((offset, sum(map(len, buffers)), direct))
        return super().pwritev(fd, buffers, offset, flags)


@pytest.mark.trio
async def test_the_table_never_goes_past_the_page_cache(tmp_path: Path) -> None:
    """Its pages are written by entry through the cache: a direct write of the same page, which a
    row of entries may be aligned for, could be undone by a page that is written back later."""
    if filesystem_type(os.stat(tmp_path).st_dev) == "tmpfs":
        pytest.skip("no O_DIRECT in memory")
    count = 256
    clusters = {index: bytes([1]) * CLUSTER for index in range(count)}
    path = images.write_delta(
        tmp_path / "disk.hds", count * CLUSTER, clusters, cluster_size=CLUSTER, order=range(count)
    )
    layer = DescriptorLog()
    async with (
        running_engine() as engine,
        open_disk(path, engine, layer=layer, cache=CacheMode.NONE) as disk,
    ):
        layer.writes.clear()
        await disk.write(0, b"x" * 4096)
        await disk.discard(112 * CLUSTER, 128 * CLUSTER)  # the entries are bytes 512 to 1023
        written = list(layer.writes)
    assert (CLUSTER, 4096, True) in written
    assert [write for write in written if write[0] < CLUSTER] == [(512, 512, False)]


@pytest.mark.trio
async def test_zeros_are_durable_where_an_entry_was_in_doubt(tmp_path: Path) -> None:
    """An entry was written although its write failed.  Zeros over it need no cluster, but with FUA
    nothing else may come back after a power cut."""
    path = images.write_delta(tmp_path / "disk.hds", 8 * CLUSTER, {}, cluster_size=CLUSTER)
    layer = FaultyOs(record=True)
    async with running_engine() as engine, open_disk(path, engine, layer=layer) as disk:
        layer.add(Fault(op="write", start=64, end=68, torn=4))
        with pytest.raises(StorageError):
            await disk.write(0, b"x" * 4096)
        await disk.write(0, bytes(4096), fua=True)
        after = layer.log(path).state(keep=lambda _: False)
    (entry,) = struct.unpack_from("<I", after, 64)
    assert entry == 0 or after[entry * CLUSTER :][:4096] == bytes(4096)


@pytest.mark.trio
@pytest.mark.parametrize("kind", ["auto", "threads"])
async def test_closing_waits_for_what_was_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A probe that took too long leaves a write behind.  Nobody knows what it will still do to the
    file, and a thread that closes it must not disown it: the engine is for the loop's thread."""
    path = images.write_delta(tmp_path / "disk.hds", 8 * CLUSTER, {}, cluster_size=CLUSTER)
    layer = FaultyOs()
    disowned: list[int] = []
    async with running_engine(kind) as engine:
        # The ring hands it on; its own methods cannot be replaced when it is compiled.
        threads = engine._threads if isinstance(engine, RingEngine) else engine
        monkeypatch.setattr(threads, "disown", disowned.append)
        async with open_disk(path, engine, layer=layer) as disk:
            layer.add(Fault(op="write", hang=True))
            with trio.move_on_after(0.1) as scope:
                await disk.volume.probe_write()
            assert scope.cancelled_caught
            async with trio.open_nursery() as nursery:
                nursery.start_soon(disk.volume.close)
                await trio.sleep(0.1)
                assert path.read_bytes()[44:48] == b"Ynot"
                assert disk.volume.in_flight == 1
                layer.release()
    assert path.read_bytes()[44:48] == bytes(4)
    assert disowned == []


@pytest.mark.trio
async def test_closing_waits_no_longer_than_until_it_is_given_up(tmp_path: Path) -> None:
    path = images.write_delta(tmp_path / "disk.hds", 8 * CLUSTER, {}, cluster_size=CLUSTER)
    layer = FaultyOs()
    async with (
        running_engine() as engine,
        open_disk(path, engine, layer=layer, close=False) as disk,
    ):
        layer.add(Fault(op="write", hang=True))
        for action in (disk.volume.probe_write, disk.volume.close):
            with trio.move_on_after(0.1) as scope:
                await action()
            assert scope.cancelled_caught
        layer.release()
    assert path.read_bytes()[44:48] == b"Ynot"


@pytest.mark.trio
async def test_nothing_is_written_at_once_while_it_is_closed(shm: Path) -> None:
    path = images.write_delta(shm / "disk.hds", 8 * CLUSTER, {}, cluster_size=CLUSTER)
    layer = FaultyOs()
    async with running_engine() as engine, open_disk(path, engine, layer=layer) as disk:
        await disk.write(0, b"x" * 4096)
        layer.add(Fault(op="fsync", nth=2, hang=True))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.volume.close)
            with trio.fail_after(5):
                while path.stat().st_size > 2 * CLUSTER:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            assert not disk.volume.try_write(CLUSTER, memoryview(b"y" * 4096))
            assert not disk.volume.try_write(0, memoryview(b"y" * 4096))
            assert not disk.volume.try_write(0, memoryview(b"y" * 2 * CLUSTER))
            layer.release()
    assert check_image(path).corruptions == 0
    assert path.read_bytes()[CLUSTER:] == b"x" * 4096 + bytes(CLUSTER - 4096)
