"""The embedded iSCSI target's sockets: the only module of this front end that does I/O.

Each connection has a task that reads and a task that waits when the kernel takes no more output.
Both try the system call first and go through the scheduler only when it would block, because a hop
costs more than a command.  Output that appears without input is sent by one task for all
connections, once per batch of completions.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
import socket
from collections.abc import Callable, Mapping
from functools import partial

import trio

from ploopd.errors import ExitCode, PloopError, UsageError
from ploopd.fileio.polling import AdaptivePoll
from ploopd.frontends.iscsi.config import IscsiConfig, Portal, format_address
from ploopd.frontends.iscsi.connection import Connection, TargetNode
from ploopd.frontends.iscsi.link import Link, Storage
from ploopd.scsi.target import Target
from ploopd.sleeper import Sleeper

logger = logging.getLogger(__name__)

BACKLOG = 256
ROUNDS = 64
"""Batches handled in a row before other tasks get their turn."""
TICK = 1.0
RESOURCE_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
RESOURCE_PAUSE = 0.1
"""Seconds to wait when the process has no descriptors left, before accepting again."""

Address = tuple[str, int]


class IscsiServer:
    """Serves `targets` (by name) at the portals of `config`.

    Raises `PloopError` or `UsageError` for a configuration that cannot or must not be used.
    `clock` is monotonic seconds.  `storage` is the engine under the targets, if it can be asked.
    """

    def __init__(
        self,
        config: IscsiConfig,
        targets: Mapping[str, Target],
        *,
        clock: Callable[[], float] = trio.current_time,
        storage: Storage | None = None,
    ) -> None:
        config.check()
        self._config = config
        self._clock = clock
        self._storage = storage
        self._node = TargetNode(config=config, targets=dict(targets), random=secrets.token_bytes)
        self._listeners: list[socket.socket] = []
        self._links: dict[Connection, Link] = {}
        self._dirty: dict[Connection, None] = {}
        self._flusher = Sleeper()
        if storage is not None:
            storage.interlude = self._respond
        self._empty: trio.Event | None = None
        self._listening: trio.CancelScope | None = None
        self._serving: trio.CancelScope | None = None

    @property
    def addresses(self) -> list[Address]:
        """The (host, port) pairs that are listened on."""
        return list(self._node.addresses)

    @property
    def connections(self) -> list[Connection]:
        """All connections, logged in or not."""
        return list(self._links)

    def set_access(self, config: IscsiConfig) -> None:
        """From the next login on the access rules are those of `config`, which has the portals and
        limits of now.  Raises what the constructor raises."""
        config.check()
        self._config = self._node.config = config

    async def bind(self) -> None:
        """Take the portals' addresses, which `serve` does otherwise; connections wait until then.

        Raises `PloopError` when a portal cannot be bound.
        """
        self._listeners = await self._bind_all()

    async def serve(
        self, *, task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen and serve until cancelled or `shutdown`; reports the bound addresses when ready.

        Raises `PloopError` when a portal cannot be bound.
        """
        listeners = self._listeners or await self._bind_all()
        self._listeners = []
        try:
            self._node.addresses = [listener.getsockname()[:2] for listener in listeners]
            async with trio.open_nursery() as nursery:
                self._serving = nursery.cancel_scope
                nursery.start_soon(self._flush_dirty)
                nursery.start_soon(self._tick)
                nursery.start_soon(self._listen, listeners, nursery)
                task_status.started(self.addresses)
        finally:
            for listener in listeners:
                listener.close()

    async def shutdown(self, grace: float) -> None:
        """Stop accepting, ask the initiators to log out, and after `grace` seconds close."""
        for listener in self._listeners:
            listener.close()
        if self._listening is not None:
            self._listening.cancel()
        for connection in self.connections:
            connection.request_logout(int(grace))
        with trio.move_on_after(grace):
            await self._all_gone()
        for connection in self.connections:
            connection.shut_down()
        with trio.move_on_after(self._config.limits.close_timeout):
            await self._all_gone()
        if self._serving is not None:
            self._serving.cancel()

    async def _all_gone(self) -> None:
        """Wait until the last connection has ended."""
        if self._links:
            self._empty = trio.Event()
            await self._empty.wait()

    # -- listening

    async def _bind_all(self) -> list[socket.socket]:
        listeners: list[socket.socket] = []
        try:
            for portal in self._config.portals:
                listeners.append(await _bind(portal))
        except BaseException:
            for listener in listeners:
                listener.close()
            raise
        return listeners

    async def _listen(self, listeners: list[socket.socket], connections: trio.Nursery) -> None:
        with trio.CancelScope() as self._listening:
            async with trio.open_nursery() as nursery:
                for listener in listeners:
                    nursery.start_soon(self._accept, listener, connections)
        for listener in listeners:
            listener.close()

    async def _accept(self, listener: socket.socket, connections: trio.Nursery) -> None:
        """Accept for ever; running out of descriptors is an event, not an end."""
        portal: Address = listener.getsockname()[:2]
        while True:
            try:
                sock, peer = listener.accept()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(listener)
                continue
            except OSError as error:
                if error.errno in RESOURCE_ERRNOS:
                    logger.warning("cannot accept portal=%s:%d error=%s", *portal, error)
                    await trio.sleep(RESOURCE_PAUSE)
                else:  # the peer is gone already, or its network is (accept(2))
                    await trio.lowlevel.checkpoint()
                continue
            self._admit(sock, peer[:2], portal, connections)
            await trio.lowlevel.checkpoint()

    def _admit(
        self, sock: socket.socket, peer: Address, portal: Address, connections: trio.Nursery
    ) -> None:
        """Begin to serve an accepted socket, unless there are too many."""
        reason = self._too_many(peer[0], portal)
        if reason is not None:
            logger.warning("connection refused peer=%s:%d reason=%s", *peer, reason)
            sock.close()
            return
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            local: Address = sock.getsockname()[:2]
            if local[0] == peer[0]:
                _send_unpaced(sock)
        except OSError as error:
            logger.info("connection lost peer=%s:%d error=%s", *peer, error)
            sock.close()
            return
        link = Link(sock, portal, self._clock)
        link.engine = Connection(
            self._node, peer=peer, local=local, now=self._clock(), on_dirty=self._mark_dirty
        )
        self._links[link.engine] = link
        connections.start_soon(self._supervise, link)

    def _too_many(self, source: str, portal: Address) -> str | None:
        limits = self._config.limits
        total = at_portal = from_source = unknown = unknown_from_source = 0
        for connection, link in self._links.items():
            total += 1
            at_portal += link.portal == portal
            same = connection.peer[0] == source
            from_source += same
            if not connection.authenticated:
                unknown += 1
                unknown_from_source += same
        for count, limit, what in (
            (total, limits.connections, "connections"),
            (at_portal, limits.connections_per_portal, "connections of the portal"),
            (from_source, limits.connections_per_source, "connections of this host"),
            (unknown, limits.unauthenticated, "logins under way"),
            (unknown_from_source, limits.unauthenticated_per_source, "logins of this host"),
        ):
            if count >= limit:
                return f"{count} {what}"
        return None

    # -- connections

    async def _supervise(self, link: Link) -> None:
        """Serve one connection; whatever goes wrong in it ends only it."""
        engine = link.engine
        try:
            with link.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write, link)
                    await self._read(link)
                    nursery.cancel_scope.cancel()
        except Exception:
            logger.exception("connection failed peer=%s:%d", *engine.peer)
        finally:
            try:
                engine.lost(link.ended or "the connection was closed")
            except Exception:
                logger.exception("connection clean-up failed peer=%s:%d", *engine.peer)
            self._links.pop(engine, None)
            self._dirty.pop(engine, None)
            if not self._links and self._empty is not None:
                self._empty.set()
            trio.lowlevel.notify_closing(link.sock)
            link.sock.close()

    async def _read(self, link: Link) -> None:
        """The reader: everything that arrived, as one batch, answered at once."""
        engine, sock = link.engine, link.sock
        patience = AdaptivePoll()
        rounds = 0
        while True:
            alone = len(self._links) == 1
            if not link.receive() and not (alone and link.poll(patience, self._storage)):
                if link.full:
                    await link.room.sleep()
                else:
                    await trio.lowlevel.wait_readable(sock)
                    rounds = 0
                continue
            if link.ended is not None:
                return
            rounds += 1
            if rounds >= ROUNDS or engine.wants_close:
                rounds = 0
                await trio.lowlevel.checkpoint()

    async def _write(self, link: Link) -> None:
        """The writer: asleep unless the kernel refused output."""
        while True:
            await link.writable.sleep()
            while link.blocked:
                await trio.lowlevel.wait_writable(link.sock)
                link.blocked = False
                link.flush()
            link.room.wake()

    def _mark_dirty(self, connection: Connection) -> None:
        """The engine has output, or wants to end, without having been called by us."""
        if not self._dirty and (self._storage is None or not self._storage.collecting):
            self._flusher.wake()
        self._dirty[connection] = None

    def _respond(self) -> None:
        """Between groups of completions: send what they have queued, and look for input."""
        for link in self._take_dirty():
            self._guarded(link, link.respond)
        if self._dirty:
            self._flusher.wake()

    async def _flush_dirty(self) -> None:
        """Send what completions have queued, once per batch of them."""
        while True:
            await self._flusher.sleep()
            for link in self._take_dirty():
                self._guarded(link, link.flush)
                link.room.wake()

    def _take_dirty(self) -> list[Link]:
        dirty, self._dirty = self._dirty, {}
        return [link for each in dirty if (link := self._links.get(each)) is not None]

    async def _tick(self) -> None:
        """Look at every connection's clocks once a second."""
        while True:
            await trio.sleep(TICK)
            now = self._clock()
            for connection, link in list(self._links.items()):
                if now >= connection.next_timeout():
                    self._guarded(link, partial(connection.on_timeout, now))
                    self._guarded(link, link.flush)

    @staticmethod
    def _guarded(link: Link, work: Callable[[], object]) -> None:
        """Do `work` for a connection outside of its task; a defect in it ends only that one."""
        try:
            work()
        except Exception:
            logger.exception("connection failed peer=%s:%d", *link.engine.peer)
            link.scope.cancel()


def _send_unpaced(sock: socket.socket) -> None:
    """No pacing between two programs of one machine.

    BBR sends by a timer, at the rate that it believes the network to have: here that is a timer and
    an interrupt for each 64 KiB, and nothing that they are good for.
    """
    with contextlib.suppress(OSError):
        algorithm = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        if algorithm.startswith(b"bbr"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


async def _bind(portal: Portal) -> socket.socket:
    """A listening socket.  Raises `PloopError` that names the portal."""
    address = format_address(portal.host, portal.port)
    try:
        found = await trio.socket.getaddrinfo(
            portal.host, portal.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise UsageError(
            f"cannot resolve the portal: {error.strerror}", field="portal", value=address
        ) from error
    family, kind, protocol, _, where = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(where)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PloopError(
                f"{address} is in use by another program",
                hint="choose another port with --portal, or port 0 for a free one",
                exit_code=ExitCode.ADDRESS_IN_USE,
            ) from error
        raise PloopError(
            f"cannot listen on {address}: {error.strerror}",
            hint="choose an address of this machine and a port you may use",
            exit_code=ExitCode.DENIED if error.errno == errno.EACCES else ExitCode.ERROR,
        ) from error
    return listener
