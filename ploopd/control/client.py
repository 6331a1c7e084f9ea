"""The control client: plain blocking sockets; importing trio would cost more than the call."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from ploopd.control.messages import Empty, Message, Method
from ploopd.control.paths import check_private_directory, default_control_path
from ploopd.control.protocol import (
    Call,
    FrameReader,
    Reply,
    decode_reply,
    encode,
    encode_parameters,
    error_from_reply,
)
from ploopd.errors import DeniedError, ExitCode, PloopError, UsageError

DEFAULT_TIMEOUT = 30.0
_CHUNK = 1 << 16
_EMPTY = Empty()

ReplyT = TypeVar("ReplyT", bound=Message)


class ControlClient:
    """One connection to a daemon; a context manager.

    All methods raise the `PloopError` that the daemon raised, one with exit code 3 when no daemon
    answers at `path`, and one with exit code 7 when an answer takes longer than `timeout` seconds.
    """

    def __init__(self, path: Path | None = None, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.path = path or default_control_path()
        self.timeout = timeout
        # Root's is in /run, where only root makes one, for a daemon that is another user's, too.
        if path is None and os.geteuid() != 0 and self.path.parent.exists():
            check_private_directory(self.path.parent)
        self._frames = FrameReader()
        self._queue: list[bytes] = []
        self._socket = _connect(self.path, timeout)

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def call(
        self, method: Method, reply: type[ReplyT], parameters: Message = _EMPTY, *, waiting: str
    ) -> ReplyT:
        """Call `method`; `waiting` completes "waited 30 s for …" should the answer not come."""
        self._send(method, parameters, more=False)
        return self._receive(reply, time.monotonic() + self.timeout, waiting)[0]

    def stream(
        self,
        method: Method,
        reply: type[ReplyT],
        parameters: Message,
        *,
        waiting: str,
        patient: bool = False,
    ) -> Iterator[ReplyT]:
        """Call `method` with `more` and yield its replies; the time limit is for each of them,
        `patient` has none."""
        self._send(method, parameters, more=True)
        limit = math.inf if patient else self.timeout
        continues = True
        while continues:
            message, continues = self._receive(reply, time.monotonic() + limit, waiting)
            yield message

    def _send(self, method: Method, parameters: Message, *, more: bool) -> None:
        try:
            raw = encode_parameters(parameters, exact=True)
        except UnicodeEncodeError as error:
            raise UsageError(
                "only names in UTF-8 can be sent to the daemon", field="name", value=error.object
            ) from error
        call = Call(method=method.qualified_name, parameters=raw, more=more)
        self._socket.settimeout(self.timeout)
        try:
            self._socket.sendall(encode(call))
        except TimeoutError as error:
            raise self._timeout("the daemon to read the call") from error
        except OSError as error:
            raise self._gone() from error

    def _receive(self, kind: type[ReplyT], deadline: float, waiting: str) -> tuple[ReplyT, bool]:
        reply = self._receive_reply(deadline, waiting)
        if reply.error is not None:
            raise error_from_reply(reply)
        try:
            return msgspec.json.decode(reply.parameters, type=kind), reply.continues
        except msgspec.DecodeError as error:
            raise PloopError(
                f"the daemon's answer cannot be read: {error}",
                path=self.path,
                hint="are ploopd and ploopctl of the same version?",
            ) from error

    def _receive_reply(self, deadline: float, waiting: str) -> Reply:
        while not self._queue:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise self._timeout(waiting)
            self._socket.settimeout(None if remaining == math.inf else remaining)
            try:
                data = self._socket.recv(_CHUNK)
            except TimeoutError as error:
                raise self._timeout(waiting) from error
            except OSError as error:
                raise self._gone() from error
            if not data:
                raise self._gone()
            self._queue.extend(self._frames.feed(data))
        return decode_reply(self._queue.pop(0))

    def _timeout(self, waiting: str) -> PloopError:
        return PloopError(
            f"waited {self.timeout:g} s for {waiting}",
            path=self.path,
            hint="give it longer with --timeout SECONDS",
            exit_code=ExitCode.TIMEOUT,
        )

    def _gone(self) -> PloopError:
        return PloopError(
            "the daemon closed the connection before it answered",
            path=self.path,
            hint="see the daemon's log",
            exit_code=ExitCode.NOT_RUNNING,
        )


def _connect(path: Path, timeout: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    try:
        connection.connect(os.fspath(path))
    except OSError as error:
        connection.close()
        raise _connect_error(error, path, timeout) from error
    return connection


def _connect_error(error: OSError, path: Path, timeout: float) -> PloopError:
    if isinstance(error, PermissionError):
        return DeniedError(
            "permission denied", path=path, hint="use the daemon's user or root (sudo ploopctl …)"
        )
    if isinstance(error, TimeoutError | BlockingIOError):
        return PloopError(
            f"waited {timeout:g} s for the daemon to accept the connection",
            path=path,
            exit_code=ExitCode.TIMEOUT,
        )
    if isinstance(error, FileNotFoundError | ConnectionRefusedError | NotADirectoryError):
        return PloopError(
            "no daemon listens here",
            path=path,
            hint="start one with `ploopd serve IMAGE` or name its socket with --control",
            exit_code=ExitCode.NOT_RUNNING,
        )
    return PloopError(
        f"cannot connect: {error.strerror or error}", path=path, exit_code=ExitCode.NOT_RUNNING
    )
