"""REPORT SUPPORTED OPERATION CODES and REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS.

Source: SPC-4 6.35, 6.36.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from ploopd.scsi.cdb import be16
from ploopd.scsi.sense import invalid_cdb_field
from ploopd.scsi.task import Task

if TYPE_CHECKING:
    from ploopd.scsi.commands.command import Command
    from ploopd.scsi.logical_unit import LogicalUnit

RCTD = 0x80
REPD = 0x80
ALL, OPERATION_CODE, SERVICE_ACTION, EITHER = 0, 1, 2, 3
NOT_SUPPORTED, SUPPORTED = 1, 3
TIMEOUTS = struct.pack(">HxxII", 0x000A, 0, 0)
"""Command timeouts descriptor without a nominal or recommended time."""


def check_supported_opcodes(unit: LogicalUnit, task: Task) -> None:
    if task.cdb[2] & 7 > EITHER:
        raise invalid_cdb_field(2, 2)


def supported_opcodes(unit: LogicalUnit, task: Task) -> bytes:
    timeouts = bool(task.cdb[2] & RCTD)
    if task.cdb[2] & 7 == ALL:
        return _all(unit, timeouts)
    return _one(unit, task, timeouts)


def _all(unit: LogicalUnit, timeouts: bool) -> bytes:
    tail = TIMEOUTS if timeouts else b""
    rows = [
        struct.pack(
            ">BxHxBH",
            row.opcode,
            row.service_action or 0,
            int(timeouts) << 1 | int(row.service_action is not None),
            row.length,
        )
        + tail
        for row in unit.commands
    ]
    body = b"".join(rows)
    return struct.pack(">I", len(body)) + body


def _one(unit: LogicalUnit, task: Task, timeouts: bool) -> bytes:
    row = _find(unit, task.cdb)
    if row is None:
        return struct.pack(">xBH", NOT_SUPPORTED, 0)
    support = SUPPORTED | (0x80 if timeouts else 0)
    tail = TIMEOUTS if timeouts else b""
    return struct.pack(">xBH", support, row.length) + row.usage + tail


def _find(unit: LogicalUnit, cdb: bytes) -> Command | None:
    """The row asked for; raises 05/24/00 when the question does not fit the operation code."""
    option, opcode, action = cdb[2] & 7, cdb[3], be16(cdb, 4)
    has_actions = unit.commands.has_service_actions(opcode)
    if has_actions is None:
        return None
    if option == OPERATION_CODE and has_actions:
        raise invalid_cdb_field(2, 2)
    if option == SERVICE_ACTION and not has_actions:
        raise invalid_cdb_field(2, 2)
    if not has_actions:
        wrong = option == EITHER and action != 0
        return None if wrong else unit.commands.row(opcode, None)
    return unit.commands.row(opcode, action)


def supported_functions(unit: LogicalUnit, task: Task) -> bytes:
    """ATS, ATSS, CTSS, LURS, QTS, TRS; QTSS, ITNRS."""
    if task.cdb[2] & REPD:
        return bytes([0xDE, 0x03, 0, 0x0C]) + bytes(12)
    return bytes([0xDE, 0x03, 0, 0])
