"""What the server outlives: bad peers, crowds, no descriptors, defects, cut connections."""

from __future__ import annotations

import errno
import logging
import resource
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest
import trio
import trio.testing

from ploopd.frontends.iscsi import server as server_module
from ploopd.frontends.iscsi.config import Limits
from ploopd.frontends.iscsi.connection import Connection
from ploopd.frontends.iscsi.link import Link
from tests.support.cdb import read_16
from tests.support.iscsi_client import Client
from tests.support.iscsi_transport import ConnectionClosed, SocketTransport
from tests.support.memory_device import Completion, MemoryDevice
from tests.unit.frontends.iscsi.server_rig import (
    CONFIG,
    SIZE,
    in_thread,
    logged_in,
    logged_in_as,
    serving,
    until_left,
    use,
)

BAD_STARTS = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b" " * 100,
    "tls": bytes.fromhex("16030100f8010000f40303") + bytes(100),
    "zeros": bytes(4096),
    "ones": b"\xff" * 4096,
    "huge segment": b"\x43\x87\0\0\0\xff\xff\xff" + bytes(40),
    "additional headers": b"\x43\x87\0\0\xff\0\0\0" + bytes(40),
}


@pytest.mark.trio
@pytest.mark.parametrize("name", list(BAD_STARTS))
async def test_bad_peers_are_dropped_and_others_go_on(name: str) -> None:
    def attack(port: int) -> None:
        transport = SocketTransport("127.0.0.1", port)
        transport.send(BAD_STARTS[name])
        with pytest.raises(ConnectionClosed):
            transport.receive()
        transport.close()

    async with serving() as (_, port), trio.open_nursery() as nursery:
        nursery.start_soon(in_thread, use, port, 1, 20)
        for _ in range(5):
            nursery.start_soon(in_thread, attack, port)


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Both ends of a thousand connections; a login shell has 1024 descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip(f"only {hard} open files are allowed here (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.trio
async def test_a_thousand_idle_connections(many_descriptors: None) -> None:
    """Most are refused at once, the rest costs little, a session goes on and logins still work."""
    limits = Limits(unauthenticated=100, unauthenticated_per_source=50)
    config = replace(CONFIG, limits=limits)

    def crowd(port: int) -> list[socket.socket]:
        return [socket.create_connection(("127.0.0.1", port)) for _ in range(1000)]

    async with serving(config) as (server, port):
        client = await in_thread(logged_in, port)
        assert isinstance(client, Client)
        sockets = await in_thread(crowd, port)
        assert isinstance(sockets, list)
        try:
            with trio.fail_after(20):
                await in_thread(client.nop)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert len(server.connections) == 51
            memory = sum(
                connection._tx.size + connection._receiver.size
                for connection in server.connections
                if not connection.authenticated
            )
            assert memory <= 50 * 64 * 1024
        finally:
            for sock in sockets:
                sock.close()
        await until_left(server, 1)
        await in_thread(use, port, 2)
        await in_thread(client.read, 0, 8)
        client.close()


@pytest.mark.trio
async def test_slow_logins_end_after_their_deadline(autojump_clock: trio.testing.MockClock) -> None:
    async with serving() as (server, port):
        sock = trio.socket.socket()
        await sock.connect(("127.0.0.1", port))
        start = trio.current_time()
        while not server.connections:
            await trio.lowlevel.checkpoint()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):  # noqa: PT012
            while True:  # one byte a second keeps no login alive
                await sock.send(b"\x43")
                await trio.sleep(1)
        assert 14 <= trio.current_time() - start <= 20
        sock.close()


@pytest.mark.trio
async def test_running_out_of_descriptors_does_not_end_the_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """accept(2) fails with EMFILE for a while, as it does when the process has no descriptors."""
    failures = [errno.EMFILE, errno.ENFILE, errno.ECONNABORTED]
    real = socket.socket.accept

    def accept(self: socket.socket) -> object:
        if failures:
            raise OSError(failures.pop(0), "scripted")
        return real(self)

    monkeypatch.setattr(server_module, "RESOURCE_PAUSE", 0.01)
    monkeypatch.setattr(socket.socket, "accept", accept)
    with caplog.at_level(logging.WARNING):
        async with serving() as (_, port):
            await in_thread(use, port)
    assert not failures
    assert sum("cannot accept" in message for message in caplog.messages) == 2


@pytest.mark.trio
async def test_a_defect_ends_one_connection_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def poisoned(offset: int, buffer: memoryview) -> bool:
        if offset == 512 * 666:
            raise ZeroDivisionError("scripted defect")
        return False

    device = MemoryDevice(SIZE)
    monkeypatch.setattr(device, "try_read", poisoned)

    def trigger(port: int) -> None:
        client = logged_in(port)
        with pytest.raises(ConnectionClosed):
            client.read(666, 1)
        client.close()

    async with serving(device=device) as (server, port):
        other = await in_thread(logged_in_as, port, 9)
        assert isinstance(other, Client)
        await in_thread(trigger, port)
        await in_thread(other.read, 0, 8)
        assert len(server.connections) == 1
        other.close()
    assert "scripted defect" in caplog.text


@pytest.mark.trio
@pytest.mark.parametrize(("kind", "method"), [(Link, "flush"), (Connection, "on_timeout")])
async def test_a_defect_outside_of_the_connections_task_ends_one_connection_only(
    kind: type,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the task that sends what completions queued, and in the one that looks at the clocks."""
    monkeypatch.setattr(server_module, "TICK", 0.05)
    device = MemoryDevice(SIZE, inline=False, completion=Completion.MANUAL)
    async with serving(device=device) as (server, port):
        other = await in_thread(logged_in_as, port, 9)
        assert isinstance(other, Client)
        (innocent,) = server.connections
        client = await in_thread(logged_in, port)
        assert isinstance(client, Client)
        _, pdu = client.initiator.command(read_16(0, 8), read=4096)
        client.send(pdu)
        while not device.outstanding:  # noqa: ASYNC110 - the server is not to know
            await trio.sleep(0.01)
        (victim,) = [each for each in server.connections if each is not innocent]
        real = getattr(kind, method)

        def poisoned(self: Connection | Link, *arguments: float) -> object:
            if victim in (self, getattr(self, "engine", None)):
                raise ZeroDivisionError("scripted defect")
            return real(self, *arguments)

        monkeypatch.setattr(kind, method, poisoned)
        device.complete()
        with trio.fail_after(5):
            await until_left(server, 1)
        await in_thread(other.nop)
        client.close()
        other.close()
    assert "scripted defect" in caplog.text


@pytest.mark.trio
async def test_connections_that_are_cut_at_any_point() -> None:
    """Resets and half-closed sockets leave nothing behind."""

    def cut(port: int, how: str) -> None:
        client = logged_in_as(port, 100)
        sock = client.transport.socket  # type: ignore[attr-defined]
        _, pdu = client.initiator.command(read_16(0, 2048), read=1 << 20)
        client.send(pdu * 1 + pdu[:10])
        match how:
            case "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
            case "half":
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 20):
                    pass
                sock.close()
            case _:
                sock.close()

    async with serving() as (server, port):
        for how in ("reset", "half", "close"):
            await in_thread(cut, port, how)
        await until_left(server, 0)
        await in_thread(use, port)
