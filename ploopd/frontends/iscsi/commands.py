"""SCSI commands off the fast path: from the command PDU to the response (RFC 7143 11.3-11.4)."""

from __future__ import annotations

from functools import partial
from typing import Final

from ploopd.frontends.iscsi.command import OVERFLOW, UNDERFLOW, Command
from ploopd.frontends.iscsi.data_out import DataOut
from ploopd.frontends.iscsi.flow import Flow, TransportAsc, aborted_command_sense
from ploopd.frontends.iscsi.pdu import (
    FINAL,
    RESERVED_TAG,
    SERIAL_MASK,
    Opcode,
    RejectReason,
    Request,
    extended_cdb,
)
from ploopd.scsi.nexus import ItlNexus, Nexus
from ploopd.scsi.task import Attribute, Direction, Status, Task, TaskState
from ploopd.scsi.task_management import TaskFunction, TmfResult

_SMALL_ANSWER: Final = 4096
"""What a data-in command without an LBA range is assumed to take."""


class Commands:
    """Executes SCSI commands as tasks, and writes with a data phase of their own."""

    def __init__(self, flow: Flow, nexus: Nexus) -> None:
        self._flow = flow
        self._nexus = nexus
        self.data_out = DataOut(flow, self)

    # -- the command PDU

    def start(self, request: Request) -> None:
        """Take a SCSI Command PDU whose CmdSN has been accepted."""
        flow = self._flow
        reason = self._unacceptable(request)
        if reason is not None:
            flow.reject(request, reason)
            if not request.immediate:
                flow.open_window()
            return
        cdb = bytes(request.bhs[32:48])
        if request.ahs:
            cdb += extended_cdb(request.ahs)
        command = Command(
            request.tag,
            request.lun,
            request.flags,
            request.word20,
            cdb,
            counted=not request.immediate,
        )
        flow.enter(command)
        error = self._data_rules(command, len(request.data))
        if error is not None:
            self.fail(command, error)
        elif not self._start_stream(command, request.data):
            if command.attribute == Attribute.ORDERED:
                self._break_streams(command.lun)
            self._start_task(command, request.data)

    def start_plain(
        self, itl: ItlNexus, offset: int, command: Command, data: memoryview | None = None
    ) -> bool:
        """A plain READ or WRITE that cannot complete at once, without the general way's questions:
        the fast path has asked them.  `data` is copied.  False, and nothing has happened: it must
        go that way after all.
        """
        flow = self._flow
        length = command.expected
        if flow.tx.exp_cmd_sn == flow.tx.max_cmd_sn:
            return False  # it closes the command window, which the fast path looks at as it begins
        if not flow.budget.try_reserve(command, length):
            return False
        task = self.make_task(command, command.cdb, 0 if data is None else length)
        if data is not None:
            command.wanted = command.received = length
            command.buffer = flow.buffers.take(length)
            task.data_out = command.buffer.view
            task.data_out[:] = data
        flow.commands[command.tag] = command
        flow.tx.exp_cmd_sn = (flow.tx.exp_cmd_sn + 1) & SERIAL_MASK
        itl.start(task, offset, length)
        return True

    def _unacceptable(self, request: Request) -> RejectReason | None:
        if request.tag == RESERVED_TAG:
            return RejectReason.INVALID_PDU_FIELD
        if request.tag in self._flow.commands or request.tag in self._flow.lane:
            return RejectReason.TASK_IN_PROGRESS
        writes = request.flags & 0x20
        if not writes and (request.data or not request.flags & FINAL):
            return RejectReason.INVALID_PDU_FIELD
        if request.immediate and self._flow.immediate >= self._flow.limits.immediate_commands:
            return RejectReason.TOO_MANY_IMMEDIATE_COMMANDS
        return None

    def _data_rules(self, command: Command, length: int) -> TransportAsc | None:
        """Whether the initiator may send the unsolicited data that it sends (RFC 7143 13.10-14)."""
        parameters = self._flow.parameters
        if command.unsolicited and parameters.initial_r2t:
            return TransportAsc.UNEXPECTED_UNSOLICITED_DATA
        if length and (
            not parameters.immediate_data or length > min(parameters.first_burst, command.expected)
        ):
            return TransportAsc.UNEXPECTED_UNSOLICITED_DATA
        return None

    def _start_stream(self, command: Command, data: memoryview) -> bool:
        """A plain WRITE with data to come: no task, the pieces go straight to the device."""
        if not command.writes or len(data) >= command.expected or not command.counted:
            return False
        if command.attribute != Attribute.SIMPLE:
            return False
        itl = self._nexus.itl(command.lun)
        extent = itl.write_range(command.cdb[:16]) if itl is not None else None
        if extent is None or extent[1] != command.expected:
            return False
        assert itl is not None
        itl.streams += 1
        command.itl = itl
        command.stream = extent[0]
        command.wanted = command.expected
        self.data_out.begin(command, data)
        return True

    def _break_streams(self, lun: int) -> None:
        """Make tasks of the streamed writes, so that an ORDERED task waits for them."""
        itl = self._nexus.itl(lun)
        for command in list(self._flow.commands.values()):
            if itl is not None and command.itl is itl and command.received < command.wanted:
                self.stream_broken(command)

    @staticmethod
    def _leave_stream(command: Command) -> None:
        itl, command.itl = command.itl, None
        if itl is not None:
            itl.streams -= 1

    def _start_task(self, command: Command, data: memoryview) -> None:
        if not self._prepare(command, command.cdb, command.expected if command.writes else 0):
            return
        task = command.task
        assert task is not None
        command.wanted = min(task.data_out_length, command.expected if command.writes else 0)
        if command.wanted == 0:
            if command.unsolicited:
                self.data_out.begin(command, data)
            else:
                self.gathered(command)
            return
        if self._take_buffer(command):
            self.data_out.begin(command, data)

    def _prepare(self, command: Command, cdb: bytes, expected_out: int) -> bool:
        """Make the command's task and check it; False if it has ended by that."""
        return self._nexus.prepare(self.make_task(command, cdb, expected_out))

    def make_task(self, command: Command, cdb: bytes, expected_out: int) -> Task:
        """The task of a command, not yet prepared or begun."""
        command.task = task = Task(
            tag=command.tag,
            lun=command.lun,
            cdb=cdb,
            attribute=command.attribute,
            on_complete=self._completed,
            on_aborted=self._aborted,
            transport=command,
            expected_out=expected_out,
        )
        return task

    def _take_buffer(self, command: Command) -> bool:
        """Memory for the data of a task; False if the command ended because there is none."""
        flow = self._flow
        length = command.wanted - command.base
        if flow.budget.exhausted:
            self._abort_task(command)
            self._end(command, Status.TASK_SET_FULL, b"")
            return False
        burst = flow.parameters.first_burst
        flow.budget.force(command, max(command.reserved, min(length, burst)))
        command.buffer = flow.buffers.take(length)
        return True

    # -- the data phase (data_out.Gathered)

    def stream_ended(self, command: Command) -> None:
        self._end(command, Status.GOOD, b"")
        self._flow.touch()

    def stream_broken(self, command: Command) -> bool:
        self._leave_stream(command)
        rest = command.wanted - command.received
        if not self._prepare(command, command.remainder_cdb(), rest):
            return False
        command.base = command.received
        return self._take_buffer(command)

    def gathered(self, command: Command) -> None:
        task = command.task
        assert task is not None
        if command.buffer is not None:
            task.data_out = command.buffer.view
        if task.direction is Direction.TO_INITIATOR:
            size = task.range_end - task.range_start or min(command.expected, _SMALL_ANSWER)
            self._flow.budget.reserve(command, size, self._execute)
        else:
            self._execute(command)

    def _execute(self, command: Command) -> None:
        assert command.task is not None
        self._nexus.execute(command.task)
        if not self._flow.busy:
            self._nexus.kick()

    def fail(self, command: Command, asc: TransportAsc) -> None:
        if command.held:
            # It has failed already; that the rest will not come ends the wait for it.
            if not command.unsolicited:
                self.respond_held(command)
            return
        command.failed = True
        self._abort_task(command)
        self._end(command, Status.CHECK_CONDITION, aborted_command_sense(asc))

    def respond_held(self, command: Command) -> None:
        command.held = False
        task = command.task
        if task is not None and task.state is TaskState.ENDED:
            self._respond(command, task)
        else:
            self._end(command, Status(command.held_status), command.held_sense)

    def _abort_task(self, command: Command) -> None:
        """Take a task that will not get its data out of the unit's task set."""
        task = command.task
        if task is None or task.state not in (TaskState.PREPARED, TaskState.RUNNING):
            return
        command.detached = True
        self._nexus.task_management(TaskFunction.ABORT_TASK, command.lun, command.tag, _ignore)

    # -- the end

    def _completed(self, task: Task) -> None:
        command = task.transport
        assert isinstance(command, Command)
        self._give_back(command)
        self.data_out.forget(command)
        if command.unsolicited:
            self._hold(command)
            return
        self._respond(command, task)
        self._flow.touch()

    def _hold(self, command: Command) -> None:
        """The response waits for the data that was announced, as long as data may take."""
        command.held = True
        command.deadline = self._flow.now + self._flow.limits.data_out_timeout

    def _aborted(self, task: Task) -> None:
        """The task was aborted (task management, reset, nexus loss): no response for it."""
        command = task.transport
        assert isinstance(command, Command)
        self._give_back(command)
        if command.detached:
            return
        self.drop(command)

    def drop(self, command: Command) -> None:
        """Forget a command without a response."""
        if command.task is not None:
            command.task.release()
        self._leave_stream(command)
        self.data_out.forget(command)
        self._flow.leave(command)
        self._flow.budget.forget(command)

    def _give_back(self, command: Command) -> None:
        if command.buffer is not None:
            command.buffer.release()
            command.buffer = None

    def _respond(self, command: Command, task: Task) -> None:
        self._flow.leave(command)
        flag, residual = command.residual(task)
        data = task.data_in
        if command.reads and data and task.direction is Direction.TO_INITIATOR:
            if len(data) > command.expected:
                data = data[: command.expected]
            if self._send_at_once(task, data, flag, residual):
                self._data_sent(command, task)
                return
            release = partial(self._data_sent, command, task)
            if data:
                self._send_data(command, task, data, flag, residual, release)
                return
            release()
        else:
            task.release()
            self._flow.budget.forget(command)
        self._send_response(command, task.status, task.sense, flag, residual)

    def _send_at_once(self, task: Task, data: memoryview, flag: int, residual: int) -> bool:
        """The usual case of `_send_data`: little data, all of it in one PDU with the status."""
        if task.sense or not 0 < len(data) <= self._flow.parameters.data_in_limit:
            return False
        return self._flow.tx.put_data_in(FINAL | 1 | flag, task.status, task.tag, residual, data)

    def _data_sent(self, command: Command, task: Task) -> None:
        task.release()
        self._flow.budget.forget(command)

    def _end(self, command: Command, status: Status, sense: bytes) -> None:
        """End a command whose status comes from the transport."""
        self._leave_stream(command)
        self.data_out.forget(command)
        if command.task is None or not command.detached:
            self._give_back(command)
        if command.unsolicited:
            command.held_status, command.held_sense = status, sense
            self._hold(command)
            return
        self._flow.leave(command)
        self._flow.budget.forget(command)
        flag, residual = 0, 0
        if status is not Status.GOOD and (command.reads or command.writes):
            residual = command.expected
            flag = UNDERFLOW if residual else 0
        self._send_response(command, status, sense, flag, residual)
        self._flow.touch()

    def _send_response(
        self, command: Command, status: int, sense: bytes, flag: int, residual: int
    ) -> None:
        self._flow.tx.emit(
            Opcode.SCSI_RESPONSE,
            FINAL | flag,
            byte3=status,
            tag=command.tag,
            word20=0,
            word36=command.data_sn + command.r2t_sn,
            word44=residual,
            data=len(sense).to_bytes(2, "big") + sense if sense else b"",
        )

    def _send_data(
        self,
        command: Command,
        task: Task,
        data: memoryview,
        flag: int,
        residual: int,
        release: partial[None],
    ) -> None:
        """Data-In PDUs; the last one carries the status unless there is sense data."""
        parameters, tx = self._flow.parameters, self._flow.tx
        assert flag in (0, OVERFLOW, UNDERFLOW)
        collapse = not task.sense
        segment, burst = parameters.max_send_segment, parameters.max_burst
        position, burst_end = 0, burst
        while position < len(data):
            end = min(position + segment, burst_end, len(data))
            last = end == len(data)
            flags = FINAL if last or end == burst_end else 0
            if last and collapse:
                flags |= 1 | flag
            tx.emit_data_in(
                flags=flags,
                status=task.status if last and collapse else 0,
                tag=command.tag,
                data_sn=command.data_sn,
                offset=position,
                residual=residual if last and collapse else 0,
                data=data[position:end],
                release=release if last else None,
            )
            command.data_sn = (command.data_sn + 1) & SERIAL_MASK
            position = end
            if position == burst_end:
                burst_end += burst
        if not collapse:
            self._send_response(command, task.status, task.sense, flag, residual)


def _ignore(result: TmfResult) -> None:
    """The outcome of aborting a task that the transport itself has ended."""
