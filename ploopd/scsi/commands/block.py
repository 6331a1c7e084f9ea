"""READ, WRITE, VERIFY, SYNCHRONIZE CACHE and their kin.

Source: SBC-3 clause 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ploopd.errors import StorageError
from ploopd.scsi import transfer
from ploopd.scsi.cdb import BLOCK_SIZE
from ploopd.scsi.execution import ISSUING, Script
from ploopd.scsi.failures import Access
from ploopd.scsi.sense import invalid_cdb_field, miscompare
from ploopd.scsi.task import Task, TaskState
from ploopd.storage.device import ExtentKind

if TYPE_CHECKING:
    from ploopd.scsi.logical_unit import LogicalUnit

FUA = 0x08
IMMED = 0x02
MAP_PIECE = 1 << 30
"""Bytes whose map is looked at in one go."""


def has_fua(task: Task) -> bool:
    return task.command is not None and task.command.fua and bool(task.cdb[1] & FUA)


def byte_check(task: Task) -> int:
    """BYTCHK: bits 2-1 of byte 1 (SBC-3 5.31)."""
    return task.cdb[1] >> 1 & 3


def blocks_of_data(unit: LogicalUnit, task: Task) -> int:
    """Data-out of the WRITE commands: all blocks of the range."""
    return task.range_end - task.range_start


def read(unit: LogicalUnit, task: Task) -> bytes | Script | None:
    """READ: straight into the buffer that the transport sends from."""
    length = task.range_end - task.range_start
    if length == 0:
        return b""
    if has_fua(task):
        return read_through(unit, task)
    view = unit.take_data_in(task, length)

    def done(error: StorageError | None) -> None:
        unit.transferred(task, error, Access.READ)

    unit.stats.reads += 1
    unit.stats.read_bytes += length
    task.pending = ISSUING
    pending = unit.device.read(task.range_start, view, done)
    if task.state is TaskState.RUNNING:
        task.pending = pending
    return None


def read_through(unit: LogicalUnit, task: Task) -> Script:
    """READ with FUA: what is in the volatile cache goes to the medium first (SBC-3 5.11)."""
    yield from transfer.flush(unit)
    view = unit.take_data_in(task, task.range_end - task.range_start)
    yield from transfer.read(unit, task.range_start, view)
    unit.stats.reads += 1
    unit.stats.read_bytes += len(view)


def write(unit: LogicalUnit, task: Task) -> bytes | Script | None:
    """WRITE: straight from the buffer that the transport received into."""
    data = task.data_out[: task.data_out_length]
    length = len(data)
    if length == 0:
        return b""
    if length % BLOCK_SIZE:
        return write_partly(unit, task)

    def done(error: StorageError | None) -> None:
        unit.transferred(task, error, Access.WRITE)

    unit.stats.writes += 1
    unit.stats.written_bytes += length
    stable = has_fua(task) or not unit.modes.write_cache
    task.pending = ISSUING
    pending = unit.device.write(task.range_start, data, done, fua=stable)
    if task.state is TaskState.RUNNING:
        task.pending = pending
    return None


def write_partly(unit: LogicalUnit, task: Task) -> Script:
    """A WRITE for which the transport brings a piece of a block: the rest of it stays."""
    data = task.data_out[: task.data_out_length]
    whole = -(-len(data) // BLOCK_SIZE) * BLOCK_SIZE
    buffer = unit.buffers.take(whole)
    try:
        yield from transfer.read(unit, task.range_start, buffer.view)
        buffer.view[: len(data)] = data
        fua = has_fua(task)
        yield from transfer.write(unit, task.range_start, buffer.view, fua=fua)
    finally:
        buffer.release()
    unit.stats.writes += 1
    unit.stats.written_bytes += len(data)


def check_write_and_verify(unit: LogicalUnit, task: Task) -> None:
    """Only BYTCHK 00b and 01b are defined (SBC-3 5.38)."""
    if byte_check(task) > 1:
        raise invalid_cdb_field(1, 2)


def write_and_verify(unit: LogicalUnit, task: Task) -> Script:
    """Write to the medium, then read it back: any medium error is found now."""
    data = task.data_out[: task.data_out_length]
    data = data[: len(data) - len(data) % BLOCK_SIZE]
    tail = len(task.data_out[: task.data_out_length]) % BLOCK_SIZE
    if tail:
        yield from write_partly(unit, task)
    elif data:
        yield from transfer.write(unit, task.range_start, data, fua=True)
        unit.stats.writes += 1
        unit.stats.written_bytes += len(data)
    expected = data if byte_check(task) == 1 else None
    yield from compare(unit, task.range_start, len(data), expected)


def verify_data(unit: LogicalUnit, task: Task) -> int:
    """Data-out of VERIFY: nothing, all blocks, or one block, by BYTCHK."""
    match byte_check(task):
        case 1:
            length = task.range_end - task.range_start
            unit.check_transfer_length(task, length)
            return length
        case 3:
            return BLOCK_SIZE if task.range_end > task.range_start else 0
    return 0


def check_verify(unit: LogicalUnit, task: Task) -> None:
    if byte_check(task) == 2:
        raise invalid_cdb_field(1, 2)


def verify(unit: LogicalUnit, task: Task) -> Script:
    """VERIFY: read what is there and compare it with what was sent, if BYTCHK asks for it."""
    length = task.range_end - task.range_start
    match byte_check(task):
        case 1:
            yield from compare(unit, task.range_start, length, task.data_out[:length])
        case 3 if length:
            block = bytes(task.data_out[:BLOCK_SIZE])
            data = memoryview(block * (min(length, transfer.CHUNK) // BLOCK_SIZE))
            for at, size in transfer.pieces(task.range_start, length, transfer.CHUNK):
                yield from compare(unit, at, size, data[:size], period=BLOCK_SIZE)
        case _:
            yield from check_medium(unit, task.range_start, length)


def check_medium(unit: LogicalUnit, offset: int, length: int) -> Script:
    """Read the blocks of a range that have data; holes cannot be bad."""
    for at, size in transfer.pieces(offset, length, MAP_PIECE):
        for part in list(unit.device.extents(at, size)):  # the map may change while we read
            if part.kind is ExtentKind.DATA:
                yield from compare(unit, part.offset, part.length, None)


def compare(
    unit: LogicalUnit,
    offset: int,
    length: int,
    expected: memoryview | None,
    *,
    period: int | None = None,
) -> Script:
    """Read a range and raise MISCOMPARE where it differs from `expected` (None: anything); the
    position is counted modulo `period`, the length of a data-out that repeats."""
    if length == 0:
        return
    buffer = unit.buffers.take(min(length, transfer.CHUNK))
    try:
        for at, size in transfer.pieces(offset, length, transfer.CHUNK):
            view = buffer.view[:size]
            yield from transfer.read(unit, at, view)
            if expected is not None:
                check_equal(view, expected[at - offset :][:size], at - offset, period)
    finally:
        buffer.release()


def check_equal(
    actual: memoryview, expected: memoryview, position: int, period: int | None = None
) -> None:
    """Raise MISCOMPARE with the byte offset of the first difference; byte 0 is at `position`."""
    if actual == expected:
        return
    one, other = bytes(actual), bytes(expected)
    differs = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    where = position + differs
    raise miscompare(where if period is None else where % period)


def synchronize_cache(unit: LogicalUnit, task: Task) -> bytes | Script:
    """SYNCHRONIZE CACHE: always the whole cache.  With IMMED the status does not wait; should that
    flush fail, the next one, or the gate, reports it."""
    if task.cdb[1] & IMMED:
        unit.device.flush(lambda error: None)
        return b""
    return transfer.flush(unit)


def prefetch(unit: LogicalUnit, task: Task) -> bytes:
    """PRE-FETCH: the cache is the page cache, which reads ahead by itself.  Answering CONDITION MET
    would promise that the blocks are there (SBC-3 5.8)."""
    return b""


def read_defect_data_10(unit: LogicalUnit, task: Task) -> bytes:
    """An empty list in the requested format (SBC-3 5.14)."""
    return bytes([0, task.cdb[2] & 0x1F, 0, 0])


def read_defect_data_12(unit: LogicalUnit, task: Task) -> bytes:
    return bytes([0, task.cdb[1] & 0x1F, 0, 0, 0, 0, 0, 0])
