"""The data of a disk for file operations: bytes in, requests of the gate out.

A file has no sectors: what does not begin and end on a block reads the rest of the block first.
Every operation that cannot end at once is a task of the logical unit's task set, so that it keeps
out of ranges that are exclusive to a command of another front end, and others out of its own.

A request that the gate answers BUSY is made again after a while: a process that reads a file waits,
as it would for a disk that is slow, until it is interrupted.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator
from functools import partial

from ploopd.errors import NO_ROOM, ParkTimeoutError, StorageError
from ploopd.fileio.libc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE
from ploopd.frontends.fuse.attributes import ServedDevice
from ploopd.scsi.cdb import BLOCK_SIZE
from ploopd.scsi.execution import SLICE, Start
from ploopd.scsi.logical_unit import Buffer
from ploopd.scsi.task import Task, TaskState
from ploopd.scsi.transfer import CLUSTERS_AT_ONCE, pieces
from ploopd.storage.device import ExtentKind, Pending

RETRY_SECONDS = 0.5
"""How long after BUSY a request is made again."""

SEEK_EXTENTS = 4096
"""Extents that one SEEK_HOLE looks at."""

EMPTY = memoryview(b"")

Value = memoryview | int | None
Answer = Callable[[int, Value], None]
"""(errno or 0, what was read or how many bytes were written).  A view is valid during the call."""

Later = Callable[[float, Callable[[], None]], None]
"""Calls something after so many seconds, in the event loop."""

Script = Generator[Start, None, Value]

_FALLOCATE_MODES = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE
_NO_CDB = bytes(16)


class Disk:
    """One device's disk; offsets and sizes are bytes and need not be aligned.

    Methods answer by one call of `answer`, perhaps before they return; then they return None, and
    else the operation that is under way.  `kick` starts what has been asked for.
    """

    __slots__ = ("_device", "_gate", "_later", "_unit")

    def __init__(self, device: ServedDevice, *, later: Later) -> None:
        self._device = device
        self._gate = device.gate
        self._unit = device.unit
        self._later = later

    def kick(self) -> None:
        self._gate.kick()

    @property
    def writable(self) -> bool:
        return self._unit.write_protection() is None

    def read(self, offset: int, size: int, answer: Answer) -> Operation | None:
        """Read up to the end of the disk."""
        size = min(size, self._gate.size - offset)
        if size <= 0:
            answer(0, EMPTY)
            return None
        start, end = _whole_blocks(offset, size)
        buffer = self._unit.buffers.take(end - start)
        try:
            now = self._unit.tasks.quiet and self._gate.try_read(start, buffer.view)
        except StorageError as error:
            buffer.release()
            self._failed(error, answer)
            return None
        if now:
            self._count_read(size)
            answer(0, buffer.view[offset - start : offset - start + size])
            buffer.release()
            return None
        script = self._read(start, buffer, offset - start, size)
        return self._begin(script, answer, start, end, buffer=buffer)

    def write(
        self, offset: int, data: memoryview, answer: Answer, *, stable: bool
    ) -> Operation | None:
        """Write `data`, as much of it as the disk has room for; with `stable` it is on stable
        storage before the answer.  `data` is not used after the method returns."""
        data = data[: max(0, self._gate.size - offset)]
        if not self.writable or not data:
            answer(errno.ENOSPC if self.writable else errno.EROFS, None)
            return None
        stable = stable or not self._unit.modes.write_cache
        start, end = _whole_blocks(offset, len(data))
        aligned = end - start == len(data)
        try:
            quick = aligned and not stable and self._unit.tasks.quiet
            now = quick and self._gate.try_write(offset, data)
        except StorageError as error:
            self._failed(error, answer)
            return None
        if now:
            self._count_write(len(data))
            answer(0, len(data))
            return None
        buffer = self._unit.buffers.take(end - start)
        buffer.view[offset - start : offset - start + len(data)] = data
        script = self._write(start, buffer, offset, len(data), stable)
        return self._begin(script, answer, start, end, exclusive=not aligned, buffer=buffer)

    def flush(self, answer: Answer) -> Operation | None:
        """What was written before is on stable storage before the answer."""
        return self._begin(self._flush(), answer, 0, 0)

    def allocate(self, offset: int, length: int, mode: int, answer: Answer) -> Operation | None:
        """fallocate(2): punch holes and zero ranges; room cannot be reserved."""
        punch, zero = mode & FALLOC_FL_PUNCH_HOLE, mode & FALLOC_FL_ZERO_RANGE
        beyond = offset + length > self._gate.size
        if mode & ~_FALLOCATE_MODES or bool(punch) == bool(zero):
            number = errno.EOPNOTSUPP
        elif not self.writable:
            number = errno.EROFS
        elif beyond and not mode & FALLOC_FL_KEEP_SIZE:
            number = errno.ENOSPC
        else:
            end = min(offset + length, self._gate.size)
            if offset < end:
                first, last = _whole_blocks(offset, end - offset)
                script = self._clear(offset, end, discard=bool(punch))
                return self._begin(script, answer, first, last, exclusive=True)
            number = 0
        answer(number, None)
        return None

    def seek(self, offset: int, whence: int) -> int:
        """lseek(2) with SEEK_DATA or SEEK_HOLE; raises `OSError`.

        A disk in very many pieces: SEEK_HOLE may name a place where data goes on, so that one call
        does not take seconds; whoever looks for data there finds it at that very place.
        """
        size = self._gate.size
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, "only SEEK_DATA and SEEK_HOLE")
        if not 0 <= offset < size:
            raise OSError(errno.ENXIO, "beyond the end of the disk")
        for count, extent in enumerate(self._gate.extents(offset, size - offset)):
            is_data = extent.kind is ExtentKind.DATA
            if is_data == (whence == os.SEEK_DATA) or (
                count >= SEEK_EXTENTS and whence == os.SEEK_HOLE
            ):
                return max(offset, extent.offset)
        if whence == os.SEEK_HOLE:
            return size
        raise OSError(errno.ENXIO, "no data behind that place")

    # -- now, or in steps ------------------------------------------------------------------

    def _failed(self, error: StorageError, answer: Answer) -> None:
        """An operation that was done at once has failed, and the gate does not park it."""
        self._unit.stats.errors += 1
        answer(_file_errno(error), None)

    def _read(self, start: int, buffer: Buffer, skip: int, size: int) -> Script:
        yield partial(self._gate.read, start, buffer.view)
        self._count_read(size)
        return buffer.view[skip : skip + size]

    def _write(self, start: int, buffer: Buffer, offset: int, size: int, stable: bool) -> Script:
        yield from self._fill_edges(start, buffer, offset, size)
        yield partial(self._gate.write, start, buffer.view, fua=stable)
        self._count_write(size)
        return size

    def _fill_edges(self, start: int, buffer: Buffer, offset: int, size: int) -> Script:
        """Read what the first and the last block have around [offset, offset + size)."""
        length = len(buffer.view)
        head, tail = offset - start, start + length - (offset + size)
        for at, from_, to in ((0, 0, head), (length - BLOCK_SIZE, BLOCK_SIZE - tail, BLOCK_SIZE)):
            if from_ == to:
                continue
            block = self._unit.buffers.take(BLOCK_SIZE)
            try:
                yield partial(self._gate.read, start + at, block.view)
                buffer.view[at + from_ : at + to] = block.view[from_:to]
            finally:
                block.release()
        return None

    def _clear(self, offset: int, end: int, *, discard: bool) -> Script:
        """Make [offset, end) read as zeros: whole blocks by the device's own operations, the rest
        by writing zeros."""
        inner, outer = -(-offset // BLOCK_SIZE) * BLOCK_SIZE, end // BLOCK_SIZE * BLOCK_SIZE
        if inner > outer:  # inside one block
            yield from self._zero_piece(offset, end)
            return None
        if offset < inner:
            yield from self._zero_piece(offset, inner)
        stable = not self._unit.modes.write_cache
        for at, size in pieces(inner, outer - inner, self._gate.cluster_size * CLUSTERS_AT_ONCE):
            if discard:
                yield partial(self._gate.discard, at, size)
                self._unit.stats.unmapped_bytes += size
            else:
                yield partial(self._gate.write_zeroes, at, size, fua=stable)
        if outer < end:
            yield from self._zero_piece(outer, end)
        return None

    def _zero_piece(self, offset: int, end: int) -> Script:
        """Zero less than a block."""
        start, _ = _whole_blocks(offset, end - offset)
        stable = not self._unit.modes.write_cache
        block = self._unit.buffers.take(BLOCK_SIZE)
        try:
            yield partial(self._gate.read, start, block.view)
            block.view[offset - start : end - start] = bytes(end - offset)
            yield partial(self._gate.write, start, block.view, fua=stable)
        finally:
            block.release()
        return None

    def _flush(self) -> Script:
        yield self._gate.flush
        return None

    def _begin(
        self,
        script: Script,
        answer: Answer,
        start: int,
        end: int,
        *,
        exclusive: bool = False,
        buffer: Buffer | None = None,
    ) -> Operation | None:
        operation = Operation(self._device, script, answer, self._later, buffer)
        operation.begin(start, end, exclusive=exclusive)
        return None if operation.ended else operation

    def _count_read(self, size: int) -> None:
        self._unit.stats.reads += 1
        self._unit.stats.read_bytes += size

    def _count_write(self, size: int) -> None:
        self._unit.stats.writes += 1
        self._unit.stats.written_bytes += size


class Operation:
    """Drives one script: issues its device operations one after the other, and answers.

    `buffer` belongs to the script and is released after the answer.
    """

    __slots__ = (
        "_answer",
        "_answered",
        "_buffer",
        "_error",
        "_issuing",
        "_later",
        "_pending",
        "_script",
        "_task",
        "_unit",
        "_wanted",
        "ended",
    )

    def __init__(
        self,
        device: ServedDevice,
        script: Script,
        answer: Answer,
        later: Later,
        buffer: Buffer | None,
    ) -> None:
        self._unit = device.unit
        self._buffer = buffer
        self._script = script
        self._answer = answer
        self._later = later
        self._task = Task(tag=0, lun=0, cdb=_NO_CDB, on_complete=_nobody)
        self._pending: Pending | None = None
        self._wanted: Start | None = None
        self._issuing = False
        self._answered = False
        self._error: StorageError | None = None
        self.ended = False

    def begin(self, start: int, end: int, *, exclusive: bool) -> None:
        """Start as soon as the task set allows it; [start, end) is what it touches."""
        task = self._task
        task.range_start, task.range_end, task.exclusive = start, end, exclusive
        task.state = TaskState.RUNNING
        if exclusive:
            self._unit.settle()  # what initiators have under way must be seen
        self._unit.tasks.enter(task)
        self._unit.tasks.start(task, lambda task: self._go_on(None))

    def interrupt(self) -> None:
        """End it with EINTR if nothing of it is being executed; else it ends by itself."""
        if self.ended or (self._pending is not None and not self._pending.cancel()):
            return
        self._end(errno.EINTR, None)

    def _go_on(self, error: StorageError | None) -> None:
        """Issue operations until one has to be waited for, or the script ends."""
        deadline = self._unit.clock() + SLICE
        while not self.ended:
            if isinstance(error, ParkTimeoutError):
                self._later(RETRY_SECONDS, self._again)
                return
            if not self._advance(error) or not self._issue():
                return
            error = self._error
            if self._unit.clock() > deadline:
                self._later(0.0, partial(self._resume, error))
                return

    def _advance(self, error: StorageError | None) -> bool:
        """Take the next operation from the script; False when there is none."""
        try:
            self._wanted = next(self._script) if error is None else self._script.throw(error)
        except StopIteration as stop:
            self._end(0, stop.value)
        except StorageError as failure:
            self._unit.stats.errors += 1
            self._end(_file_errno(failure), None)
        return not self.ended

    def _issue(self) -> bool:
        """Start `_wanted`; True if it was answered at once."""
        assert self._wanted is not None
        self._issuing, self._answered = True, False
        pending = self._wanted(self._done)
        self._issuing = False
        self._pending = None if self._answered else pending
        return self._answered

    def _done(self, error: StorageError | None) -> None:
        self._error, self._answered = error, True
        if not self._issuing:
            self._pending = None
            self._resume(error)

    def _again(self) -> None:
        """Repeat what was answered BUSY: it was not executed."""
        if not self.ended:
            if self._issue():
                self._go_on(self._error)
            self._unit.device.kick()

    def _resume(self, error: StorageError | None) -> None:
        """Go on outside of a batch."""
        self._go_on(error)
        if not self.ended:
            self._unit.device.kick()

    def _end(self, number: int, value: Value) -> None:
        self.ended = True
        self._task.state = TaskState.ENDED
        self._script.close()
        self._answer(number, value)
        if self._buffer is not None:
            self._buffer.release()
        self._unit.tasks.leave(self._task)


def _whole_blocks(offset: int, size: int) -> tuple[int, int]:
    """The range of whole blocks that [offset, offset + size) touches."""
    start = offset // BLOCK_SIZE * BLOCK_SIZE
    return start, -(-(offset + size) // BLOCK_SIZE) * BLOCK_SIZE


def _file_errno(error: StorageError) -> int:
    """What a file operation fails with."""
    if error.errno in NO_ROOM:
        return errno.ENOSPC
    if error.errno == errno.ECANCELED:
        return errno.EINTR
    return error.errno if error.errno in errno.errorcode else errno.EIO


def _nobody(task: Task) -> None:
    """These tasks answer by their operation."""
