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
from ploopd.fileio.engine import IoEngine, make_engine
from ploopd.fileio.oslayer import REAL, OsLayer
from ploopd.storage.device import Done, Pending
from ploopd.storage.opener import NO_SUBSTITUTES, OpenOptions, open_volume
from ploopd.storage.volume import Volume

DEADLINE = 30.0


@pytest.fixture
def shm() -> Iterator[Path]:
    """A directory in memory, where the fast path does everything that it can."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="ploopd-", dir=base))
    yield directory
    shutil.rmtree(directory)


class Disk:
    """A volume as a test uses it: every operation fast if that is possible, else slowly."""

    def __init__(self, volume: Volume, *, inline: bool = True) -> None:
        self.volume = volume
        self.inline = inline
        self.size = volume.size

    async def read(self, offset: int, length: int) -> bytes:
        buffer = memoryview(bytearray(b"\xee" * length))
        if not (self.inline and self.volume.try_read(offset, buffer)):
            await self.wait(lambda done: self.volume.read(offset, buffer, done))
        return bytes(buffer)

    async def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        view = memoryview(data)
        if fua or not (self.inline and self.volume.try_write(offset, view)):
            await self.wait(lambda done: self.volume.write(offset, view, done, fua=fua))

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
