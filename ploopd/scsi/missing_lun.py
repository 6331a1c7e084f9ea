"""What a LUN without a logical unit answers.

Source: SPC-4 6.6.2 (INQUIRY), SAM-5 5.13 (incorrect logical unit numbers): INQUIRY says that
nothing is there, REPORT LUNS says what is, REQUEST SENSE explains, all else fails with 05/25/00.
"""

from __future__ import annotations

from ploopd.scsi import inquiry
from ploopd.scsi.commands import primary
from ploopd.scsi.commands.table import COMMANDS, CommandSet
from ploopd.scsi.sense import Asc, CheckCondition, Sense, SenseKey, illegal_request
from ploopd.scsi.task import Direction, Status, Task

INQUIRY, REPORT_LUNS, REQUEST_SENSE = 0x12, 0xA0, 0x03
NOT_SUPPORTED = Sense(SenseKey.ILLEGAL_REQUEST, Asc.LOGICAL_UNIT_NOT_SUPPORTED)


class MissingLun:
    """Stands in for a logical unit that does not exist."""

    def __init__(self) -> None:
        answered = {INQUIRY, REPORT_LUNS, REQUEST_SENSE}
        self._commands = CommandSet(row for row in COMMANDS if row.opcode in answered)

    def answer(self, task: Task) -> None:
        """Complete `task`."""
        try:
            data = self._data(task)
        except CheckCondition as condition:
            task.finish(Status.CHECK_CONDITION, condition.sense.pack(descriptor_format=False))
            return
        task.data_in = memoryview(data)
        task.direction = Direction.TO_INITIATOR
        task.finish(Status.GOOD)

    def _data(self, task: Task) -> bytes:
        cdb = task.cdb
        row = self._commands.row(cdb[0], None)
        if row is None:
            raise CheckCondition(NOT_SUPPORTED)
        row.check_reserved(cdb)
        match cdb[0]:
            case 0x12:
                if cdb[1] & 1 or cdb[2]:
                    raise illegal_request(Asc.LOGICAL_UNIT_NOT_SUPPORTED)
                data = inquiry.standard(None)
            case 0xA0:
                primary.check_report_luns(None, task)
                data = primary.report_luns(None, task)
            case _:
                data = NOT_SUPPORTED.pack(descriptor_format=bool(cdb[1] & 1))
        return data[: row.allocation_length(cdb)]
