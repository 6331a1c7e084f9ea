"""Writes that wait behind another file's stalled write are moved to threads, and only those."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ploopd.fileio import stall_watch
from ploopd.fileio.buffers import Buffer, BufferPool
from ploopd.fileio.completions import Callback
from ploopd.fileio.stall_watch import Operation, StallWatch, file_of
from ploopd.fileio.uring import Entry, Opcode


class Ring:
    """The ring as the watch sees it: a table of operations, and what the watch submitted."""

    def __init__(self) -> None:
        self.operations: dict[int, Operation] = {}
        self.ticks: list[Callback] = []
        self.cancelled: list[int] = []
        self.moved: list[tuple[Any, ...]] = []
        self.watch = StallWatch(self.operations, self.submit, self, lambda _: False)  # type: ignore[arg-type]
        self.tag = 0

    def submit(
        self,
        opcode: Opcode,
        fd: int,
        address: int,
        length: int,
        op_flags: int,
        buffer: Buffer | None,
        callback: Callback,
    ) -> None:
        if opcode is Opcode.TIMEOUT:
            assert buffer is not None
            assert struct.unpack_from("=qq", buffer.view) == (0, int(stall_watch.TICK * 1e9))
            self.ticks.append(callback)
        else:
            assert opcode is Opcode.ASYNC_CANCEL
            self.cancelled.append(address)

    def write(self, fd: int, buffer: Buffer, start: int, offset: int, callback: Callback) -> None:
        self.moved.append(("write", fd, buffer, start, offset, callback))

    def fallocate(self, fd: int, mode: int, offset: int, length: int, callback: Callback) -> None:
        self.moved.append(("fallocate", fd, mode, offset, length, callback))

    def begin(self, opcode: Opcode, fd: int, *fields: int, buffer: Buffer | None = None) -> int:
        address, length, offset = fields or (0, 0, 0)
        self.tag += 1
        entry: Entry = (opcode, fd, address, length, offset, self.tag, 0, 0)
        self.operations[self.tag] = (entry, buffer, ignore)
        if opcode in (Opcode.WRITE, Opcode.FALLOCATE):
            self.watch.newest = self.tag
        if self.watch.due:
            self.watch.begin()
        return self.tag

    def end(self, tag: int, result: int) -> bool:
        return self.watch.takes_over(self.operations.pop(tag), result)

    def tick(self) -> None:
        self.ticks.pop()(-errno.ETIME)


def ignore(result: int) -> None:
    raise AssertionError(result)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[int]]:
    path = tmp_path / "data"
    path.write_bytes(b"")
    descriptors = [os.open(path, os.O_RDWR) for _ in range(3)]
    yield descriptors
    for fd in descriptors:
        os.close(fd)


def test_reads_and_syncs_are_not_watched(files: list[int]) -> None:
    ring = Ring()
    ring.begin(Opcode.READ, files[0])
    ring.begin(Opcode.FSYNC, files[1])
    assert not ring.ticks


def test_the_clock_ticks_while_there_are_writes(files: list[int]) -> None:
    ring = Ring()
    tag = ring.begin(Opcode.WRITE, files[0])
    ring.begin(Opcode.WRITE, files[0])
    assert len(ring.ticks) == 1
    ring.tick()
    assert len(ring.ticks) == 1
    ring.end(tag, 512)
    ring.end(tag + 1, 512)
    ring.tick()
    assert not ring.ticks
    assert ring.watch.own_operations == 0


def test_one_file_that_stalls_is_left_alone(files: list[int]) -> None:
    ring = Ring()
    for _ in range(5):
        ring.begin(Opcode.WRITE, files[0])
    for _ in range(5):
        ring.tick()
    assert not ring.cancelled
    ring.begin(Opcode.WRITE, files[1])  # new: it has not waited for a tick
    ring.tick()
    assert not ring.cancelled


def test_what_two_files_have_waiting_is_moved(files: list[int]) -> None:
    ring = Ring()
    buffer = BufferPool().take(4096)
    stuck = ring.begin(Opcode.WRITE, files[0], buffer.address, 4096, 0, buffer=buffer)
    write = ring.begin(Opcode.WRITE, files[1], buffer.address + 96, 4000, 8288, buffer=buffer)
    space = ring.begin(Opcode.FALLOCATE, files[1], 65536, 3, 1 << 20)
    ring.tick()
    assert not ring.cancelled
    ring.tick()
    assert ring.cancelled == [stuck, write, space]
    ring.tick()
    assert len(ring.cancelled) == 3  # once each
    assert ring.end(write, -errno.ECANCELED)
    assert ring.end(space, -errno.ECANCELED)
    assert not ring.end(stuck, 4096)  # it went on after all
    assert ring.moved == [
        ("write", files[1], buffer, 96, 8192, ignore),
        ("fallocate", files[1], 3, 1 << 20, 65536, ignore),
    ]
    assert ring.watch.diverts(files[1])
    assert not ring.watch.diverts(files[0])


def test_an_error_of_the_storage_is_not_hidden(files: list[int]) -> None:
    ring = Ring()
    tags = [ring.begin(Opcode.WRITE, fd) for fd in files]
    ring.tick()
    ring.tick()
    assert ring.cancelled == tags
    assert not ring.end(tags[0], -errno.EIO)
    untouched = ring.begin(Opcode.WRITE, files[0])
    assert not ring.end(untouched, -errno.ECANCELED)  # not cancelled by the watch


def test_what_was_disowned_is_not_done_by_others(files: list[int]) -> None:
    ring = Ring()
    tags = [ring.begin(Opcode.WRITE, fd) for fd in files]
    ring.tick()
    ring.tick()
    ring.watch.forget(files[0])
    assert not ring.end(tags[0], -errno.ECANCELED)
    assert not ring.moved


def test_direct_writes_may_take_their_time(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(4096))
    try:
        files = [os.open(path, os.O_RDWR | os.O_DIRECT) for _ in range(2)]
    except OSError:
        pytest.skip("no O_DIRECT here")
    ring = Ring()
    for fd in files:
        ring.begin(Opcode.WRITE, fd)
    for _ in range(3):
        ring.tick()
    assert not ring.cancelled
    for fd in files:
        os.close(fd)


def test_a_diversion_ends(files: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall_watch, "DIVERSION", -1.0)
    ring = Ring()
    buffer = BufferPool().take(512)
    tags = [ring.begin(Opcode.WRITE, fd, buffer.address, 512, 0, buffer=buffer) for fd in files[:2]]
    ring.tick()
    ring.tick()
    assert all(ring.end(tag, -errno.ECANCELED) for tag in tags)
    assert not ring.watch.diverts(files[0])


def test_control_operations_belong_to_no_file() -> None:
    assert file_of((Opcode.ASYNC_CANCEL, 7, 0, 0, 0, 1, 0, 0)) == -1
    assert file_of((Opcode.READ, 7, 0, 0, 0, 1, 0, 0)) == 7


def test_a_file_is_opened_in_a_thread_while_the_loop_reaps(files: list[int]) -> None:
    class Reaping(dict[int, Operation]):
        """The loop takes an operation out as soon as the other thread has seen it."""

        def __contains__(self, tag: object) -> bool:
            found = super().__contains__(tag)
            self.clear()
            return found

    ring = Ring()
    tags = [ring.begin(Opcode.FALLOCATE, fd, 4096, 0, 0) for fd in files[:2]]
    for _ in range(2):
        ring.tick()
    assert ring.cancelled == tags
    operation = ring.operations[tags[0]]
    watch, ring.watch._operations = ring.watch, Reaping(ring.operations)
    watch.opened(files[2])
    assert watch.takes_over(operation, -errno.ECANCELED)  # it is still the watch's to move
    assert watch.diverts(files[0])
    watch.opened(files[0])
    assert not watch.diverts(files[0])
