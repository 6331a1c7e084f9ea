"""Where an iSCSI initiator's bytes go: a socket, or the target's engine in the same process."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Protocol


class ConnectionClosed(Exception):  # noqa: N818
    """The target closed the connection."""


class Transport(Protocol):
    """Bytes to and from the target."""

    def send(self, data: bytes) -> None: ...

    def receive(self) -> bytes:
        """Some bytes; raises `ConnectionClosed`."""
        ...

    def close(self) -> None: ...


class SocketTransport:
    """A blocking TCP connection; `receive` raises TimeoutError after `timeout` seconds."""

    def __init__(self, host: str, port: int, timeout: float = 10.0) -> None:
        self.socket = socket.create_connection((host, port), timeout=timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ConnectionClosed from error

    def receive(self) -> bytes:
        try:
            data = self.socket.recv(1 << 20)
        except ConnectionResetError as error:
            raise ConnectionClosed from error
        if not data:
            raise ConnectionClosed
        return data

    def close(self) -> None:
        self.socket.close()


class Engine(Protocol):
    """The target's `Connection`, as far as a transport needs it."""

    def receive_buffer(self) -> memoryview: ...

    def received(self, count: int, now: float) -> None: ...

    def process(self, now: float) -> None: ...

    def data_to_send(self) -> list[memoryview]: ...

    def sent(self, count: int) -> bool: ...

    @property
    def wants_close(self) -> bool: ...


class EngineTransport:
    """The target's engine in this process.  `step`: at most so many bytes go in at once."""

    def __init__(
        self, engine: Engine, *, clock: Callable[[], float] = lambda: 0.0, step: int = 1 << 30
    ) -> None:
        self.engine = engine
        self.clock = clock
        self.step = step

    def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if self.engine.wants_close:
                return
            space = self.engine.receive_buffer()
            assert space, "the engine takes no more input"
            count = min(len(space), len(view), self.step)
            space[:count] = view[:count]
            self.engine.received(count, self.clock())
            view = view[count:]

    def receive(self) -> bytes:
        pieces = self.engine.data_to_send()
        out = b"".join(pieces)
        if out:
            self.engine.sent(len(out))
            if getattr(self.engine, "paused", False):
                self.engine.process(self.clock())
            return out
        if self.engine.wants_close:
            raise ConnectionClosed
        raise AssertionError("nothing to receive and nothing to wait for")

    def close(self) -> None:
        """Nothing to close."""
