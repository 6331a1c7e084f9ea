"""One accepted socket and the connection behind it: the system calls that move its bytes.

Everything is tried at once and never waits; whoever calls sleeps where `receive` found nothing or
`flush` was refused.
"""

from __future__ import annotations

import errno
import fcntl
import socket
import sys
import termios
import time
from collections.abc import Callable
from typing import Final, Protocol

import trio

from ploopd.fileio.polling import WINDOW, AdaptivePoll
from ploopd.frontends.iscsi.connection import Connection
from ploopd.sleeper import Sleeper

_GROUP: Final = 8
"""Completed commands that are answered together, if so many are under way: they share the system
calls."""
_TOGETHER: Final = 2
"""WRITEs whose data is received directly that are answered together."""
_ROOM: Final = 1 << 20
"""Bytes that the kernel shall keep for a connection with large WRITEs."""
_PATIENCE: Final = 50e-6
"""Seconds in which the rest of a WRITE arrives over the loopback interface."""
_NOW: Final = -1.0
"""Time until which there is nothing to wait for."""
_MOST_POLLING: Final = 2e-3
"""Seconds after which a reader that looks for input gives way, whatever the storage completes."""


class Storage(Protocol):
    """Whatever executes the commands (`fileio.engine.IoEngine`)."""

    interlude: Callable[[], None] | None
    collecting: bool

    def ready(self) -> int:
        """How many operations have completed and wait for `kick`."""
        ...

    def kick(self) -> None: ...


class Link:
    """See the module's docstring.

    `blocked`: the kernel takes no more output; the writer sleeps on `writable` until then.  `full`:
    the last `receive` found no room for input; the reader sleeps on `room` until output has left.
    `ended`: why there will be no more input.  `scope` is that of the connection's tasks.
    """

    __slots__ = (
        "_until",
        "_wide",
        "blocked",
        "clock",
        "ended",
        "engine",
        "full",
        "portal",
        "room",
        "scope",
        "sock",
        "writable",
    )

    def __init__(
        self, sock: socket.socket, portal: tuple[str, int], clock: Callable[[], float]
    ) -> None:
        self.sock = sock
        self.portal = portal
        self.clock = clock
        self.engine: Connection
        self.blocked = False
        self.full = False
        self.ended: str | None = None
        self._wide = False
        self._until = 0.0
        self.writable = Sleeper()
        self.room = Sleeper()
        self.scope = trio.CancelScope()

    def receive(self) -> bool:
        """Handle what has arrived, as one batch, and answer it; False if there is nothing."""
        engine = self.engine
        if engine.missing:
            if self._receive_direct():
                return True
            if self._soon():
                self.full = False
                return False
        space = engine.receive_buffer()
        self.full = engine.paused or not space
        if self.full:
            return False
        try:
            count = self.sock.recv_into(space)
        except BlockingIOError:
            return False
        except OSError as error:
            self.ended = f"receive failed: {error.strerror}"
            return True
        if count == 0:
            self.ended = "the initiator closed the connection"
            return True
        before = engine.missing
        engine.received(count, self.clock())
        if engine.missing != before - count:
            self._until = 0.0  # it is another WRITE, or none
        self.flush()
        return True

    def _receive_direct(self) -> bool:
        """Receive WRITEs that the socket has all the data of; False if there are none, and the
        ordinary way says what there is."""
        engine, done, failed = self.engine, 0, False
        while done < _TOGETHER and 0 < engine.missing <= self._arrived():
            count = self._receive_in_place()
            failed = count < 0 or not engine.received_direct(count, self.clock())
            if failed:
                break
            done += 1
        if failed:
            self._until = _NOW
        elif done:
            self._until = 0.0
        if done:
            self.flush()
        return done > 0

    def _receive_in_place(self) -> int:
        """The bytes that have been received into the engine's direct buffers, -1 for none."""
        buffers = self.engine.direct_buffers()
        if not buffers:
            return -1
        try:
            return self.sock.recvmsg_into(buffers)[0]
        except OSError:
            return -1

    def _soon(self) -> bool:
        """Whether to wait until the socket has all of a WRITE's data: once for each, not for long,
        because the network may be slow."""
        now = time.perf_counter()
        if not self._until:
            self._widen()
            self._until = now + _PATIENCE
        return now < self._until

    def _widen(self) -> None:
        """Let the kernel keep more for us than it does by itself.

        Its buffer grows by how much is read at once, and what is read directly is never more than
        fits into the first one.  A low-water mark, unlike SO_RCVBUF, only makes room: it sets no
        limit, and needs no privilege.
        """
        if not self._wide:
            self._wide = True
            for mark in (_ROOM, 1):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, mark)

    def _arrived(self) -> int:
        """How many bytes the socket has."""
        found = fcntl.ioctl(self.sock.fileno(), termios.FIONREAD, bytes(4))
        return int.from_bytes(found, sys.byteorder)

    def respond(self) -> None:
        """Send what has been completed, and take the commands that the initiator sends on it.

        Between groups of completions: the storage gets new work before all of its old work has been
        answered.
        """
        self.flush()
        self.room.wake()
        if not self.blocked and not self.engine.wants_close and self.receive() and self.ended:
            self.scope.cancel()

    def flush(self) -> None:
        """Send what can be sent; go on with input that waited for output to leave.

        Ends the connection when the engine is done with it.  Never raises.
        """
        engine = self.engine
        while not self.blocked:
            if not self._send():
                break
            if not engine.paused or engine.wants_close:
                break
            engine.process(self.clock())
        if engine.wants_close and (engine.aborted or not self.blocked):
            self.scope.cancel()

    def _send(self) -> bool:
        """Send until nothing is left; False if the kernel takes no more or the peer is gone."""
        engine, sock = self.engine, self.sock
        try:
            while pieces := engine.data_to_send():
                count = sock.send(pieces[0]) if len(pieces) == 1 else sock.sendmsg(pieces)
                if engine.sent(count):
                    break
        except BlockingIOError:
            self.blocked = True
            self.writable.wake()
            engine.keep_views()
            return False
        except OSError as error:
            if error.errno == errno.EFAULT and engine.keep_views():
                return self._send()
            engine.abort(f"send failed: {error.strerror}")
            return False
        return True

    def poll(self, patience: AdaptivePoll, storage: Storage | None) -> bool:
        """Try to receive for a moment; False: there is nothing, sleep.

        Only where nobody else can be waiting for the loop: a single connection.  What the storage
        completes meanwhile is answered, several commands at a time if many are under way.
        """
        engine = self.engine
        executing = engine.executing
        if (executing and storage is None) or not patience.wanted():
            return False
        now = time.perf_counter
        last = begin = now()
        while (time_now := now()) < last + WINDOW and time_now < begin + _MOST_POLLING:
            ready = storage.ready() if executing and storage is not None else 0
            if ready and (ready >= min(_GROUP, executing // 2) or time_now > last + WINDOW / 4):
                assert storage is not None
                engine.collect(storage.kick)
                self.flush()
                if engine.wants_close or self.blocked:
                    return False
                executing = engine.executing
                last = now()
            if self.receive():
                patience.ended(True)
                return True
            if self.full:
                return False
        patience.ended(last > begin)
        return False
