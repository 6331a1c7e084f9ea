"""UNMAP, WRITE SAME and GET LBA STATUS: logical block provisioning.

Source: SBC-3 4.7 (logical block provisioning), 5.35, 5.40, 5.45 (the commands).
"""

from __future__ import annotations

import struct
from itertools import islice
from typing import TYPE_CHECKING

from ploopd.scsi import transfer
from ploopd.scsi.cdb import BLOCK_SHIFT, BLOCK_SIZE, be16, be32, be64
from ploopd.scsi.execution import Script
from ploopd.scsi.inquiry import MAX_UNMAP_BLOCKS, MAX_UNMAP_DESCRIPTORS, MAX_WRITE_SAME_BLOCKS
from ploopd.scsi.sense import Asc, illegal_request, invalid_cdb_field, invalid_parameter
from ploopd.scsi.task import Task
from ploopd.storage.device import ExtentKind

if TYPE_CHECKING:
    from ploopd.scsi.logical_unit import LogicalUnit

UNMAP = 0x08
NDOB = 0x01
WRITE_SAME_16 = 0x93
MAPPED, DEALLOCATED = 0, 1
MAX_STATUS_DESCRIPTORS = 1024
MAX_STATUS_BLOCKS = 0xFFFF_FFFF
MAX_STATUS_EXTENTS = 8192
"""Extents looked at for one command: a fragmented image has millions, which take seconds."""


def no_data_out(task: Task) -> bool:
    """NDOB of WRITE SAME(16), or UNMAP without a block from the initiator: zeros are meant."""
    if task.cdb[0] == WRITE_SAME_16 and task.cdb[1] & NDOB:
        return True
    return bool(task.cdb[1] & UNMAP) and task.expected_out == 0


def check_write_same(unit: LogicalUnit, task: Task) -> None:
    """At least one block (WSNZ = 1), at most MAXIMUM WRITE SAME LENGTH (SBC-3 5.45)."""
    blocks = (task.range_end - task.range_start) >> BLOCK_SHIFT
    if not 0 < blocks <= MAX_WRITE_SAME_BLOCKS:
        assert task.command is not None
        raise invalid_cdb_field(task.command.length_byte)


def write_same_data(unit: LogicalUnit, task: Task) -> int:
    return 0 if no_data_out(task) else BLOCK_SIZE


def write_same(unit: LogicalUnit, task: Task) -> Script:
    """Write one block everywhere.  Zeros are never written out; with UNMAP their clusters are given
    back, which is allowed because unmapped blocks read as zeros (LBPRZ = 1)."""
    length = task.range_end - task.range_start
    block = bytes(task.data_out[:BLOCK_SIZE]) if task.data_out_length else bytes(BLOCK_SIZE)
    if not any(block):
        unmap = bool(task.cdb[1] & UNMAP)
        return transfer.zero(unit, task.range_start, length, unmap=unmap)
    return write_pattern(unit, task.range_start, length, block)


def write_pattern(unit: LogicalUnit, offset: int, length: int, block: bytes) -> Script:
    buffer = unit.buffers.take(min(length, transfer.CHUNK))
    try:
        view = buffer.view
        view[:] = block * (len(view) // BLOCK_SIZE)
        for at, size in transfer.pieces(offset, length, transfer.CHUNK):
            yield from transfer.write(unit, at, view[:size], fua=False)
    finally:
        buffer.release()
    unit.stats.writes += 1
    unit.stats.written_bytes += length


def check_unmap(unit: LogicalUnit, task: Task) -> None:
    """The ranges are known too late to wait for single blocks: an exclusive range anywhere makes
    the command wait, as if it covered the whole unit."""
    task.range_end = unit.blocks << BLOCK_SHIFT


def unmap_list_length(unit: LogicalUnit, task: Task) -> int:
    return be16(task.cdb, 7)


def unmap(unit: LogicalUnit, task: Task) -> bytes | Script:
    """Deallocate the ranges of the parameter list, after all of them have been checked."""
    data = task.data_out[: task.data_out_length]
    if not data:
        return b""
    ranges = unmap_ranges(unit, data)
    return unmap_all(unit, ranges) if ranges else b""


def unmap_ranges(unit: LogicalUnit, data: memoryview) -> list[tuple[int, int]]:
    """(offset, length) in bytes of the descriptors that say anything (SBC-3 5.40.2)."""
    if len(data) < 8:
        raise illegal_request(Asc.PARAMETER_LIST_LENGTH_ERROR)
    size = min(be16(data, 2), len(data) - 8) // 16 * 16
    if size // 16 > MAX_UNMAP_DESCRIPTORS:
        raise invalid_parameter(2)
    ranges: list[tuple[int, int]] = []
    total = 0
    for at in range(8, 8 + size, 16):
        lba, count = be64(data, at), be32(data, at + 8)
        if lba + count > unit.blocks:
            raise illegal_request(Asc.LOGICAL_BLOCK_ADDRESS_OUT_OF_RANGE)
        total += count
        if total > MAX_UNMAP_BLOCKS:
            raise invalid_parameter(at + 8)
        if count:
            ranges.append((lba << BLOCK_SHIFT, count << BLOCK_SHIFT))
    return ranges


def unmap_all(unit: LogicalUnit, ranges: list[tuple[int, int]]) -> Script:
    for offset, length in ranges:
        yield from transfer.discard(unit, offset, length)
    unit.stats.unmapped_bytes += sum(length for _, length in ranges)
    if not unit.modes.write_cache:
        yield from transfer.flush(unit)


def lba_only(cdb: bytes) -> tuple[int, int]:
    """GET LBA STATUS: the LBA itself must exist."""
    return be64(cdb, 2), 1


def get_lba_status(unit: LogicalUnit, task: Task) -> bytes:
    """The map from the requested LBA on, as much as fits; the first descriptor starts there."""
    room = min(max((be32(task.cdb, 10) - 8) // 16, 1), MAX_STATUS_DESCRIPTORS)
    rows = status_rows(unit, task.range_start, room)
    body = b"".join(struct.pack(">QIBxxx", lba, count, kind) for lba, count, kind in rows)
    return struct.pack(">Ixxxx", 4 + len(body)) + body


def status_rows(unit: LogicalUnit, offset: int, room: int) -> list[tuple[int, int, int]]:
    """At most `room` rows (LBA, blocks, provisioning status) without equal neighbours.  The last
    one may end before its status changes; whoever asks goes on from there."""
    length = min((unit.blocks << BLOCK_SHIFT) - offset, MAX_STATUS_BLOCKS << BLOCK_SHIFT)
    rows: list[tuple[int, int, int]] = []
    for part in islice(unit.device.extents(offset, length), MAX_STATUS_EXTENTS):
        status = DEALLOCATED if part.kind is ExtentKind.HOLE else MAPPED
        lba, count = part.offset >> BLOCK_SHIFT, part.length >> BLOCK_SHIFT
        if rows and rows[-1][2] == status:
            rows[-1] = rows[-1][0], rows[-1][1] + count, status
        elif len(rows) == room:
            break
        else:
            rows.append((lba, count, status))
    return rows
