"""A server on loopback, and initiators that talk to it from threads."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from ploopd.fileio.buffers import BufferPool
from ploopd.frontends.iscsi.config import IscsiConfig, Portal
from ploopd.frontends.iscsi.server import IscsiServer
from ploopd.scsi.logical_unit import LogicalUnit
from ploopd.scsi.target import Target
from tests.support.iscsi_client import TARGET, Client
from tests.support.iscsi_transport import ConnectionClosed, SocketTransport
from tests.support.memory_device import MemoryDevice, pattern

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


def logged_in(port: int) -> Client:
    client = connect(port)
    client.login()
    client.clear_attention()
    return client


def logged_in_as(port: int, number: int) -> Client:
    client = connect(port)
    client.initiator.isid = b"\x80" + number.to_bytes(5, "big")
    client.login()
    client.clear_attention()
    return client
