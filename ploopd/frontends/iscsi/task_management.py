"""Task management requests (RFC 7143 11.5, 11.6): mapped onto the SCSI layer's functions.

Commands that are still gathering data without a task are ended here; everything else is the logical
unit's.  A response is sent when every affected task has really ended.
"""

from __future__ import annotations

from collections.abc import Callable

from ploopd.frontends.iscsi.commands import Commands
from ploopd.frontends.iscsi.flow import Flow
from ploopd.frontends.iscsi.pdu import (
    FINAL,
    RESERVED_TAG,
    TMF_TAIL,
    Opcode,
    RejectReason,
    Request,
    TaskManagementResponse,
    serial_in_window,
)
from ploopd.scsi.nexus import Nexus
from ploopd.scsi.task_management import TaskFunction, TmfResult

MAX_PENDING = 64
"""Unanswered functions per connection; more are refused as too many immediate commands."""

_UNIT_FUNCTIONS = frozenset(
    {
        TaskFunction.ABORT_TASK_SET,
        TaskFunction.CLEAR_TASK_SET,
        TaskFunction.LOGICAL_UNIT_RESET,
    }
)
_TARGET_FUNCTIONS = frozenset({TaskFunction.TARGET_WARM_RESET, TaskFunction.TARGET_COLD_RESET})
_RFC_7143_FUNCTIONS = frozenset(range(1, 9))


class TaskManagement:
    """`on_cold_reset` is called after a TARGET COLD RESET has been answered."""

    def __init__(
        self,
        flow: Flow,
        nexus: Nexus,
        commands: Commands,
        on_cold_reset: Callable[[], None],
    ) -> None:
        self._flow = flow
        self._nexus = nexus
        self._commands = commands
        self._on_cold_reset = on_cold_reset
        self._pending = 0

    def receive(self, request: Request) -> None:
        """Carry out one request."""
        number = request.flags & 0x7F
        if request.tag == RESERVED_TAG:
            self._refuse(request, RejectReason.INVALID_PDU_FIELD)
            return
        if self._pending >= MAX_PENDING:
            self._refuse(request, RejectReason.TOO_MANY_IMMEDIATE_COMMANDS)
            return
        self._pending += 1
        if number not in _RFC_7143_FUNCTIONS:
            self._respond(request, TaskManagementResponse.NOT_SUPPORTED)
            return
        function = TaskFunction(number)
        if function is TaskFunction.ABORT_TASK:
            self._abort_task(request)
            return
        if function in _UNIT_FUNCTIONS or function in _TARGET_FUNCTIONS:
            self._drop_streams(request.lun if function in _UNIT_FUNCTIONS else None)
        self._delegate(request, function, None)

    def _delegate(self, request: Request, function: TaskFunction, tag: int | None) -> None:
        answer = _Answer(request, function, self._respond_later)
        self._nexus.task_management(function, request.lun, tag, answer)

    def _abort_task(self, request: Request) -> None:
        """RFC 7143 11.5.1: the task may be gone already, or its command may not have come yet."""
        command = self._flow.find(request.word20)
        if command is None or command.lun != request.lun:
            self._respond(request, self._missing_task(request))
        elif command.task is None or command.held:
            self._commands.drop(command)
            self._respond(request, TaskManagementResponse.COMPLETE)
        else:
            self._delegate(request, TaskFunction.ABORT_TASK, request.word20)

    def _missing_task(self, request: Request) -> TaskManagementResponse:
        (ref_cmd_sn, _) = TMF_TAIL.unpack_from(request.bhs, 32)
        tx = self._flow.tx
        if (
            ref_cmd_sn == tx.exp_cmd_sn
            and ref_cmd_sn != request.cmd_sn
            and serial_in_window(ref_cmd_sn, tx.exp_cmd_sn, tx.max_cmd_sn)
        ):
            # The command was lost on its way; from now on it counts as received.
            tx.exp_cmd_sn = (tx.exp_cmd_sn + 1) & 0xFFFFFFFF
            self._flow.open_window()
            return TaskManagementResponse.COMPLETE
        return TaskManagementResponse.TASK_DOES_NOT_EXIST

    def _drop_streams(self, lun: int | None) -> None:
        """End the commands that the SCSI layer does not know; nothing more of them is written."""
        for command in list(self._flow.commands.values()):
            if (lun is None or command.lun == lun) and (command.task is None or command.held):
                self._commands.drop(command)

    def _respond_later(self, request: _Answer, result: TmfResult) -> None:
        self._emit(request.tag, request.counted, int(result))
        if request.function is TaskFunction.TARGET_COLD_RESET:
            self._on_cold_reset()

    def _respond(self, request: Request, response: TaskManagementResponse) -> None:
        self._emit(request.tag, not request.immediate, response)

    def _emit(self, tag: int, counted: bool, response: int) -> None:
        self._pending -= 1
        if counted:
            self._flow.open_window()
        self._flow.tx.emit(
            Opcode.TASK_MANAGEMENT_RESPONSE, FINAL, byte2=response, tag=tag, word20=0
        )
        self._flow.touch()

    def _refuse(self, request: Request, reason: RejectReason) -> None:
        if not request.immediate:
            self._flow.open_window()
        self._flow.reject(request, reason)


class _Answer:
    """Remembers of a request what its answer needs; the request's views do not live that long."""

    __slots__ = ("_respond", "counted", "function", "tag")

    def __init__(
        self,
        request: Request,
        function: TaskFunction,
        respond: Callable[[_Answer, TmfResult], None],
    ) -> None:
        self.tag = request.tag
        self.counted = not request.immediate
        self.function = function
        self._respond = respond

    def __call__(self, result: TmfResult) -> None:
        self._respond(self, result)
