"""Commands that every device server has: identity, capacity, mode parameters, diagnostics.

Source: SPC-4 clause 6, SBC-3 5.15, 5.16 (READ CAPACITY), 5.25 (START STOP UNIT).  None of them
needs the storage, so all of them answer while it is away; stopping the unit and switching its
write cache off flush it.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from ploopd.scsi import inquiry as vpd
from ploopd.scsi import mode, transfer
from ploopd.scsi.cdb import BLOCK_SIZE, be16, be32, be64
from ploopd.scsi.execution import Script
from ploopd.scsi.mode import PageControl
from ploopd.scsi.sense import NO_SENSE, Asc, illegal_request, invalid_cdb_field
from ploopd.scsi.task import Task
from ploopd.scsi.unit_attention import UnitAttention

if TYPE_CHECKING:
    from ploopd.scsi.logical_unit import LogicalUnit

LLBAA = 0x10
DBD = 0x08
PMI = 0x01
MIN_REPORT_LUNS = 16


def test_unit_ready(unit: LogicalUnit, task: Task) -> bytes:
    return b""


def request_sense(unit: LogicalUnit, task: Task) -> bytes:
    """A pending unit attention goes out as data and is cleared by that (SPC-4 6.39)."""
    attention = task.itl.take_attention() if task.itl is not None else None
    sense = NO_SENSE if attention is None else attention.sense
    return sense.pack(descriptor_format=bool(task.cdb[1] & 1))


def check_inquiry(unit: LogicalUnit, task: Task) -> None:
    if not task.cdb[1] & 1 and task.cdb[2]:
        raise invalid_cdb_field(2)


def inquiry(unit: LogicalUnit, task: Task) -> bytes:
    if not task.cdb[1] & 1:
        return vpd.standard(unit.identity)
    port = task.nexus.target_port if task.nexus is not None else ""
    page = vpd.page(task.cdb[2], unit.identity, unit.provisioning, port)
    if page is None:
        raise invalid_cdb_field(2)
    return page


def check_capacity_10(unit: LogicalUnit, task: Task) -> None:
    """Without PMI the LBA must be 0 (SBC-3 5.15)."""
    if not task.cdb[8] & PMI and be32(task.cdb, 2):
        raise invalid_cdb_field(2)


def read_capacity_10(unit: LogicalUnit, task: Task) -> bytes:
    return struct.pack(">II", min(unit.blocks - 1, 0xFFFF_FFFF), BLOCK_SIZE)


def check_capacity_16(unit: LogicalUnit, task: Task) -> None:
    if not task.cdb[14] & PMI and be64(task.cdb, 2):
        raise invalid_cdb_field(2)


def read_capacity_16(unit: LogicalUnit, task: Task) -> bytes:
    """Thin provisioned units say LBPME and LBPRZ: unmapped blocks read as zeros."""
    provisioning = 0xC0 if unit.thin else 0
    return struct.pack(
        ">QIBBBB16x",
        unit.blocks - 1,
        BLOCK_SIZE,
        0,
        unit.provisioning.physical_exponent,
        provisioning,
        0,
    )


def check_report_luns(unit: LogicalUnit | None, task: Task) -> None:
    if task.cdb[2] > 2:
        raise invalid_cdb_field(2)
    if be32(task.cdb, 6) < MIN_REPORT_LUNS:
        raise invalid_cdb_field(6)


def report_luns(unit: LogicalUnit | None, task: Task) -> bytes:
    """The LUNs of the target; select report 01h (well known logical units) is empty."""
    nexus = task.nexus
    if nexus is None:
        return bytes(8)
    nexus.clear_attention(UnitAttention.LUNS_CHANGED)
    fields = [] if task.cdb[2] == 1 else [lun_field(lun) for lun in sorted(nexus.target.units)]
    return struct.pack(">Ixxxx", 8 * len(fields)) + b"".join(fields)


def lun_field(lun: int) -> bytes:
    """The 8-byte LUN: peripheral device addressing below 256, flat space above (SAM-5 4.7.7)."""
    return struct.pack(">H6x", lun if lun < 256 else 0x4000 | lun)


def mode_sense_6(unit: LogicalUnit, task: Task) -> bytes:
    return _mode_sense(unit, task, long_header=False)


def mode_sense_10(unit: LogicalUnit, task: Task) -> bytes:
    return _mode_sense(unit, task, long_header=True)


def _mode_sense(unit: LogicalUnit, task: Task, *, long_header: bool) -> bytes:
    cdb = task.cdb
    control = PageControl(cdb[2] >> 6)
    if control is PageControl.SAVED:
        raise illegal_request(Asc.SAVING_PARAMETERS_NOT_SUPPORTED)
    code, subcode = cdb[2] & 0x3F, cdb[3]
    body = mode.pages(unit.modes, control, code, subcode)
    if body is None:
        raise invalid_cdb_field(3 if subcode and code in mode.PAGES else 2)
    long_lba = long_header and bool(cdb[1] & LLBAA)
    descriptor = b"" if cdb[1] & DBD else mode.block_descriptor(unit.blocks, long_lba=long_lba)
    device = mode.DPOFUA | (mode.WP if unit.write_protection() is not None else 0)
    if not long_header:
        length = 3 + len(descriptor) + len(body)
        return bytes([length, 0, device, len(descriptor)]) + descriptor + body
    length = 6 + len(descriptor) + len(body)
    head = struct.pack(">HBBBBH", length, 0, device, int(long_lba), 0, len(descriptor))
    return head + descriptor + body


def mode_list_6(unit: LogicalUnit, task: Task) -> int:
    return task.cdb[4]


def mode_list_10(unit: LogicalUnit, task: Task) -> int:
    return be16(task.cdb, 7)


def check_mode_select(unit: LogicalUnit, task: Task) -> None:
    """Nothing is saved: SP must be 0.  PF does not matter, there are no other pages."""
    if task.cdb[1] & 1:
        raise invalid_cdb_field(1, 0)


def mode_select_6(unit: LogicalUnit, task: Task) -> bytes | Script:
    data = task.data_out[: task.data_out_length]
    if not data:
        return b""
    if len(data) < 4:
        raise illegal_request(Asc.PARAMETER_LIST_LENGTH_ERROR)
    return _mode_select(unit, task, data, header=4, descriptor=data[3], long_lba=False)


def mode_select_10(unit: LogicalUnit, task: Task) -> bytes | Script:
    data = task.data_out[: task.data_out_length]
    if not data:
        return b""
    if len(data) < 8:
        raise illegal_request(Asc.PARAMETER_LIST_LENGTH_ERROR)
    long_lba = bool(data[4] & 1)
    return _mode_select(unit, task, data, header=8, descriptor=be16(data, 6), long_lba=long_lba)


def _mode_select(
    unit: LogicalUnit,
    task: Task,
    data: memoryview,
    *,
    header: int,
    descriptor: int,
    long_lba: bool,
) -> bytes | Script:
    start = header + descriptor
    if descriptor not in (0, 16 if long_lba else 8):
        raise illegal_request(Asc.PARAMETER_LIST_LENGTH_ERROR)
    if start > len(data):
        raise illegal_request(Asc.PARAMETER_LIST_LENGTH_ERROR)
    if descriptor:
        mode.check_block_descriptor(data[header:start], header, unit.blocks)
    cached = unit.modes.write_cache
    if mode.select(unit.modes, data[start:], start):
        unit.modes_changed(task.itl)
    if cached and not unit.modes.write_cache:
        # From now on nobody sends SYNCHRONIZE CACHE for what was written before (SBC-3 6.4.5).
        return transfer.flush(unit)
    return b""


def check_start_stop(unit: LogicalUnit, task: Task) -> None:
    """No power conditions, no removable medium."""
    if task.cdb[4] & 0xF0:
        raise invalid_cdb_field(4, 7)
    if task.cdb[4] & 0x02:
        raise invalid_cdb_field(4, 1)


def start_stop_unit(unit: LogicalUnit, task: Task) -> bytes | Script:
    """Stopping flushes, unless NO_FLUSH says otherwise.  The unit stays ready: a virtual disk that
    several initiators share does not spin down for one of them."""
    if task.cdb[4] & 0x01 or task.cdb[4] & 0x04:
        return b""
    return transfer.flush(unit)


def send_diagnostic(unit: LogicalUnit, task: Task) -> bytes:
    """The default self-test, which passes: there is nothing to test that I/O does not test."""
    return b""
