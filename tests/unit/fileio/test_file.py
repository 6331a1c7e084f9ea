"""Files: opening, blocking calls, the data path, completions, the end."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import trio

from ploopd.errors import (
    DeniedError,
    DescriptorError,
    NotFoundError,
    StorageError,
    UnsupportedError,
    UsageError,
)
from ploopd.fileio.engine import IoEngine
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.fileio.file import CacheMode, File, Policy
from ploopd.fileio.operation_queue import MOST_BYTES, MOST_OPERATIONS
from ploopd.fileio.oslayer import REAL
from tests.unit.fileio.conftest import EngineFactory, until


def make(directory: Path, size: int = 65536) -> Path:
    path = directory / "image"
    path.write_bytes(os.urandom(size))
    return path


# Opening.


def test_what_cannot_be_opened_is_one_clear_error(tmp_path: Path) -> None:
    def refused(path: Path, **options: object) -> File:
        return File.open(path, read_only=True, engine=None)

    with pytest.raises(NotFoundError, match="no such file"):
        refused(tmp_path / "none")
    with pytest.raises(UnsupportedError, match="directory"):
        refused(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UnsupportedError, match="FIFO"):
        refused(tmp_path / "fifo")
    with pytest.raises(UnsupportedError, match="character device"):
        refused(Path("/dev/null"))
    with pytest.raises(UsageError, match="warp"):
        File.open(make(tmp_path), read_only=True, engine=None, io="warp")


def test_no_permission_is_said_so(tmp_path: Path) -> None:
    path = make(tmp_path)
    layer = FaultyOs(Fault(op="open", error=errno.EACCES))
    with pytest.raises(DeniedError, match="permission denied"):
        File.open(path, read_only=True, engine=None, layer=layer)


def test_beneath_a_directory_only(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    path = make(inside)
    make(tmp_path)
    fd = os.open(inside, os.O_PATH)
    file = File.open("image", read_only=True, engine=None, dir_fd=fd)
    assert file.pread(100, 0) == path.read_bytes()[:100]
    file.close()
    with pytest.raises(DescriptorError):
        File.open("../image", read_only=True, engine=None, dir_fd=fd)
    os.close(fd)


def test_no_descriptor_is_left_behind_by_a_refusal(tmp_path: Path) -> None:
    path = make(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for layer in (REAL, FaultyOs(Fault(op="fstat", error=errno.EIO))):
        with pytest.raises((UsageError, StorageError)):
            File.open(path, read_only=True, engine=None, io="warp", layer=layer)
    assert len(os.listdir("/proc/self/fd")) == before


# Blocking calls.


def test_blocking_calls(directory: Path) -> None:
    path = make(directory)
    content = bytearray(path.read_bytes())
    file = File.open(path, read_only=False, engine=None)
    assert file.size() == 65536
    assert file.pread(1000, 500) == content[500:1500]
    file.pwrite(b"hello", 70_000)
    content.extend(bytes(70_000 - 65536) + b"hello")
    file.punch_now(4096, 8192)
    content[4096:12288] = bytes(8192)
    file.allocate_now(80_000, 1000)
    content.extend(bytes(81_000 - len(content)))
    file.fsync()
    assert path.read_bytes() == content
    file.truncate(10)
    assert file.size() == 10
    view = memoryview(bytearray(20))
    assert file.pread_into(view, 0) == 10
    with pytest.raises(StorageError, match=r"short read: 10 of 20 bytes are missing") as caught:
        file.pread(20, 0)
    assert (caught.value.errno, caught.value.offset) == (errno.EIO, 10)
    file.close()
    with pytest.raises(StorageError) as caught:
        file.size()
    assert caught.value.errno == errno.EBADF


def test_without_fallocate_files_grow_and_zeros_are_written(directory: Path) -> None:
    path = make(directory)
    content = bytearray(path.read_bytes())
    layer = FaultyOs(Fault(op="fallocate", count=None, error=errno.EOPNOTSUPP))
    file = File.open(path, read_only=False, engine=None, layer=layer)
    file.allocate_now(65536, 4096)
    file.punch_now(1000, 100_000)
    content[1000:] = bytes(65536 + 4096 - 1000)
    assert path.read_bytes() == content
    file.allocate_now(0, 4096)  # never shorter
    assert file.size() == 65536 + 4096
    file.close()


# Policies.


@pytest.mark.trio
async def test_the_policy_follows_the_file_system(running_engine: EngineFactory) -> None:
    path = Path("/dev/shm") / f"ploopd-test-{os.getpid()}"
    path.write_bytes(bytes(4096))
    async with running_engine() as engine:
        try:
            file = File.open(path, read_only=True, engine=engine)
            assert file.policy is Policy.INLINE
            assert file.try_read(memoryview(bytearray(4096)), 0)
            file.close()
            direct = File.open(path, read_only=True, engine=engine, cache=CacheMode.NONE)
            assert direct.policy is Policy.INLINE
            assert "memory" in direct.notes[0]
            direct.close()
            forced = File.open(path, read_only=True, engine=engine, io="threads")
            assert forced.policy is Policy.THREADS
            assert not forced.try_read(memoryview(bytearray(4096)), 0)
            forced.close()
        finally:
            path.unlink()


@pytest.mark.trio
async def test_direct_io_takes_any_buffer_and_any_range(
    running_engine: EngineFactory, directory: Path
) -> None:
    path = make(directory)
    content = bytearray(path.read_bytes())
    async with running_engine() as engine:
        file = File.open(path, read_only=False, engine=engine, cache=CacheMode.NONE)
        memory = memoryview(bytearray(20_001))
        for offset, length in ((512, 512), (4096, 8192), (17, 5000), (64, 4), (65024, 512)):
            data = os.urandom(length)
            memory[1 : 1 + length] = data
            await file.awrite(memory[1 : 1 + length], offset)  # an odd address
            content[offset : offset + length] = data
            back = memory[3 : 3 + length]
            await file.aread(back, offset)
            assert back == data
        await file.async_sync()
        assert path.read_bytes() == content
        file.close()


# Completions.


@pytest.mark.trio
async def test_completions_report_errors_and_short_reads(
    running_engine: EngineFactory, directory: Path
) -> None:
    path = make(directory, 1000)
    async with running_engine() as engine:
        file = File.open(path, read_only=True, engine=engine, io=engine.kind)
        results: list[StorageError | None] = []
        file.read(memoryview(bytearray(2000)), 0, results.append)
        file.write(memoryview(bytes(10)), 0, results.append)
        file.allocate(0, 4096, results.append)
        engine.kick()
        await until(lambda: len(results) == 3)
        found = {(error.op, error.errno) for error in results if error is not None}
        assert found == {
            ("read", errno.EIO),
            ("write", errno.EBADF),
            ("fallocate", errno.EBADF),
        }
        assert any("short read: 1000 of 2000" in str(error) for error in results)
        with pytest.raises(StorageError, match="short read"):
            await file.aread(memoryview(bytearray(1)), 1000)
        file.close()


@pytest.mark.trio
async def test_short_and_interrupted_transfers_go_on(
    running_engine: EngineFactory, directory: Path
) -> None:
    path = make(directory)
    content = path.read_bytes()
    layer = FaultyOs(
        Fault(op="read", nth=1, short=100),
        Fault(op="read", nth=2, error=errno.EINTR),
        Fault(op="read", nth=3, error=errno.EAGAIN),
        Fault(op="write", nth=1, short=1),
        Fault(op="write", nth=2, error=errno.EAGAIN),
    )
    async with running_engine() as engine:
        file = File.open(path, read_only=False, engine=engine, layer=layer, io="threads")
        view = memoryview(bytearray(4096))
        await file.aread(view, 8192)
        assert view == content[8192:12288]
        await file.awrite(memoryview(b"x" * 4096), 8192)
        assert path.read_bytes() == content[:8192] + b"x" * 4096 + content[12288:]
        assert [fault.hits for fault in layer.faults] == [1] * 5
        file.close()


@pytest.mark.trio
async def test_what_never_stops_being_interrupted_fails(
    running_engine: EngineFactory, directory: Path
) -> None:
    layer = FaultyOs(Fault(op="read", count=None, error=errno.EAGAIN))
    async with running_engine() as engine:
        file = File.open(make(directory), read_only=True, engine=engine, layer=layer, io="threads")
        with pytest.raises(StorageError) as caught:
            await file.aread(memoryview(bytearray(512)), 0)
        assert caught.value.errno == errno.EAGAIN
        file.close()


@pytest.mark.trio
async def test_allocate_and_punch(running_engine: EngineFactory, directory: Path) -> None:
    path = make(directory)
    content = bytearray(path.read_bytes())
    refusing = FaultyOs(Fault(op="fallocate", count=None, error=errno.EOPNOTSUPP))
    async with running_engine() as engine:
        for layer in (REAL, refusing):
            file = File.open(path, read_only=False, engine=engine, layer=layer)
            end = file.size()
            await file.async_allocate(end, 4096)
            await file.async_punch(end - 8192, 1 << 20)
            content[end - 8192 :] = bytes(8192 + 4096)
            assert path.read_bytes() == content
            file.close()
    assert refusing.faults[0].hits == 2


@pytest.mark.trio
async def test_one_file_has_so_much_under_way_and_no_more(
    running_engine: EngineFactory, directory: Path
) -> None:
    layer = FaultyOs(Fault(op="read", count=None, hang=True))
    path = make(directory, 4 << 20)
    async with running_engine() as engine:
        file = File.open(path, read_only=True, engine=engine, layer=layer)
        ended: list[StorageError | None] = []
        for index in range(3 * MOST_OPERATIONS):
            file.read(memoryview(bytearray(4096)), index * 4096, ended.append)
        engine.kick()
        assert file.in_flight == 3 * MOST_OPERATIONS
        assert engine.buffers.outstanding == MOST_OPERATIONS
        layer.release()
        await until(lambda: len(ended) == 3 * MOST_OPERATIONS)
        assert ended == [None] * len(ended)
        assert file.in_flight == engine.buffers.outstanding == 0
        ended.clear()
        large = memoryview(bytearray(4 << 20))
        for _ in range(10):
            file.read(large, 0, ended.append)
        assert engine.buffers.outstanding == MOST_BYTES // len(large)
        engine.kick()
        await until(lambda: len(ended) == 10)
        file.close()


# Inline calls and faults.


@pytest.mark.trio
async def test_what_would_hang_is_not_done_inline(
    running_engine: EngineFactory, directory: Path
) -> None:
    layer = FaultyOs(Fault(op="read", nth=2, hang=True))
    io = "auto" if directory.is_relative_to("/dev/shm") else "nowait"
    async with running_engine() as engine:
        file = File.open(make(directory), read_only=True, engine=engine, layer=layer, io=io)
        if io == "nowait" and file.policy is not Policy.NOWAIT:
            file.close()
            pytest.skip(f"the file system of {directory} does no RWF_NOWAIT reads")
        view = memoryview(bytearray(512))
        assert file.try_read(view, 0)
        assert not file.try_read(view, 0)
        layer.release()
        assert file.try_read(view, 0)
        file.close()


@pytest.mark.trio
async def test_an_inline_error_is_the_storages(
    running_engine: EngineFactory, directory: Path
) -> None:
    layer = FaultyOs(Fault(op="write", error=errno.ENOTCONN), Fault(op="read", short=10))
    path = make(directory)
    async with running_engine() as engine:
        file = File.open(path, read_only=False, engine=engine, layer=layer, io="inline")
        with pytest.raises(StorageError) as caught:
            file.try_write(memoryview(bytes(512)), 1024)
        assert (caught.value.errno, caught.value.offset) == (errno.ENOTCONN, 1024)
        assert caught.value.path == str(path)
        assert not file.try_read(memoryview(bytearray(512)), 0)
        file.close()


# The end.


def open_descriptors(path: Path) -> int:
    """How many descriptors of this process are open on the file."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{name}") == str(path)
        except FileNotFoundError:
            continue
    return found


@pytest.mark.trio
async def test_abandoning_a_file_that_hangs(running_engine: EngineFactory, directory: Path) -> None:
    layer = FaultyOs(Fault(op="*", nth=3, count=None, hang=True))  # after open and fstat
    path = make(directory)
    async with running_engine() as engine:
        file = File.open(path, read_only=False, engine=engine, layer=layer, io="threads")
        called: list[object] = []
        target = memoryview(bytearray(b"untouched" * 100))
        file.read(target, 0, called.append)
        file.write(memoryview(bytearray(512)), 0, called.append)
        file.sync(called.append)
        engine.kick()
        outcomes: list[int] = []

        async def wait_in_vain() -> None:
            try:
                await file.aread(memoryview(bytearray(512)), 0)
            except StorageError as error:
                outcomes.append(error.errno)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_in_vain)
            await trio.testing.wait_all_tasks_blocked()
            await until(lambda: len(layer.calls) >= 6)
            begun = trio.current_time()
            file.abandon()
            assert trio.current_time() - begun < 0.5
        assert outcomes == [errno.ECANCELED]
        file.abandon()
        file.close()
        late: list[StorageError | None] = []
        file.read(target, 0, late.append)
        assert [error and error.errno for error in late] == [errno.EBADF]
        assert not file.try_read(target, 0)
        assert open_descriptors(path) == 1  # until the hung operations have come back
        layer.release()
        await until(lambda: open_descriptors(path) == 0)
        assert called == []
        assert target == b"untouched" * 100
        assert engine.buffers.outstanding == 0


@pytest.mark.trio
async def test_bound_calls_of_a_closed_file_never_reach_its_descriptor(
    running_engine: EngineFactory, directory: Path
) -> None:
    path = make(directory)
    other = directory / "other"
    other.write_bytes(bytes(4096))
    async with running_engine() as engine:
        file = File.open(path, read_only=False, engine=engine, io="inline")
        number, try_write = file.fd, file.try_write
        file.close()
        reused = os.open(other, os.O_RDWR)
        assert reused == number
        with pytest.raises(StorageError) as caught:
            try_write(memoryview(b"x" * 512), 0)
        assert caught.value.errno == errno.EBADF
        assert other.read_bytes() == bytes(4096)
        os.close(reused)


@pytest.mark.trio
async def test_closing_with_nothing_under_way_reports_its_error(
    running_engine: EngineFactory, directory: Path
) -> None:
    path = make(directory)
    layer = FaultyOs(Fault(op="close", error=errno.EIO))
    async with running_engine() as engine:
        file = File.open(path, read_only=False, engine=engine, layer=layer)
        with pytest.raises(StorageError, match="close failed"):
            file.close()
        assert open_descriptors(path) == 0


@pytest.mark.trio
async def test_a_cancelled_coroutine_disowns_its_operation(
    running_engine: EngineFactory, directory: Path
) -> None:
    layer = FaultyOs(Fault(op="read", hang=True))
    async with running_engine() as engine:
        file = File.open(make(directory), read_only=True, engine=engine, layer=layer)
        target = memoryview(bytearray(512))
        with trio.move_on_after(0.05) as scope:
            await file.aread(target, 0)
        assert scope.cancelled_caught
        assert file.in_flight == 1
        layer.release()
        await until(lambda: file.in_flight == 0)
        assert target == bytes(512)  # the late result is void
        file.close()


def test_a_file_without_an_engine_completes_at_once(directory: Path) -> None:
    path = make(directory)
    file = File.open(path, read_only=False, engine=None)
    results: list[StorageError | None] = []
    view = memoryview(bytearray(512))
    file.write(memoryview(b"y" * 512), 0, results.append)
    file.read(view, 0, results.append)
    file.sync(results.append)
    file.allocate(65536, 4096, results.append)
    file.punch(0, 4096, results.append)
    assert results == [None] * 5
    assert view == b"y" * 512
    assert file.pread(4096, 0) == bytes(4096)
    file.close()


@pytest.mark.trio
async def test_the_loop_answers_while_a_file_hangs(
    running_engine: EngineFactory, directory: Path
) -> None:
    """Stuck operations on one file; another file and the loop go on."""
    layer = FaultyOs(Fault(op="*", path="stuck", nth=3, count=None, hang=True))
    (directory / "stuck").write_bytes(bytes(1 << 20))
    path = make(directory)

    async def use(engine: IoEngine) -> None:
        sound = File.open(path, read_only=False, engine=engine, io=engine.kind)
        for _ in range(20):
            await sound.awrite(b"z" * 4096, 0)
            await sound.async_sync()
        sound.close()

    async with running_engine() as engine:
        stuck = File.open(
            directory / "stuck", read_only=False, engine=engine, layer=layer, io="threads"
        )
        for index in range(MOST_OPERATIONS):
            stuck.read(memoryview(bytearray(512)), index * 512, lambda _: None)
        engine.kick()
        with trio.fail_after(5):
            await use(engine)
        assert threading.active_count() <= 80
        stuck.abandon()
        layer.release()
        await until(lambda: open_descriptors(directory / "stuck") == 0)
