"""The server on loopback: portals, many connections, bad peers, shutdown."""

from __future__ import annotations

import errno
import logging
import resource
import socket
import struct
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
import trio.testing

from ploopd.errors import ExitCode, PloopError, UsageError
from ploopd.fileio.buffers import BufferPool
from ploopd.frontends.iscsi import server as server_module
from ploopd.frontends.iscsi.config import ChapAccount, ChapConfig, IscsiConfig, Limits, Portal
from ploopd.frontends.iscsi.connection import Connection
from ploopd.frontends.iscsi.server import IscsiServer
from ploopd.scsi.logical_unit import LogicalUnit
from ploopd.scsi.target import Target
from tests.support.cdb import read_16, write_16
from tests.support.iscsi_client import TARGET, Client
from tests.support.iscsi_transport import ConnectionClosed, SocketTransport
from tests.support.memory_device import Completion, MemoryDevice, pattern

SIZE = 64 << 20
LOOPBACK = (Portal(port=0),)
CONFIG = IscsiConfig(iqn=TARGET, portals=LOOPBACK)


def make_target(device: MemoryDevice) -> Target:
    target = Target(TARGET)
    unit = LogicalUnit(
        device, identity=uuid.UUID(int=1), buffers=BufferPool(), clock=trio.current_time
    )
    target.add_unit(0, unit)
    return target


@asynccontextmanager
async def serving(
    config: IscsiConfig = CONFIG, device: MemoryDevice | None = None
) -> AsyncIterator[tuple[IscsiServer, int]]:
    """A running server and its port."""
    target = make_target(device or MemoryDevice(SIZE))
    server = IscsiServer(config, {TARGET: target})
    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(server.serve)
        yield server, addresses[0][1]
        nursery.cancel_scope.cancel()


def connect(port: int, timeout: float = 10.0) -> Client:
    return Client(SocketTransport("127.0.0.1", port, timeout))


async def in_thread(function: Callable[..., object], *args: object) -> object:
    return await trio.to_thread.run_sync(function, *args)


async def until_left(server: IscsiServer, count: int) -> None:
    """Wait until no more than `count` connections are left; the sockets' peers decide when."""
    with trio.fail_after(5):
        while len(server.connections) > count:  # noqa: ASYNC110 - there is no event for it
            await trio.sleep(0.01)


def use(port: int, isid: int = 1, rounds: int = 5) -> None:
    """A whole session that writes and reads."""
    client = connect(port)
    client.initiator.isid = b"\x80" + isid.to_bytes(5, "big")
    client.login()
    client.clear_attention()
    for i in range(rounds):
        data = pattern(65536, isid * 1000 + i)
        client.write(isid * 4096 + i * 128, data)
        assert client.read(isid * 4096 + i * 128, 128) == data
    assert client.logout().response == 0
    with pytest.raises(ConnectionClosed):
        client.next_pdu()
    client.close()


@pytest.mark.trio
async def test_sessions_over_tcp() -> None:
    async with serving() as (server, port):
        async with trio.open_nursery() as nursery:
            for isid in range(1, 9):
                nursery.start_soon(in_thread, use, port, isid)
        await until_left(server, 0)


@pytest.mark.trio
async def test_completions_that_come_later_are_sent() -> None:
    """The device completes when it is told: outside of any batch of input."""
    device = MemoryDevice(SIZE, inline=False, completion=Completion.MANUAL)
    async with serving(device=device) as (_, port):

        async def storage() -> None:
            while True:
                device.complete()
                await trio.sleep(0.001)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(storage)
            await in_thread(use, port)
            nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_large_transfers_with_a_slow_reader() -> None:
    """More output than sockets and arena hold: nothing is lost and nothing is reordered."""
    device = MemoryDevice(SIZE)
    device.data[:] = pattern(SIZE, 1)

    def session(port: int) -> None:
        client = connect(port)
        client.login()
        client.clear_attention()
        tags, batch = [], b""
        for i in range(60):
            tag, pdu = client.initiator.command(read_16(i * 2048, 2048), read=1 << 20)
            tags.append(tag)
            batch += pdu
        client.send(batch)
        for i, tag in enumerate(tags):
            pdu, data = client.finish(tag)
            assert pdu.status == 0
            assert data == bytes(device.data[i << 20 : (i + 1) << 20])
        client.close()

    async with serving(device=device) as (_, port):
        await in_thread(session, port)


@pytest.mark.trio
async def test_output_that_is_blocked_does_not_block_input() -> None:
    """An initiator that writes while its reads fill the pipe: both directions go on."""
    device = MemoryDevice(SIZE)

    def session(port: int) -> None:
        client = connect(port)
        client.login()
        client.clear_attention()
        data = pattern(262144, 3)
        tags, batch = [], b""
        for _ in range(12):
            tag, pdu = client.initiator.command(read_16(0, 512), read=262144)
            batch += pdu
            tags.append(tag)
        for i in range(40):
            tag, pdu = client.initiator.command(
                write_16(8192 + i * 512, 512), write=262144, data=data
            )
            batch += pdu
            tags.append(tag)
        client.send(batch)  # a blocking send: the target must keep reading
        for tag in tags:
            assert client.finish(tag)[0].status == 0
        client.close()

    async with serving(device=device) as (_, port):
        await in_thread(session, port)
    assert bytes(device.data[4 << 20 : (4 << 20) + 262144]) == pattern(262144, 3)


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


def logged_in(port: int) -> Client:
    client = connect(port)
    client.login()
    client.clear_attention()
    return client


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
@pytest.mark.parametrize("method", ["data_to_send", "on_timeout"])
async def test_a_defect_outside_of_the_connections_task_ends_one_connection_only(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
        real = getattr(Connection, method)

        def poisoned(self: Connection, *arguments: float) -> object:
            if self is victim:
                raise ZeroDivisionError("scripted defect")
            return real(self, *arguments)

        monkeypatch.setattr(Connection, method, poisoned)
        device.complete()
        with trio.fail_after(5):
            await until_left(server, 1)
        await in_thread(other.nop)
        client.close()
        other.close()
    assert "scripted defect" in caplog.text


def logged_in_as(port: int, number: int) -> Client:
    client = connect(port)
    client.initiator.isid = b"\x80" + number.to_bytes(5, "big")
    client.login()
    client.clear_attention()
    return client


@pytest.mark.trio
async def test_shutdown_asks_for_logout_and_then_closes() -> None:
    seen: list[int] = []

    def session(port: int, ready: Callable[[], None]) -> None:
        client = logged_in(port)
        ready()
        try:
            while True:
                pdu = client.next_pdu()
                assert pdu.opcode == 0x32
                seen.append(pdu.bhs[36])
        except ConnectionClosed:
            client.close()

    target = make_target(MemoryDevice(SIZE))
    server = IscsiServer(CONFIG, {TARGET: target})
    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(server.serve)
        port = addresses[0][1]
        ready = trio.Event()
        token = trio.lowlevel.current_trio_token()
        nursery.start_soon(in_thread, session, port, lambda: token.run_sync_soon(ready.set))
        await ready.wait()
        await server.shutdown(0.2)
        with pytest.raises(OSError):
            await in_thread(connect, port)
    assert seen == [1, 3]
    assert target.nexuses == []


@pytest.mark.trio
async def test_shutdown_without_connections_is_immediate(
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = IscsiServer(CONFIG, {TARGET: make_target(MemoryDevice(SIZE))})
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        start = trio.current_time()
        await server.shutdown(30)
        assert trio.current_time() == start


@pytest.mark.trio
async def test_a_port_that_is_taken() -> None:
    async with serving() as (_, port):
        config = replace(CONFIG, portals=(Portal(port=port),))
        with pytest.raises(PloopError) as caught:
            await IscsiServer(config, {}).serve()
    assert caught.value.exit_code == ExitCode.ADDRESS_IN_USE
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "--portal" in str(caught.value)


@pytest.mark.trio
@pytest.mark.parametrize("host", ["192.0.2.77", "no.such.host.invalid"])
async def test_addresses_that_cannot_be_bound(host: str) -> None:
    config = replace(CONFIG, portals=(Portal(host=host, port=0),), insecure=True)
    with pytest.raises(PloopError) as caught:
        await IscsiServer(config, {}).serve()
    assert host in str(caught.value)


@pytest.mark.trio
async def test_ipv6_and_several_portals() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    config = replace(CONFIG, portals=(Portal(port=0), Portal(host="::1", port=0)))
    server = IscsiServer(config, {TARGET: make_target(MemoryDevice(SIZE))})

    def discover(port: int) -> list[str]:
        client = Client(SocketTransport("::1", port), target=None)
        client.login()
        items = client.text_items(["SendTargets=All"])
        client.close()
        return items

    async with trio.open_nursery() as nursery:
        (_, v4), (_, v6) = await nursery.start(server.serve)
        items = await in_thread(discover, v6)
        assert items == [
            f"TargetName={TARGET}",
            f"TargetAddress=127.0.0.1:{v4},1",
            f"TargetAddress=[::1]:{v6},1",
        ]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "disk.example"])
def test_open_portals_need_a_reason(host: str) -> None:
    config = replace(CONFIG, portals=(Portal(host=host, port=0),))
    with pytest.raises(PloopError, match="insecure") as caught:
        IscsiServer(config, {})
    assert caught.value.exit_code == ExitCode.CONFIG
    IscsiServer(replace(config, insecure=True), {})
    IscsiServer(replace(config, acl=()), {})
    account = ChapAccount(user="alice", secret=b"correct horse battery")
    IscsiServer(replace(config, chap=ChapConfig(accounts=(account,))), {})


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_loopback_is_open_by_default(host: str) -> None:
    IscsiServer(replace(CONFIG, portals=(Portal(host=host, port=0),)), {})


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, iqn="not a name"),
        replace(CONFIG, iqn="IQN.2026-11.org.example:x"),
        replace(CONFIG, tpgt=70000),
        replace(CONFIG, acl=("nobody",)),
    ],
)
def test_bad_configurations(config: IscsiConfig) -> None:
    with pytest.raises(UsageError):
        IscsiServer(config, {})


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


class CountedStorage:
    """Completes what the device holds when it is asked for the third time."""

    def __init__(self, device: MemoryDevice) -> None:
        self.device = device
        self.asked = 0
        self.completed = 0

    def ready(self) -> int:
        self.asked += 1
        return len(self.device.outstanding) if self.asked % 3 == 0 else 0

    def kick(self) -> None:
        self.completed += self.device.complete()


@pytest.mark.trio
async def test_a_reader_that_looks_for_input_answers_what_the_storage_completes() -> None:
    device = MemoryDevice(SIZE, completion=Completion.MANUAL, inline=False)
    storage = CountedStorage(device)
    server = IscsiServer(CONFIG, {TARGET: make_target(device)}, storage=storage)

    async def complete_the_rest() -> None:
        """Readers do not always look."""
        while True:
            await trio.sleep(0.05)
            device.complete()

    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(server.serve)
        nursery.start_soon(complete_the_rest)
        with trio.fail_after(20):
            await in_thread(use, addresses[0][1])
        nursery.cancel_scope.cancel()
    assert storage.completed
