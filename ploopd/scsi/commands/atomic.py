"""COMPARE AND WRITE and ORWRITE: read, decide, write, with nobody in between.

Source: SBC-3 5.2, 5.24.  The range of the task is exclusive in its logical unit while it runs
(`task_set`), which is what makes these atomic for every front end and nexus.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ploopd.scsi import transfer
from ploopd.scsi.cdb import BLOCK_SIZE
from ploopd.scsi.commands.block import check_equal, has_fua
from ploopd.scsi.execution import Script
from ploopd.scsi.inquiry import MAX_COMPARE_AND_WRITE_BLOCKS
from ploopd.scsi.sense import invalid_cdb_field
from ploopd.scsi.task import Task

if TYPE_CHECKING:
    from ploopd.scsi.logical_unit import LogicalUnit


def check_compare_and_write(unit: LogicalUnit, task: Task) -> None:
    """A count of 0 together with whole pairs of blocks is one that did not fit: 256 and more."""
    lost = task.cdb[13] == 0 and (task.expected_out or 0) >= 2 * BLOCK_SIZE
    if lost or task.cdb[13] > MAX_COMPARE_AND_WRITE_BLOCKS:
        raise invalid_cdb_field(13)


def compare_and_write_data(unit: LogicalUnit, task: Task) -> int:
    """The blocks to compare with, then the blocks to write."""
    return 2 * (task.range_end - task.range_start)


def compare_and_write(unit: LogicalUnit, task: Task) -> bytes | Script:
    if task.range_start == task.range_end:
        return b""
    return _compare_and_write(unit, task)


def _compare_and_write(unit: LogicalUnit, task: Task) -> Script:
    length = task.range_end - task.range_start
    buffer = unit.buffers.take(length)
    try:
        yield from transfer.read(unit, task.range_start, buffer.view)
        check_equal(buffer.view, task.data_out[:length], 0)
    finally:
        buffer.release()
    data = task.data_out[length : 2 * length]
    yield from transfer.write(unit, task.range_start, data, fua=has_fua(task))
    unit.stats.writes += 1
    unit.stats.written_bytes += length


def or_write(unit: LogicalUnit, task: Task) -> bytes | Script:
    data = task.data_out[: task.data_out_length]
    return _or_write(unit, task, data) if data else b""


def _or_write(unit: LogicalUnit, task: Task, data: memoryview) -> Script:
    whole = -(-len(data) // BLOCK_SIZE) * BLOCK_SIZE
    buffer = unit.buffers.take(whole)
    try:
        yield from transfer.read(unit, task.range_start, buffer.view)
        merged = int.from_bytes(buffer.view[: len(data)], "big") | int.from_bytes(data, "big")
        buffer.view[: len(data)] = merged.to_bytes(len(data), "big")
        yield from transfer.write(unit, task.range_start, buffer.view, fua=has_fua(task))
    finally:
        buffer.release()
    unit.stats.writes += 1
    unit.stats.written_bytes += len(data)
