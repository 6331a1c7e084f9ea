"""What every engine promises, for both of them."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from ploopd.fileio import uring
from ploopd.fileio.engine import IoEngine
from ploopd.fileio.ring_engine import GROUP, RingEngine
from ploopd.fileio.thread_engine import ThreadEngine
from tests.unit.fileio.conftest import EngineFactory, until


async def result_of(engine: IoEngine, start: Callable[[Callable[[int], None]], None]) -> int:
    """The result of one operation, kicked and waited for."""
    ended = trio.Event()
    results: list[int] = []

    def callback(result: int) -> None:
        results.append(result)
        ended.set()

    start(callback)
    engine.kick()
    with trio.fail_after(10):
        await ended.wait()
    assert len(results) == 1
    return results[0]


@pytest.mark.trio
async def test_write_sync_read(running_engine: EngineFactory, directory: Path) -> None:
    path = directory / "data"
    path.write_bytes(bytes(65536))
    async with running_engine() as engine:
        fd = os.open(path, os.O_RDWR)
        out, back = engine.buffers.take(5000), engine.buffers.take(5000)
        out.view[:] = data = os.urandom(5000)
        assert await result_of(engine, lambda done: engine.write(fd, out, 0, 100, done)) == 5000
        assert await result_of(engine, lambda done: engine.fdatasync(fd, done)) == 0
        assert await result_of(engine, lambda done: engine.read(fd, back, 0, 100, done)) == 5000
        assert back.view == data
        back.view[:] = bytes(5000)
        assert await result_of(engine, lambda done: engine.read(fd, back, 1000, 100, done)) == 4000
        assert back.view == bytes(1000) + data[1000:]
        os.close(fd)


@pytest.mark.trio
async def test_the_end_of_the_file_is_a_short_read(
    running_engine: EngineFactory, directory: Path
) -> None:
    path = directory / "data"
    path.write_bytes(bytes(1000))
    async with running_engine() as engine:
        fd = os.open(path, os.O_RDONLY)
        buffer = engine.buffers.take(4096)
        assert await result_of(engine, lambda done: engine.read(fd, buffer, 0, 0, done)) == 1000
        assert await result_of(engine, lambda done: engine.read(fd, buffer, 0, 4096, done)) == 0
        os.close(fd)


@pytest.mark.trio
async def test_errors_are_negative(running_engine: EngineFactory, directory: Path) -> None:
    path = directory / "data"
    path.write_bytes(bytes(4096))
    async with running_engine() as engine:
        fd = os.open(path, os.O_RDONLY)
        buffer = engine.buffers.take(512)
        result = await result_of(engine, lambda done: engine.write(fd, buffer, 0, 0, done))
        assert result == -errno.EBADF
        result = await result_of(engine, lambda done: engine.fallocate(fd, 0, 0, 4096, done))
        assert result == -errno.EBADF
        os.close(fd)


@pytest.mark.trio
async def test_fallocate_and_call(running_engine: EngineFactory, directory: Path) -> None:
    path = directory / "data"
    path.write_bytes(b"")
    async with running_engine() as engine:
        fd = os.open(path, os.O_RDWR)
        assert await result_of(engine, lambda done: engine.fallocate(fd, 0, 4096, 8192, done)) == 0
        assert os.fstat(fd).st_size == 12288
        assert os.fstat(fd).st_blocks == 16
        cut = (fd, 100)
        assert await result_of(engine, lambda done: engine.call(fd, os.ftruncate, cut, done)) == 0
        assert os.fstat(fd).st_size == 100
        os.close(fd)


@pytest.mark.trio
async def test_more_operations_than_any_ring_holds(
    running_engine: EngineFactory, directory: Path
) -> None:
    path = directory / "data"
    path.write_bytes(os.urandom(1 << 20))
    content = path.read_bytes()
    async with running_engine() as engine:
        fd = os.open(path, os.O_RDONLY)
        count, left, ended = 5000, [5000], trio.Event()
        buffers = [engine.buffers.take(64) for _ in range(count)]

        def callback(result: int) -> None:
            assert result == 64
            left[0] -= 1
            if not left[0]:
                ended.set()

        for index, buffer in enumerate(buffers):
            engine.read(fd, buffer, 0, index * 200, callback)
        engine.kick()
        with trio.fail_after(30):
            await ended.wait()
        assert all(
            buffer.view == content[index * 200 :][:64] for index, buffer in enumerate(buffers)
        )
        os.close(fd)


@pytest.mark.trio
async def test_callbacks_may_queue_more_and_kick(
    running_engine: EngineFactory, directory: Path
) -> None:
    path = directory / "data"
    path.write_bytes(bytes(4096))
    async with running_engine() as engine:
        fd = os.open(path, os.O_RDONLY)
        buffer, count, ended = engine.buffers.take(4096), [0], trio.Event()

        def callback(result: int) -> None:
            count[0] += 1
            if count[0] == 300:
                ended.set()
                return
            engine.read(fd, buffer, 0, 0, callback)
            engine.kick()

        engine.read(fd, buffer, 0, 0, callback)
        engine.kick()
        with trio.fail_after(10):
            await ended.wait()
        assert count[0] == 300
        os.close(fd)


@pytest.mark.trio
async def test_a_file_that_hangs_does_not_hold_up_another(directory: Path) -> None:
    engine = ThreadEngine(max_threads=4, per_file=2)
    paths = [directory / name for name in ("stuck", "sound")]
    for path in paths:
        path.write_bytes(bytes(4096))
    stuck, sound = (os.open(path, os.O_RDWR) for path in paths)
    release = threading.Event()
    ended: list[int] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        for _ in range(10):
            engine.call(stuck, release.wait, (), ended.append)
        engine.kick()
        assert await result_of(engine, lambda done: engine.fdatasync(sound, done)) == 0
        assert ended == []
        release.set()
        await until(lambda: len(ended) == 10)
        nursery.cancel_scope.cancel()
    engine.close()
    os.close(stuck)
    os.close(sound)


@pytest.mark.trio
async def test_disowned_threads_are_replaced(directory: Path) -> None:
    engine = ThreadEngine(max_threads=2, per_file=2)
    path = directory / "data"
    path.write_bytes(bytes(4096))
    stuck, sound = os.open(path, os.O_RDWR), os.open(path, os.O_RDWR)
    release = threading.Event()
    ended: list[int] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        for _ in range(5):
            engine.call(stuck, release.wait, (), ended.append)
        engine.kick()
        await trio.sleep(0.05)
        engine.disown(stuck)
        engine.kick()
        assert ended == [-errno.ECANCELED] * 3  # what had not begun
        assert await result_of(engine, lambda done: engine.fdatasync(sound, done)) == 0
        release.set()
        await until(lambda: len(ended) == 5)
        assert ended[3:] == [1, 1]
        assert await result_of(engine, lambda done: engine.fdatasync(sound, done)) == 0
        # A thread posts the result first and lets go of the file then.
        await until(lambda: engine._claimed == engine._stuck == 0)
        nursery.cancel_scope.cancel()
    assert engine.close()
    os.close(stuck)
    os.close(sound)


@pytest.mark.skipif(uring.probe() is not None, reason=f"{uring.probe()}")
@pytest.mark.trio
async def test_what_waits_for_a_full_ring_is_dropped_when_disowned(directory: Path) -> None:
    engine = RingEngine(entries=4, completions=8)
    path = directory / "data"
    path.write_bytes(os.urandom(4096))
    fd = os.open(path, os.O_RDONLY)
    results: list[int] = []
    for _ in range(20):
        engine.read(fd, engine.buffers.take(512), 0, 0, results.append)
    engine.disown(fd)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        engine.kick()
        await until(lambda: not engine.outstanding)
        nursery.cancel_scope.cancel()
    assert len(results) == 20
    assert results.count(-errno.ECANCELED) >= 16
    engine.close()
    os.close(fd)


@pytest.mark.trio
async def test_idle_kicks_do_nothing(running_engine: EngineFactory) -> None:
    async with running_engine() as engine:
        for _ in range(10):
            engine.kick()
        await trio.testing.wait_all_tasks_blocked()


@pytest.fixture
def filled(directory: Path) -> Iterator[int]:
    """A file of 4 KiB, open for reading."""
    path = directory / "filled"
    path.write_bytes(os.urandom(4096))
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.mark.skipif(uring.probe() is not None, reason=f"{uring.probe()}")
@pytest.mark.trio
async def test_completions_come_in_groups(filled: int) -> None:
    """With an interlude after each, in which new operations can begin."""
    engine = RingEngine()
    results: list[int] = []
    seen: list[int] = []

    def interlude() -> None:
        assert engine.collecting
        seen.append(len(results))
        if len(seen) == 2:
            engine.read(filled, engine.buffers.take(512), 0, 0, results.append)
            engine.kick()
            assert len(results) == seen[-1], "the next group has not begun"

    engine.interlude = interlude
    for _ in range(2 * GROUP + 1):
        engine.read(filled, engine.buffers.take(512), 0, 0, results.append)
    engine._ring.submit()
    await until(lambda: engine._ring.completed() == 2 * GROUP + 1)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        await until(lambda: len(results) == 2 * GROUP + 2)
        assert seen[:2] == [GROUP, 2 * GROUP]
        assert not engine.collecting
        # What a thread has done while the engine was collecting wakes it afterwards.
        for _ in range(3):
            assert await result_of(engine, lambda done: engine.call(filled, int, (), done)) == 0
        nursery.cancel_scope.cancel()
    assert results == [512] * (2 * GROUP + 2)
    engine.close()


@pytest.mark.skipif(uring.probe() is not None, reason=f"{uring.probe()}")
@pytest.mark.trio
async def test_interludes_without_end_leave_the_loop_its_turns(filled: int) -> None:
    engine = RingEngine()
    results: list[int] = []

    def interlude() -> None:
        engine.read(filled, engine.buffers.take(512), 0, 0, results.append)

    engine.interlude = interlude
    interlude()
    engine._ring.submit()
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        turns = 0
        with trio.fail_after(10):
            while turns < 20 or not results:
                await trio.sleep(0.001)
                turns += 1
        engine.interlude = None
        nursery.cancel_scope.cancel()
    engine.close()
