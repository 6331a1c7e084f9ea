"""Sessions: who is logged in, and what a new login means for older ones (RFC 7143 6.3.5-6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from ploopd.frontends.iscsi.login import LoginFailure, LoginIdentity
from ploopd.frontends.iscsi.names import initiator_port, target_port
from ploopd.frontends.iscsi.pdu import LoginStatus
from ploopd.scsi.nexus import Nexus
from ploopd.scsi.target import Target

MAX_SESSIONS = 4096

Key = tuple[str, bytes, str | None]


class SessionConnection(Protocol):
    """The connection of a session, as far as the session table uses it."""

    def terminate(self, reason: str) -> None:
        """End the session: abort its tasks, drop the connection without another word."""
        ...


@dataclass(slots=True, kw_only=True)
class Session:
    """One session.  It has one connection (MaxConnections is 1); a lost connection ends it.

    `target` and `nexus` are None in a discovery session.
    """

    initiator: str
    isid: bytes
    tsih: int
    cid: int
    target: str | None
    user: str | None
    nexus: Nexus | None
    connection: SessionConnection

    @property
    def key(self) -> Key:
        """Two sessions with equal keys cannot exist at once (RFC 7143 6.3.5)."""
        return self.initiator, self.isid, self.target


class SessionTable:
    """All sessions of the daemon's targets, by TSIH and by who and what."""

    def __init__(self, targets: dict[str, Target], portal_group_tag: int) -> None:
        self._targets = targets
        self._tag = portal_group_tag
        self._sessions: dict[int, Session] = {}
        self._last_tsih = 0
        self._draining: dict[Key, int] = {}
        self._waiting: list[tuple[Key, Callable[[], None]]] = []

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def __len__(self) -> int:
        return len(self._sessions)

    def admit(self, identity: LoginIdentity, connection: SessionConnection) -> Session:
        """The session of an initiator that has authenticated.  Raises `LoginFailure`.

        TSIH 0 begins a session and ends an older one of the same initiator port (reinstatement).
        Another TSIH must be that of an existing session: its connection is replaced.
        """
        old = self._existing(identity) if identity.tsih else self._same_nexus(identity)
        if old is not None:
            old.connection.terminate("reinstated by a new login")
        if len(self._sessions) >= MAX_SESSIONS:
            raise LoginFailure(LoginStatus.OUT_OF_RESOURCES, "too many sessions")
        tsih = identity.tsih or self._new_tsih()
        session = Session(
            initiator=identity.initiator,
            isid=identity.isid,
            tsih=tsih,
            cid=identity.cid,
            target=identity.target,
            user=identity.user,
            nexus=self._open_nexus(identity),
            connection=connection,
        )
        self._sessions[tsih] = session
        return session

    def remove(self, session: Session) -> None:
        """The session has ended: its tasks are aborted, its I_T nexus is lost.

        Harmless when it is not in the table any more.
        """
        if self._sessions.get(session.tsih) is not session:
            return
        del self._sessions[session.tsih]
        if session.nexus is not None:
            key = session.key
            self._draining[key] = self._draining.get(key, 0) + 1
            session.nexus.close(lambda: self._drained(key))

    def when_drained(self, session: Session, ready: Callable[[], None]) -> None:
        """Call `ready` when nothing of an older session of the same initiator port is being
        executed any more, so that its writes cannot overtake the new session's; usually at once."""
        if self._draining.get(session.key):
            self._waiting.append((session.key, ready))
        else:
            ready()

    def _drained(self, key: Key) -> None:
        self._draining[key] -= 1
        if self._draining[key]:
            return
        del self._draining[key]
        waiting, self._waiting = self._waiting, []
        for waiting_key, ready in waiting:
            if waiting_key == key:
                ready()
            else:
                self._waiting.append((waiting_key, ready))

    def _existing(self, identity: LoginIdentity) -> Session:
        session = self._sessions.get(identity.tsih)
        if session is None:
            raise LoginFailure(LoginStatus.SESSION_DOES_NOT_EXIST, "no session has this TSIH")
        if session.key != (identity.initiator, identity.isid, identity.target):
            raise LoginFailure(
                LoginStatus.CANNOT_INCLUDE_IN_SESSION, "the TSIH belongs to another session"
            )
        if session.cid != identity.cid:
            raise LoginFailure(
                LoginStatus.TOO_MANY_CONNECTIONS, "a session has one connection here"
            )
        return session

    def _same_nexus(self, identity: LoginIdentity) -> Session | None:
        key = (identity.initiator, identity.isid, identity.target)
        return next((s for s in self._sessions.values() if s.key == key), None)

    def _open_nexus(self, identity: LoginIdentity) -> Nexus | None:
        if identity.target is None:
            return None
        target = self._targets.get(identity.target)
        if target is None:
            raise LoginFailure(LoginStatus.TARGET_REMOVED, "the target is gone")
        return target.open_nexus(
            initiator_port(identity.initiator, identity.isid),
            target_port(identity.target, self._tag),
        )

    def _new_tsih(self) -> int:
        while True:
            self._last_tsih = self._last_tsih % 0xFFFF + 1
            if self._last_tsih not in self._sessions:
                return self._last_tsih
