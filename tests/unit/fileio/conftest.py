"""Engines of both kinds, directories on both kinds of local file system."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio

from ploopd.fileio import uring
from ploopd.fileio.engine import IoEngine, make_engine

EngineFactory = Callable[[], AbstractAsyncContextManager[IoEngine]]


async def until(condition: Callable[[], bool]) -> None:
    """Wait, 10 seconds at most, for something that other threads or the kernel do."""
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await trio.sleep(0.005)


@pytest.fixture(params=["io_uring", "threads"])
def running_engine(request: pytest.FixtureRequest) -> EngineFactory:
    """An engine whose `run` task is running, closed afterwards."""
    if request.param == "io_uring" and (reason := uring.probe()) is not None:
        pytest.skip(reason)

    @asynccontextmanager
    async def running() -> AsyncIterator[IoEngine]:
        engine = make_engine(request.param)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(engine.run)
                yield engine
                nursery.cancel_scope.cancel()
        finally:
            engine.close()

    return running


@pytest.fixture(params=["memory", "disk"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory on tmpfs and one where temporary files are (a disk, on most machines)."""
    if request.param == "disk":
        yield tmp_path
        return
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no /dev/shm")
    path = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="ploopd-test-"))
    yield path
    shutil.rmtree(path)
