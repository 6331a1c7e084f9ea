"""One iSCSI connection without its socket: bytes in, bytes out, time as an argument.

    connection.receive_buffer() → fill it → connection.received(count, now)
    connection.data_to_send()   → send it → connection.sent(count, now)
    connection.wants_close      → close when nothing is left to send
    connection.on_timeout(now)  at connection.next_timeout()

Everything else happens inside.  When output appears without input (a read has come back from the
disk, a ping is due) `on_dirty(connection)` is called, once until the output was taken.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from ploopd.fileio.buffers import BufferPool
from ploopd.frontends.iscsi.chap import ChallengeBook
from ploopd.frontends.iscsi.config import IscsiConfig
from ploopd.frontends.iscsi.direct import DirectWrite
from ploopd.frontends.iscsi.discovery import Directory
from ploopd.frontends.iscsi.flow import Flow
from ploopd.frontends.iscsi.full_feature import FullFeature
from ploopd.frontends.iscsi.login import (
    MAX_LOGIN_SEGMENT,
    LoginEngine,
    LoginIdentity,
    LoginReply,
    LoginState,
)
from ploopd.frontends.iscsi.pdu import (
    CONTINUE,
    FINAL,
    SERIAL_MASK,
    LoginRequest,
    LoginStatus,
    Opcode,
    ProtocolError,
)
from ploopd.frontends.iscsi.receive import Receiver
from ploopd.frontends.iscsi.session import Session, SessionTable
from ploopd.frontends.iscsi.transmit import Transmitter
from ploopd.scsi.target import Target

logger = logging.getLogger(__name__)

_LOGIN_BUFFER: Final = 12 * 1024
_LOGIN_ARENA: Final = 16 * 1024
_REINSTATEMENT_WAIT: Final = 10.0
"""Seconds to wait for the old session's writes before the new one may begin anyway."""


@dataclass(slots=True, kw_only=True)
class TargetNode:
    """What all connections of a server share.

    `addresses`: the portals' real addresses, set when they are bound.
    """

    config: IscsiConfig
    targets: dict[str, Target]
    random: Callable[[int], bytes]
    buffers: BufferPool = field(default_factory=BufferPool)
    addresses: Sequence[tuple[str, int]] = ()
    book: ChallengeBook = field(default_factory=ChallengeBook)
    sessions: SessionTable = field(init=False)

    def __post_init__(self) -> None:
        self.sessions = SessionTable(self.targets, self.config.tpgt)


class Phase(Enum):
    """Where a connection is in its life."""

    LOGIN = auto()
    JOINING = auto()  # authenticated; waits for the tasks of the session it replaces
    FULL_FEATURE = auto()
    ENDED = auto()


class Connection:
    """See the module's docstring.  `peer`, `local`: (host, port) of the two ends."""

    def __init__(
        self,
        node: TargetNode,
        *,
        peer: tuple[str, int],
        local: tuple[str, int],
        now: float,
        on_dirty: Callable[[Connection], None],
    ) -> None:
        config = node.config
        self._node = node
        self._limits = config.limits
        self.peer = peer
        self.local = local
        self._on_dirty = on_dirty
        self._receiver = Receiver(_LOGIN_BUFFER, MAX_LOGIN_SEGMENT)
        self._tx = Transmitter(_LOGIN_ARENA)
        self._flow = Flow(self._tx, config.limits, node.buffers, self._dirty)
        self._flow.now = now
        self._login = LoginEngine(
            config,
            node.targets,
            book=node.book,
            random=node.random,
            admit=self._admit,
        )
        self._phase = Phase.LOGIN
        self._session: Session | None = None
        self._full_feature: FullFeature | None = None
        self._direct: DirectWrite | None = None
        self._final_reply: LoginReply | None = None
        self._started = now
        self._last_received = now
        self._last_text = now
        self._progress = 0
        self._progress_at = now
        self._closing_at = math.inf
        self.paused = False
        self.aborted = False

    # -- what the server sees

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def authenticated(self) -> bool:
        return self._phase is not Phase.LOGIN

    @property
    def session(self) -> Session | None:
        return self._session

    @property
    def close_reason(self) -> str | None:
        return self._flow.close_reason

    @property
    def wants_close(self) -> bool:
        """Close the socket: now if `aborted`, else when `data_to_send` is empty."""
        return self._flow.close_reason is not None

    @property
    def executing(self) -> int:
        """How many commands are at the device, so that output may come without input."""
        nexus = None if self._session is None else self._session.nexus
        return 0 if nexus is None else len(nexus.tasks) + len(self._flow.lane)

    def receive_buffer(self) -> memoryview:
        """Where received bytes go; empty while `paused` with a full buffer."""
        return self._receiver.space()

    def received(self, count: int, now: float) -> None:
        """`count` bytes are in the receive buffer: handle what is complete."""
        self._receiver.fill += count
        self._last_received = now
        self.process(now)

    @property
    def missing(self) -> int:
        """How many bytes of a WRITE may be received into `direct_buffers()`; 0 if none."""
        if self._direct is None or self.paused or self.wants_close:
            return 0
        return self._direct.missing

    def direct_buffers(self) -> list[memoryview]:
        """Where to receive at least `missing` bytes by one system call, at once, before anything
        else is done; empty if they have to be received as any others."""
        return [] if self._direct is None else self._direct.buffers()

    def received_direct(self, count: int, now: float) -> bool:
        """So many bytes are in `direct_buffers()`; False if the rest has to be received as any
        others."""
        assert self._direct is not None
        self._last_received = now
        try:
            complete = self._direct.received(count)
        except ProtocolError as error:
            self.abort(str(error))
            return False
        self.process(now)
        return complete

    def process(self, now: float) -> None:
        """Handle what is in the receive buffer; also after `paused`, when output has left."""
        flow = self._flow
        flow.now = now
        flow.busy = True
        try:
            if self._phase is Phase.LOGIN:
                self._process_login()
            if self._phase is Phase.FULL_FEATURE and self._full_feature is not None:
                self.paused = self._full_feature.process()
        except ProtocolError as error:
            self.abort(str(error))
        finally:
            flow.busy = False

    def collect(self, deliver: Callable[[], None]) -> None:
        """Call `deliver`, which completes commands; their answers are there when this returns."""
        flow = self._flow
        flow.busy = True
        try:
            deliver()
        finally:
            flow.busy = False

    def data_to_send(self) -> list[memoryview]:
        """Pieces to send, in order."""
        return self._tx.data_to_send()

    def sent(self, count: int) -> bool:
        """`count` bytes of `data_to_send()` have been taken by the kernel; True if it was all."""
        return self._tx.sent(count)

    def keep_views(self) -> bool:
        """The kernel does not take the rest of the output now, or cannot read it: nothing in it is
        a view of the storage afterwards.  False if nothing was, or if it cannot be read: that ends
        the connection, and the initiator will send the command again."""
        tx = self._tx
        if not tx.viewed:
            tx.congested = True
            return False
        if not tx.keep_views(self._flow.buffers):
            tx.discard()
            self.abort("what was being sent cannot be read")
            return False
        if self._full_feature is not None:
            self._full_feature.kick()
        return True

    def abort(self, reason: str) -> None:
        """End without sending what waits."""
        self.aborted = True
        self._flow.close(reason)

    def terminate(self, reason: str) -> None:
        """The session is replaced or reset (session.SessionConnection)."""
        self._leave_session()
        self.abort(reason)
        self._dirty()

    def lost(self, reason: str) -> None:
        """The socket is closed, whoever did it.  Gives everything back; harmless to repeat."""
        self._flow.close_reason = self._flow.close_reason or reason
        if self._phase is Phase.ENDED:
            return
        self._leave_session()
        self._phase = Phase.ENDED
        self._login.close()
        self._tx.discard()

    def request_logout(self, seconds: int) -> None:
        """The daemon is going to stop: ask the initiator to log out."""
        if self._full_feature is not None and self._phase is Phase.FULL_FEATURE:
            self._full_feature.request_logout(seconds)
        else:
            self.abort("shutdown")
            self._dirty()

    def shut_down(self) -> None:
        """The daemon stops now."""
        if self._full_feature is not None and not self.wants_close:
            self._full_feature.announce_drop()
        self._flow.close("shutdown")
        self._dirty()

    # -- full_feature.Environment

    def directory(self) -> Directory:
        self._last_text = self._flow.now
        return Directory(
            targets=sorted(self._node.targets),
            addresses=self._node.addresses,
            local=self.local,
            portal_group_tag=self._node.config.tpgt,
        )

    def cold_reset(self) -> None:
        for session in self._node.sessions:
            if session.target == (self._session.target if self._session else None):
                connection = session.connection
                if isinstance(connection, Connection):
                    connection._flow.close("target cold reset")
                    connection._dirty()

    # -- login

    def _process_login(self) -> None:
        receiver = self._receiver
        if receiver.fill - receiver.position and (
            receiver.buffer[receiver.position] & 0x7F != Opcode.LOGIN | 0x40
        ):
            raise ProtocolError("the first PDU is not a login request")
        while self._phase is Phase.LOGIN and self._flow.close_reason is None:
            request = receiver.next()
            if request is None:
                return
            if request.opcode != Opcode.LOGIN or request.ahs:
                raise ProtocolError("not a login request during login")
            login = LoginRequest.parse(request.bhs, bytes(request.data))
            if self._login.first_request is None:
                tx = self._tx
                tx.exp_cmd_sn = login.cmd_sn
                tx.max_cmd_sn = (login.cmd_sn + self._limits.window - 1) & SERIAL_MASK
                tx.stat_sn = login.exp_stat_sn
            reply = self._login.request(login)
            if self._login.state is LoginState.COMPLETE:
                self._final_reply = reply
                self._phase = Phase.JOINING
                self._join()
                return
            self._send_login_reply(reply)
            if self._login.state is LoginState.FAILED:
                self._login_failed()

    def _admit(self, identity: LoginIdentity) -> int:
        self._session = self._node.sessions.admit(identity, self)
        return self._session.tsih

    def _join(self) -> None:
        """Enter full feature phase as soon as nothing of a replaced session is under way."""
        session = self._session
        assert session is not None
        self._node.sessions.when_drained(session, self._drained)

    def _drained(self) -> None:
        session, reply = self._session, self._final_reply
        if self._phase is not Phase.JOINING or session is None or reply is None:
            return  # already done, or replaced while it waited
        self._final_reply = None
        parameters = self._login.parameters
        self._send_login_reply(reply)
        self._flow.parameters = parameters
        if session.nexus is not None:
            limits = self._limits
            self._tx.grow(limits.output_arena)
            self._receiver.grow(limits.receive_buffer, parameters.max_receive_segment)
        self._tx.header_digest = self._receiver.header_digest = parameters.header_digest
        self._tx.data_digest = self._receiver.data_digest = parameters.data_digest
        self._full_feature = FullFeature(self._flow, self._receiver, session, self)
        self._direct = self._full_feature.direct
        self._phase = Phase.FULL_FEATURE
        logger.info(
            "login initiator=%s target=%s peer=%s:%d tsih=%d user=%s",
            session.initiator,
            session.target or "(discovery)",
            *self.peer[:2],
            session.tsih,
            session.user or "-",
        )
        if not self._flow.busy:
            # The rest of the input waited for this, and goes on when the reply has left.
            self.paused = True
            self._dirty()

    def _send_login_reply(self, reply: LoginReply) -> None:
        flags = reply.current_stage << 2
        if reply.next_stage is not None:
            flags |= FINAL | reply.next_stage
        self._tx.emit(
            Opcode.LOGIN_RESPONSE,
            flags & ~CONTINUE,
            lun=int.from_bytes(reply.isid, "big") << 16 | reply.tsih,
            tag=reply.tag,
            word20=0,
            word36=reply.status << 16,
            data=reply.text,
            status=reply.status is LoginStatus.SUCCESS,
        )

    def _login_failed(self) -> None:
        failure = self._login.failure
        assert failure is not None
        logger.warning(
            "login refused peer=%s:%d initiator=%s status=%02d/%02d reason=%s",
            *self.peer[:2],
            self._login.initiator or "-",
            failure.status >> 8,
            failure.status & 0xFF,
            failure,
        )
        self._flow.close("login failed")

    # -- the end

    def _leave_session(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        if self._full_feature is not None:
            self._full_feature.lost()
        self._node.sessions.remove(session)
        logger.info(
            "session ended initiator=%s target=%s peer=%s:%d reason=%s",
            session.initiator,
            session.target or "(discovery)",
            *self.peer[:2],
            self._flow.close_reason or "-",
        )

    def _dirty(self) -> None:
        self._on_dirty(self)

    # -- time

    def next_timeout(self) -> float:
        """When `on_timeout` should be called at the latest; being late by a second is no harm."""
        if self.wants_close:
            return self._last_received if self._closing_at == math.inf else self._closing_at
        limits = self._limits
        if self._phase is Phase.LOGIN:
            return self._started + limits.login_timeout
        return self._last_received  # the periodic checks are cheap: look every time

    def on_timeout(self, now: float) -> None:
        """Look at the clocks: login, keep-alive, data that does not come, a reader that does not
        read."""
        self._flow.now = now
        if self.wants_close:
            self._expire_close(now)
            return
        self._expire_output(now)
        match self._phase:
            case Phase.LOGIN:
                if now >= self._started + self._limits.login_timeout:
                    self.abort("the login took too long")
            case Phase.JOINING:
                if now >= self._last_received + _REINSTATEMENT_WAIT:
                    self._drained()
            case Phase.FULL_FEATURE:
                self._expire_full_feature(now)
            case Phase.ENDED:
                pass

    def _expire_close(self, now: float) -> None:
        if self._closing_at == math.inf:
            self._closing_at = now + self._limits.close_timeout
        elif now >= self._closing_at:
            self.aborted = True
            self._dirty()

    def _expire_output(self, now: float) -> None:
        tx = self._tx
        if tx.pending == 0 or tx.progress != self._progress:
            self._progress, self._progress_at = tx.progress, now
        elif now >= self._progress_at + self._limits.send_timeout:
            self.abort("the initiator does not read")

    def _expire_full_feature(self, now: float) -> None:
        phase, limits = self._full_feature, self._limits
        assert phase is not None
        if self._session is not None and self._session.nexus is None:
            if now >= max(self._last_text, self._last_received) + limits.discovery_idle:
                self.abort("an idle discovery session")
            return
        phase.expire(now)
        silent = now - self._last_received
        if phase.ping_sent_at is not None and self._last_received > phase.ping_sent_at:
            phase.ping_sent_at = None
        if phase.ping_sent_at is not None:
            if now >= phase.ping_sent_at + limits.nop_timeout:
                self.abort("the initiator does not answer NOP-In")
        elif limits.nop_interval and silent >= limits.nop_interval and self._tx.pending == 0:
            phase.ping()
