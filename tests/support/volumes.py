"""A volume with its engine and tasks around it, and its operations as coroutines."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from ploopd.errors import StorageError
from ploopd.fileio.buffers import BufferPool
from ploopd.fileio.engine import IoEngine, make_engine
from ploopd.fileio.oslayer import REAL, OsLayer
from ploopd.storage.device import Done, Pending
from ploopd.storage.opener import NO_SUBSTITUTES, OpenOptions, open_volume
from ploopd.storage.request import FINISHED
from ploopd.storage.volume import Volume
from tests.support import lane_request

DEADLINE = 30.0


@pytest.fixture
def shm() -> Iterator[Path]:
    """A directory in memory, where the fast path does everything that it can."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="ploopd-", dir=base))
    yield directory
    shutil.rmtree(directory)


class Disk:
    """A volume as a test uses it: every operation fast if that is possible, else slowly.

    What is not done inline goes into the lane if that takes it; every third of those is promoted
    while it is under way, and every third goes the ordinary way from the start.  `in_lane` counts
    them.  Every other read and write takes a view if there is one; `viewed` counts them.
    """

    def __init__(self, volume: Volume, *, inline: bool = True) -> None:
        self.volume = volume
        self.inline = inline
        self.size = volume.size
        self.in_lane = 0
        self.viewed = 0
        self._turn = 0
        self._accesses = 0
        self._buffers = BufferPool()

    async def read(self, offset: int, length: int) -> bytes:
        view = self.volume.try_view(offset, length) if self._may_view() else None
        if view is not None:
            self.viewed += 1
            return bytes(view)
        buffer = memoryview(bytearray(b"\xee" * length))
        if not (self.inline and self.volume.try_read(offset, buffer)):
            await self.wait(lambda done: self._read(offset, buffer, done))
        return bytes(buffer)

    def _may_view(self) -> bool:
        self._accesses += 1
        return self.inline and self._accesses % 2 == 1

    def _read(self, offset: int, buffer: memoryview, done: Done) -> Pending:
        in_lane = self._lane(offset, buffer, done, write=False)
        return in_lane or self.volume.read(offset, buffer, done)

    def _write(self, offset: int, data: memoryview, done: Done, *, fua: bool) -> Pending:
        in_lane = None if fua else self._lane(offset, data, done, write=True)
        return in_lane or self.volume.write(offset, data, done, fua=fua)

    def _lane(self, offset: int, data: memoryview, done: Done, *, write: bool) -> Pending | None:
        self._turn += 1
        lane = self.volume.lane
        if not lane.usable or not self._turn % 3:
            return None
        request = lane_request.begin(lane, self._buffers, offset, data, done, write=write)
        if request is None:
            return None
        self.in_lane += 1
        if self._turn % 3 == 1:
            request.promote()
        return FINISHED

    async def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        view = memoryview(data)
        place = None
        if data and not fua and self._may_view():
            place = self.volume.try_write_view(offset, len(data))
        if place is not None:
            self.viewed += 1
            place[:] = data
        elif fua or not (self.inline and self.volume.try_write(offset, view)):
            await self.wait(lambda done: self._write(offset, view, done, fua=fua))

    async def zero(
        self, offset: int, length: int, *, unmap: bool = False, fua: bool = False
    ) -> None:
        await self.wait(
            lambda done: self.volume.write_zeroes(offset, length, done, unmap=unmap, fua=fua)
        )

    async def discard(self, offset: int, length: int) -> None:
        await self.wait(lambda done: self.volume.discard(offset, length, done))

    async def flush(self) -> None:
        await self.wait(self.volume.flush)

    async def wait(self, start: Callable[[Done], Pending]) -> None:
        """Start an operation and wait for its `done`; raises what that was given."""
        ended = trio.Event()
        results: list[StorageError | None] = []

        def done(error: StorageError | None) -> None:
            results.append(error)
            ended.set()

        start(done)
        self.volume.kick()
        with trio.fail_after(DEADLINE):
            await ended.wait()
        assert len(results) == 1, "done was called more than once"
        if results[0] is not None:
            raise results[0]


@asynccontextmanager
async def running_engine(kind: str = "auto") -> AsyncIterator[IoEngine]:
    """An engine whose completions are reaped."""
    engine = make_engine(kind)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        yield engine
        nursery.cancel_scope.cancel()
    engine.close()


@asynccontextmanager
async def open_disk(
    path: Path | str,
    engine: IoEngine,
    *,
    layer: OsLayer = REAL,
    inline: bool = True,
    close: bool = True,
    substitutes: Mapping[str, str] = NO_SUBSTITUTES,
    inherit: Volume | None = None,
    **options: Any,
) -> AsyncIterator[Disk]:
    """Open, run and close a volume; with `close` False it is abandoned instead, as by a crash."""
    chosen = OpenOptions(**options)
    volume = await trio.to_thread.run_sync(
        lambda: open_volume(
            path, chosen, engine, layer=layer, substitutes=substitutes, inherit=inherit
        )
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(volume.run)
        try:
            yield Disk(volume, inline=inline)
        except BaseException:
            volume.abandon()
            raise
        if close:
            with trio.fail_after(DEADLINE):
                await volume.close()
        else:
            volume.abandon()
            await trio.to_thread.run_sync(wait_until_closed, volume)


def wait_until_closed(volume: Volume) -> None:
    """Wait until the descriptors of an abandoned volume have been closed in the background."""
    wanted = {os.path.realpath(layer.path) for layer in volume.layers}
    deadline = time.monotonic() + DEADLINE
    while wanted & set(_open_files()):
        assert time.monotonic() < deadline, "an abandoned volume still has its files"
        time.sleep(0.001)


def _open_files() -> Iterator[str]:
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            yield os.readlink(f"/proc/self/fd/{fd}")
