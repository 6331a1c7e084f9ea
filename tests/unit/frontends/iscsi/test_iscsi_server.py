"""The server on loopback: sessions over TCP, portals, configurations, shutdown."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace

import pytest
import trio
import trio.testing

from ploopd.errors import ExitCode, PloopError, UsageError
from ploopd.frontends.iscsi.config import ChapAccount, ChapConfig, IscsiConfig, Portal
from ploopd.frontends.iscsi.server import IscsiServer
from tests.support.cdb import read_16, write_16
from tests.support.iscsi_client import TARGET, Client
from tests.support.iscsi_transport import ConnectionClosed, SocketTransport
from tests.support.memory_device import Completion, MemoryDevice, pattern
from tests.unit.frontends.iscsi.server_rig import (
    CONFIG,
    SIZE,
    connect,
    in_thread,
    logged_in,
    make_target,
    serving,
    until_left,
    use,
)


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


class CountedStorage:
    """Completes what the device holds when it is asked for the third time."""

    def __init__(self, device: MemoryDevice) -> None:
        self.interlude: Callable[[], None] | None = None
        self.collecting = False
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
