"""The Varlink server of the control socket.

Every connection is one task; nothing that a client does, or leaves undone, holds up another one: a
message must arrive whole within `MESSAGE_SECONDS`, a reply must be taken within `SEND_SECONDS`, and
when all places are taken the connection that has been idle longest makes room.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import trio

from ploopd.control import messages
from ploopd.control.interface import (
    SERVICE_DESCRIPTION,
    SERVICE_INTERFACE,
    control_description,
)
from ploopd.control.protocol import (
    DECODE_ERRORS,
    Call,
    FrameReader,
    ProtocolError,
    Reply,
    decode_call,
    encode,
    encode_parameters,
    error_reply,
    service_error,
)
from ploopd.errors import BusyError, PloopError

MAX_CONNECTIONS = 64
MESSAGE_SECONDS = 30.0
SEND_SECONDS = 10.0
_CHUNK = 1 << 16
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid

log = logging.getLogger(__name__)

Send = Callable[[messages.Message], Awaitable[None]]
Handler = Callable[[Any, Send], Awaitable[messages.Message]]
"""Takes its method's parameters, may send intermediate replies, and returns the last one.

`Send` is harmless when the client did not ask for `more` or has gone away.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A method and what serves it.

    `outlives_client`: a client that goes away does not cancel it, because half of it is worse than
    all of it.  `follower` serves calls with `more` instead of `handler`, until the client goes
    away; it may wait for a client that does not read.
    """

    method: messages.Method
    handler: Handler
    outlives_client: bool = False
    follower: Handler | None = None


@dataclass(eq=False, slots=True)
class _Connection:
    """What the server must know of a connection to choose the one that makes room."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    idle_since: float | None = None


class ControlServer:
    """Serves `operations` on a listening Unix socket to root and to the daemon's own user."""

    def __init__(self, operations: list[Operation], info: messages.ServiceInfo) -> None:
        self._operations: Mapping[str, Operation] = {
            operation.method.qualified_name: operation for operation in operations
        }
        self._info = info
        self._connections: set[_Connection] = set()

    async def serve(
        self,
        listener: socket.socket,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept until cancelled.  The listener stays the caller's."""
        accepting = trio.socket.from_stdlib_socket(listener)
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                try:
                    peer, _ = await accepting.accept()
                except OSError as error:
                    # Out of descriptors or memory: the others' connections will give some back.
                    log.warning("event=control-accept-failed error=%r", str(error))
                    await trio.sleep(0.1)
                    continue
                self._admit(trio.SocketStream(peer), nursery)

    def _admit(self, stream: trio.SocketStream, nursery: trio.Nursery) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            self._make_room()
        connection = _Connection()
        self._connections.add(connection)
        nursery.start_soon(self.serve_stream, stream, connection, nursery)

    def _make_room(self) -> None:
        """Drop the connection that is idle longest; with none idle the newcomer has to wait its
        turn in `serve_stream`, which refuses it."""
        idle = [one for one in self._connections if one.idle_since is not None]
        if idle:
            victim = min(idle, key=lambda one: one.idle_since or 0.0)
            victim.scope.cancel()
            self._connections.discard(victim)

    async def serve_stream(
        self,
        stream: trio.SocketStream,
        connection: _Connection | None = None,
        nursery: trio.Nursery | None = None,
    ) -> None:
        """Serve one connection until it ends, and close it; errors of the peer end only it.

        Operations that outlive their client run in `nursery`.
        """
        if connection is None:
            connection = _Connection()
            self._connections.add(connection)
        try:
            with connection.scope:
                await self._conversation(stream, connection, nursery)
        except (trio.BrokenResourceError, trio.ClosedResourceError, ProtocolError) as error:
            log.debug("event=control-connection-ended error=%r", str(error))
        except trio.TooSlowError:
            log.info("event=control-client-dropped reason=%r", "does not send or read")
        except Exception:
            # Supervisor: a defect ends this connection, not the daemon's disks.
            log.exception("event=control-defect")
        finally:
            self._connections.discard(connection)
            await trio.aclose_forcefully(stream)

    async def _conversation(
        self, stream: trio.SocketStream, connection: _Connection, nursery: trio.Nursery | None
    ) -> None:
        if not _may_control(stream):
            await _send(stream, service_error("PermissionDenied"))
            return
        if len(self._connections) > MAX_CONNECTIONS:
            await _send(stream, error_reply(BusyError("too many control connections")))
            return
        frames = FrameReader()
        deadline = math.inf
        while True:
            connection.idle_since = None if frames.partial else trio.current_time()
            with trio.fail_at(deadline):
                data = await stream.receive_some(_CHUNK)
            connection.idle_since = None
            if not data:
                return
            complete = frames.feed(bytes(data))
            for message in complete:
                await self._answer(stream, decode_call(message), nursery)
            if not frames.partial:
                deadline = math.inf
            elif complete or deadline == math.inf:
                deadline = trio.current_time() + MESSAGE_SECONDS

    async def _answer(
        self, stream: trio.SocketStream, call: Call, nursery: trio.Nursery | None
    ) -> None:
        service = self._service_reply(call)
        if service is not None:
            await self._reply(stream, call, service)
            return
        operation = self._operations.get(call.method)
        if operation is None:
            interface, _, _ = call.method.rpartition(".")
            unknown = (
                service_error("MethodNotFound", method=call.method)
                if interface == messages.INTERFACE
                else service_error("InterfaceNotFound", interface=interface)
            )
            await self._reply(stream, call, unknown)
            return
        try:
            parameters = msgspec.json.decode(call.parameters, type=operation.method.parameters)
        except DECODE_ERRORS as error:
            await self._reply(stream, call, service_error("InvalidParameter", parameter=str(error)))
            return
        if operation.outlives_client and nursery is not None:
            await self._run_detached(stream, call, operation, parameters, nursery)
        else:
            await self._run(stream, call, operation, parameters)

    async def _run(
        self,
        stream: trio.SocketStream,
        call: Call,
        operation: Operation,
        parameters: messages.Message,
    ) -> None:
        """Run the handler; a client that hangs up cancels it."""
        patience = SEND_SECONDS
        if call.more and operation.follower is not None:
            operation = replace(operation, handler=operation.follower)
            patience = math.inf

        async def send(message: messages.Message) -> None:
            if call.more and not call.oneway:
                reply = Reply(parameters=encode_parameters(message), continues=True)
                await _send(stream, reply, patience)

        reply: Reply | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_until_hung_up, stream, nursery.cancel_scope)
            reply = await _outcome(operation, parameters, send)
            nursery.cancel_scope.cancel()
        if reply is not None:
            await self._reply(stream, call, reply)

    async def _run_detached(
        self,
        stream: trio.SocketStream,
        call: Call,
        operation: Operation,
        parameters: messages.Message,
        nursery: trio.Nursery,
    ) -> None:
        """Run the handler outside the connection's cancel scope and forward what it says."""
        sender, receiver = trio.open_memory_channel[Reply](256)

        async def send(message: messages.Message) -> None:
            if call.more:
                _offer(sender, Reply(parameters=encode_parameters(message), continues=True))

        async def run() -> None:
            with sender:
                _offer(sender, await _outcome(operation, parameters, send))

        nursery.start_soon(run)
        async with receiver:
            async for reply in receiver:
                await self._reply(stream, call, reply)

    def _service_reply(self, call: Call) -> Reply | None:
        """The answer to a method of `org.varlink.service`, None for any other method."""
        if call.method == f"{SERVICE_INTERFACE}.GetInfo":
            return Reply(parameters=encode_parameters(self._info))
        if call.method != f"{SERVICE_INTERFACE}.GetInterfaceDescription":
            return None
        try:
            wanted = msgspec.json.decode(call.parameters, type=messages.InterfaceName).interface
        except DECODE_ERRORS:
            return service_error("InvalidParameter", parameter="interface")
        descriptions = {
            SERVICE_INTERFACE: lambda: SERVICE_DESCRIPTION,
            messages.INTERFACE: control_description,
        }
        if wanted not in descriptions:
            return service_error("InterfaceNotFound", interface=wanted)
        description = messages.InterfaceDescription(description=descriptions[wanted]())
        return Reply(parameters=encode_parameters(description))

    async def _reply(self, stream: trio.SocketStream, call: Call, reply: Reply) -> None:
        if not call.oneway:
            await _send(stream, reply)


def _offer(sender: trio.MemorySendChannel[Reply], reply: Reply) -> None:
    """Hand a reply to the connection's task, unless the client is gone or does not read."""
    try:
        sender.send_nowait(reply)
    except (trio.WouldBlock, trio.BrokenResourceError):
        log.debug("event=control-reply-dropped")


async def _outcome(operation: Operation, parameters: messages.Message, send: Send) -> Reply:
    """The last reply: the handler's result, or its error.

    This is a supervisor: a defect in a handler ends that call, not the daemon's disks.
    """
    try:
        return Reply(parameters=encode_parameters(await operation.handler(parameters, send)))
    except PloopError as error:
        return error_reply(error)
    except Exception as error:
        log.exception("event=control-defect method=%s", operation.method.name)
        return error_reply(
            PloopError(f"internal error: {error!r}", hint="the daemon's log has the traceback")
        )


async def _until_hung_up(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
    """Cancel `scope` when the peer closes; data that waits in the socket is left there."""
    while True:
        await trio.lowlevel.wait_readable(stream.socket)
        try:
            waiting = await stream.socket.recv(1, socket.MSG_PEEK)
        except OSError:
            waiting = b""
        if not waiting:
            scope.cancel()
            return
        # A pipelined call: it is answered in its turn, and cannot be told from a hang-up later.
        await trio.sleep(0.1)


async def _send(stream: trio.SocketStream, reply: Reply, patience: float = SEND_SECONDS) -> None:
    with trio.fail_after(patience):
        await stream.send_all(encode(reply))


def _may_control(stream: trio.SocketStream) -> bool:
    """Only root and the user that the daemon runs as may control it (SO_PEERCRED)."""
    data = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    assert isinstance(data, bytes)
    _, uid, _ = _CREDENTIALS.unpack(data)
    return uid in (0, os.geteuid())
