"""The full feature phase of one connection: sequencing, and a table from opcode to what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from ploopd.frontends.iscsi.commands import Commands
from ploopd.frontends.iscsi.direct import DirectWrite
from ploopd.frontends.iscsi.discovery import Directory, TextExchange
from ploopd.frontends.iscsi.fast_path import FastPath
from ploopd.frontends.iscsi.flow import Flow, TransportAsc
from ploopd.frontends.iscsi.lane import Lane
from ploopd.frontends.iscsi.pdu import (
    FINAL,
    RESERVED_TAG,
    SERIAL_MASK,
    AsyncEvent,
    LogoutReason,
    LogoutResponse,
    Opcode,
    ProtocolError,
    RejectReason,
    Request,
    serial_in_window,
)
from ploopd.frontends.iscsi.receive import Receiver
from ploopd.frontends.iscsi.session import Session
from ploopd.frontends.iscsi.task_management import TaskManagement

_SEQUENCED: Final = frozenset(
    {
        Opcode.NOP_OUT,
        Opcode.SCSI_COMMAND,
        Opcode.TASK_MANAGEMENT,
        Opcode.TEXT,
        Opcode.LOGOUT,
    }
)
_PING: Final = 0x7F000001
"""The transfer tag of our NOP-In pings; one is outstanding at most."""


class Environment(Protocol):
    """What the phase asks of its connection."""

    def directory(self) -> Directory: ...

    def cold_reset(self) -> None:
        """Drop all sessions of the target, this one after its output has been sent."""
        ...


class FullFeature:
    """See the module's docstring."""

    def __init__(
        self, flow: Flow, receiver: Receiver, session: Session, environment: Environment
    ) -> None:
        self._flow = flow
        self._receiver = receiver
        self._session = session
        self._nexus = session.nexus
        self._text = TextExchange(flow, environment.directory, session.target)
        self._fast: FastPath | None = None
        self.direct: DirectWrite | None = None
        self._lane: Lane | None = None
        self._commands: Commands | None = None
        self._management: TaskManagement | None = None
        self._logged_out = False
        self._logout_requested = False
        self.ping_sent_at: float | None = None
        self._table: dict[int, Callable[[Request], None]] = {
            Opcode.NOP_OUT: self._nop_out,
            Opcode.TEXT: self._text_request,
            Opcode.LOGOUT: self._logout,
            Opcode.SNACK: self._snack,
        }
        if session.nexus is not None:
            self._commands = Commands(flow, session.nexus)
            self._management = TaskManagement(
                flow, session.nexus, self._commands, environment.cold_reset
            )
            self._table[Opcode.SCSI_COMMAND] = self._commands.start
            self._table[Opcode.DATA_OUT] = self._data_out
            self._table[Opcode.TASK_MANAGEMENT] = self._management.receive
            if not (flow.parameters.header_digest or flow.parameters.data_digest):
                self._lane = Lane(flow, self._commands)
                self.direct = DirectWrite(flow, session.nexus, receiver)
                self._fast = FastPath(
                    flow, session.nexus, receiver, self._commands, self._lane, self.direct
                )

    # -- input

    def process(self) -> bool:
        """Handle everything that has arrived; True if it stopped because of pending output.

        Then it must be called again when that has been sent: what was begun here may not have been
        handed to the storage."""
        fast, receiver, tx, flow = self._fast, self._receiver, self._flow.tx, self._flow
        paused = False
        while flow.close_reason is None:
            if fast is not None and fast.run():
                paused = True
                break
            if receiver.position == receiver.fill:
                break
            if tx.pending >= tx.size:
                paused = True
                break
            request = receiver.next()
            if request is None:
                break
            self._dispatch(request)
        if not tx.viewed:  # they come first: what completes may change what they show
            self.kick()
        return paused

    def kick(self) -> None:
        """Hand what was begun to the storage."""
        if self._nexus is not None:
            self._nexus.kick()

    def _dispatch(self, request: Request) -> None:
        handler = self._table.get(request.opcode)
        if handler is None:
            self._unknown(request)
            return
        if request.damaged:
            self._flow.reject(request, RejectReason.DATA_DIGEST_ERROR)
            if request.opcode == Opcode.DATA_OUT and self._commands is not None:
                self._commands.data_out.digest_error(request)
                return
            # The PDU counts as not received: its CmdSN stays expected, and the initiator has to
            # begin a new session if it cannot send it again (RFC 7143 7.8).
            return
        if request.opcode in _SEQUENCED and not self._in_sequence(request):
            return
        handler(request)

    def _in_sequence(self, request: Request) -> bool:
        """The CmdSN rules (RFC 7143 4.2.2.1); False: the request is dropped without a word."""
        if request.immediate:
            return True
        tx = self._flow.tx
        if request.cmd_sn == tx.exp_cmd_sn and serial_in_window(
            request.cmd_sn, tx.exp_cmd_sn, tx.max_cmd_sn
        ):
            tx.exp_cmd_sn = (tx.exp_cmd_sn + 1) & SERIAL_MASK
            return True
        if serial_in_window(request.cmd_sn, tx.exp_cmd_sn, tx.max_cmd_sn):
            # With one connection a gap never closes by itself: a request was damaged or never sent.
            raise ProtocolError(f"CmdSN {request.cmd_sn} where {tx.exp_cmd_sn} was due")
        return False

    # -- PDUs

    def _unknown(self, request: Request) -> None:
        """Opcodes of targets, of other phases and of nobody."""
        if request.opcode == Opcode.LOGIN:
            raise ProtocolError("a login request in full feature phase")
        if request.opcode >= 0x20:
            raise ProtocolError(f"a target's opcode {request.opcode:#x} from the initiator")
        self._flow.reject(request, RejectReason.COMMAND_NOT_SUPPORTED)

    def _data_out(self, request: Request) -> None:
        assert self._commands is not None
        self._commands.data_out.receive(request)

    def _nop_out(self, request: Request) -> None:
        flow = self._flow
        if not request.immediate:
            flow.open_window()
        if request.word20 != RESERVED_TAG:
            if request.word20 == _PING:
                self.ping_sent_at = None
            if request.tag == RESERVED_TAG:
                return
        if request.tag == RESERVED_TAG:
            if not request.immediate:
                flow.reject(request, RejectReason.INVALID_PDU_FIELD)
            return
        data = request.data[: flow.parameters.max_send_segment]
        flow.tx.emit(Opcode.NOP_IN, FINAL, tag=request.tag, data=data)

    def _text_request(self, request: Request) -> None:
        if not request.immediate:
            self._flow.open_window()
        if request.tag == RESERVED_TAG:
            self._flow.reject(request, RejectReason.INVALID_PDU_FIELD)
            return
        self._text.receive(request)

    def _snack(self, request: Request) -> None:
        self._flow.reject(request, RejectReason.SNACK_REJECT)

    def _logout(self, request: Request) -> None:
        flow = self._flow
        if not request.immediate:
            flow.open_window()
        reason = request.flags & 0x7F
        cid = request.word20 >> 16
        if reason > LogoutReason.REMOVE_FOR_RECOVERY or request.tag == RESERVED_TAG:
            flow.reject(request, RejectReason.INVALID_PDU_FIELD)
            return
        if reason == LogoutReason.REMOVE_FOR_RECOVERY:
            response = LogoutResponse.RECOVERY_NOT_SUPPORTED
        elif reason == LogoutReason.CLOSE_CONNECTION and cid != self._session.cid:
            response = LogoutResponse.CID_NOT_FOUND
        else:
            response = LogoutResponse.CLOSED
        parameters = flow.parameters
        flow.tx.emit(
            Opcode.LOGOUT_RESPONSE,
            FINAL,
            byte2=response,
            tag=request.tag,
            word20=0,
            word40=parameters.time2wait << 16 | parameters.time2retain,
        )
        if response is LogoutResponse.CLOSED:
            self._logged_out = True
            flow.close("logout")

    # -- what we say on our own

    @property
    def logged_out(self) -> bool:
        return self._logged_out

    def ping(self) -> None:
        """Ask the initiator for a sign of life (RFC 7143 11.19)."""
        self.ping_sent_at = self._flow.now
        self._flow.tx.emit(Opcode.NOP_IN, FINAL, tag=RESERVED_TAG, word20=_PING, status=False)
        self._flow.touch()

    def request_logout(self, seconds: int) -> None:
        """Ask the initiator to log out within `seconds` (RFC 7143 11.9.1, event 1)."""
        if self._logout_requested:
            return
        self._logout_requested = True
        self._flow.tx.emit(
            Opcode.ASYNC_MESSAGE,
            FINAL,
            tag=RESERVED_TAG,
            word36=AsyncEvent.LOGOUT_REQUESTED << 24,
            word40=min(seconds, 0xFFFF),
        )
        self._flow.touch()

    def announce_drop(self) -> None:
        """Tell the initiator that its session ends now (event 3)."""
        parameters = self._flow.parameters
        self._flow.tx.emit(
            Opcode.ASYNC_MESSAGE,
            FINAL,
            tag=RESERVED_TAG,
            word36=AsyncEvent.ALL_CONNECTIONS_DROPPED << 24,
            word40=parameters.time2wait << 16 | parameters.time2retain,
        )

    # -- time

    def expire(self, now: float) -> None:
        """Fail the commands whose data has not come."""
        if self._commands is None:
            return
        for command in list(self._flow.commands.values()):
            if command.gathering and 0 < command.deadline <= now:
                command.unsolicited = False
                self._commands.fail(command, TransportAsc.ACK_NAK_TIMEOUT)

    def lost(self) -> None:
        """The connection is gone: forget the commands that have no task."""
        if self._lane is not None:
            self._lane.close()
        if self._commands is not None:
            for command in list(self._flow.commands.values()):
                if command.task is None or command.held:
                    self._commands.drop(command)
