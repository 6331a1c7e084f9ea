"""Plain READs and WRITEs that wait for the storage without being tasks.

A `LaneCommand` is what the fast path makes of a command that cannot complete at once and is one
piece of one file (`ploopd.fileio.lane`).  Its response is written by the completion itself.
Objects and buffers are used again.
"""

from __future__ import annotations

import struct
from functools import partial
from typing import Final

from ploopd.frontends.iscsi.command import Command
from ploopd.frontends.iscsi.commands import Commands
from ploopd.frontends.iscsi.flow import Flow
from ploopd.frontends.iscsi.pdu import FINAL, RESERVED_TAG, RESPONSE, SERIAL_MASK, Opcode
from ploopd.frontends.iscsi.transmit import COPY_LIMIT
from ploopd.scsi.cdb import BLOCK_SHIFT
from ploopd.scsi.nexus import ItlNexus
from ploopd.storage.lane import LaneRequest

MOST_LENGTH: Final = 256 << 10
"""Longer transfers go the ordinary way: for them its cost does not count."""

CACHED: Final = 1 << 20
"""Bytes of buffers that a connection keeps for its next commands."""

_READ_16: Final = 0x88
_WRITE_16: Final = 0x8A
_CDB_16: Final = struct.Struct(">BBQIBB")
_GOOD: Final = FINAL | 1
_pack: Final = RESPONSE.pack_into


class LaneCommand(LaneRequest):
    """One command of `lane`; `task_tag`, `lun` and `flags` are its PDU's."""

    __slots__ = ("flags", "itl", "lane", "lun", "task_tag", "view")

    def __init__(self, lane: Lane, length: int) -> None:
        self.lane = lane
        self.length = length
        self.buffer = lane.flow.buffers.take(length)
        self.view = self.buffer.view
        self.task_tag = 0
        self.lun = 0
        self.flags = 0
        self.itl: ItlNexus

    def completed(self) -> None:
        self.lane.completed(self)

    def promote(self) -> None:
        self.lane.promote(self)


class Lane:
    """The commands of one connection that are in the lane: `flow.lane`, by initiator task tag."""

    __slots__ = ("_cached", "_closed", "_commands", "_free", "flow")

    def __init__(self, flow: Flow, commands: Commands) -> None:
        self.flow = flow
        self._commands = commands
        self._free: dict[int, list[LaneCommand]] = {}
        self._cached = 0
        self._closed = False

    def start(
        self,
        itl: ItlNexus,
        offset: int,
        length: int,
        lun: int,
        flags: int,
        tag: int,
        data: memoryview | None,
    ) -> bool:
        """Begin a plain READ, or a WRITE of `data` (copied), of a range that the unit has checked.

        False, and nothing has happened: it must go another way.
        """
        flow = self.flow
        tx = flow.tx
        if not itl.lane.usable or tx.exp_cmd_sn == tx.max_cmd_sn:
            return False  # the fast path looks at the command window only as it begins
        if length > MOST_LENGTH or (data is None and length > flow.parameters.data_in_limit):
            return False
        free = self._free.get(length)
        if free:
            command = free.pop()
            self._cached -= length
        else:
            command = LaneCommand(self, length)
        command.offset = offset
        if data is None:
            command.writing = False
        else:
            command.writing = True
            command.view[:] = data
        if not itl.begin(command):
            self._recycle(command)
            return False
        command.itl = itl
        command.lun = lun
        command.flags = flags
        command.task_tag = tag
        flow.lane[tag] = command
        tx.exp_cmd_sn = (tx.exp_cmd_sn + 1) & SERIAL_MASK
        return True

    def completed(self, command: LaneCommand) -> None:
        """Answer GOOD."""
        flow = self.flow
        command.itl.lane.ended(command)
        tag = command.task_tag
        del flow.lane[tag]
        tx = flow.tx
        tx.max_cmd_sn = max_cmd_sn = (tx.max_cmd_sn + 1) & SERIAL_MASK
        op = tx.op
        if command.writing:
            length, data_end, opcode, flags = 0, op + 48, Opcode.SCSI_RESPONSE, FINAL
        else:
            length, opcode, flags = command.length, Opcode.DATA_IN, _GOOD
            data_end = op + 48 + length
        if length > COPY_LIMIT or data_end > tx.size:
            self._answer_apart(command)
            return
        stat_sn = tx.stat_sn
        _pack(
            tx.arena,
            op,
            opcode,
            flags,
            0,
            0,
            length,
            0,
            tag,
            RESERVED_TAG if length else 0,
            stat_sn,
            tx.exp_cmd_sn,
            max_cmd_sn,
            0,
            0,
            0,
        )
        if length:
            tx.arena[op + 48 : data_end] = command.view
        tx.stat_sn = (stat_sn + 1) & SERIAL_MASK
        tx.op = data_end
        self._recycle(command)
        if op == tx.start and not flow.busy:  # what waits already is going to be sent
            flow.touch()

    def _answer_apart(self, command: LaneCommand) -> None:
        """The same when the answer does not go into the arena: its buffer is sent."""
        tx, tag = self.flow.tx, command.task_tag
        if command.writing:
            tx.emit(Opcode.SCSI_RESPONSE, FINAL, tag=tag, word20=0)
            self._recycle(command)
        else:
            tx.emit_data_in(
                flags=_GOOD,
                status=0,
                tag=tag,
                data_sn=0,
                offset=0,
                residual=0,
                data=command.view,
                release=partial(self._recycle, command),
            )
        self.flow.touch()

    def promote(self, command: LaneCommand) -> None:
        """Make a task of it; nobody can tell afterwards that it was not one from the start."""
        flow, tag, length = self.flow, command.task_tag, command.length
        opcode = _WRITE_16 if command.writing else _READ_16
        first, count = command.offset >> BLOCK_SHIFT, length >> BLOCK_SHIFT
        cdb = _CDB_16.pack(opcode, 0, first, count, 0, 0)
        ordinary = Command(tag, command.lun, command.flags, length, cdb)
        task = self._commands.make_task(ordinary, cdb, length if command.writing else 0)
        flow.budget.force(ordinary, length)
        if command.writing:
            ordinary.wanted = ordinary.received = length
            ordinary.buffer = flow.buffers.take(length)
            task.data_out = ordinary.buffer.view
            task.data_out[:] = command.view
        del flow.lane[tag]
        flow.commands[tag] = ordinary
        command.itl.adopt(task, command)

    def _recycle(self, command: LaneCommand) -> None:
        length = command.length
        if self._cached + length > CACHED or self._closed:
            command.buffer.release()
            return
        self._cached += length
        free = self._free.get(length)
        if free is None:
            self._free[length] = [command]
        else:
            free.append(command)

    def close(self) -> None:
        """Give the buffers back, now or when their commands have ended."""
        self._closed = True
        free, self._free = self._free, {}
        for commands in free.values():
            for command in commands:
                command.buffer.release()
