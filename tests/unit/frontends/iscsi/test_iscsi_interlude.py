"""Between groups of completions: answers leave and commands arrive without a turn of the loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from ploopd.frontends.iscsi import server as server_module
from ploopd.frontends.iscsi.server import IscsiServer
from tests.support.cdb import read_16
from tests.support.iscsi_client import TARGET, Client
from tests.support.memory_device import Completion, MemoryDevice
from tests.unit.frontends.iscsi.server_rig import (
    CONFIG,
    SIZE,
    in_thread,
    logged_in_as,
    make_target,
    until_left,
)


class GroupedStorage:
    """Completes what its device holds when it is told to, as the engine does when it is woken."""

    def __init__(self) -> None:
        self.device = MemoryDevice(SIZE, completion=Completion.MANUAL, inline=False)
        self.interlude: Callable[[], None] | None = None
        self.collecting = False

    def ready(self) -> int:
        return 0

    def kick(self) -> None:
        raise AssertionError("nothing is ready")

    def collect(self, count: int | None = None, then: Completion = Completion.MANUAL) -> None:
        """Complete `count` operations (all when None); what comes `then` completes like that."""
        assert self.interlude is not None
        self.collecting = True
        self.device.complete(count)
        self.device.completion = then
        self.interlude()
        self.collecting = False

    async def received(self, count: int) -> None:
        """Wait until `count` commands wait for the device; the network decides when."""
        with trio.fail_after(10):
            while len(self.device.outstanding) < count:  # noqa: ASYNC110 - no event for it
                await trio.sleep(0.01)


@asynccontextmanager
async def serving(clients: int) -> AsyncIterator[tuple[GroupedStorage, IscsiServer, list[Client]]]:
    """A storage, a server, and initiators that have logged in."""
    storage = GroupedStorage()
    server = IscsiServer(CONFIG, {TARGET: make_target(storage.device)}, storage=storage)
    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(server.serve)
        found = [await in_thread(logged_in_as, addresses[0][1], n) for n in range(clients)]
        yield storage, server, [each for each in found if isinstance(each, Client)]
        nursery.cancel_scope.cancel()


def read(client: Client, lba: int) -> int:
    """Send a READ of 4 KiB, which has arrived when this returns; its tag."""
    tag, pdu = client.initiator.command(read_16(lba, 8), read=4096)
    client.send(pdu)
    return tag


@pytest.mark.trio
async def test_an_interlude_answers_and_takes_new_commands() -> None:
    async with serving(2) as (storage, _, clients):
        first = [read(client, 0) for client in clients]
        await storage.received(2)
        second = [read(client, 8) for client in clients]
        assert len(storage.device.outstanding) == 2, "nobody has looked since"
        for tags, offsets in ((first, [4096, 4096]), (second, [])):
            storage.collect()
            assert [each.offset for each in storage.device.outstanding] == offsets
            for client, tag in zip(clients, tags, strict=True):
                assert client.finish(tag)[0].status == 0  # the loop stands still meanwhile
        for client in clients:
            client.close()


@pytest.mark.trio
async def test_an_interlude_sees_the_end_of_a_connection() -> None:
    async with serving(1) as (storage, server, (client,)):
        read(client, 0)
        await storage.received(1)
        client.close()
        storage.collect()
        await until_left(server, 0)


@pytest.mark.trio
async def test_what_an_interlude_completes_for_others_is_sent_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One connection's input ends a command of another one, and no interlude follows."""
    monkeypatch.setattr(server_module, "TICK", 60.0)  # it sends what was forgotten
    async with serving(2) as (storage, _, (one, other)):
        first = read(one, 0)
        await storage.received(1)
        waiting = read(other, 0)
        await storage.received(2)
        second = read(one, 8)
        storage.collect(1, then=Completion.ON_KICK)
        assert storage.device.outstanding == []
        for client, tag in ((one, first), (one, second), (other, waiting)):
            with trio.fail_after(20):
                answer = await in_thread(client.finish, tag)
            assert isinstance(answer, tuple)
            assert answer[0].status == 0
            if client is other:
                client.close()
        one.close()
