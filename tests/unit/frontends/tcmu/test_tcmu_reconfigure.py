"""Another dev_size while a backstore is served: what the kernel is answered."""

from __future__ import annotations

import errno
import struct

import pytest
import trio
import trio.testing

from ploopd.errors import BusyError, StorageError
from ploopd.frontends.tcmu import netlink, server
from tests.unit.frontends.tcmu.rig import SIZE, Rig
from tests.unit.frontends.tcmu.test_tcmu_netlink import FAMILY, attribute, message

pytestmark = pytest.mark.trio


class Channel:
    """A netlink socket whose other end is the test."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[bytes](8)
        self.replies: list[bytes] = []

    async def recvfrom(self, _size: int) -> tuple[bytes, tuple[int, int]]:
        return await self._receive.receive(), server.KERNEL

    async def sendto(self, data: bytes, _address: tuple[int, int]) -> None:
        await trio.lowlevel.checkpoint()
        self.replies.append(data)

    async def resize(self, size: int) -> int:
        """What echo into dev_size ends with."""
        before = len(self.replies)
        name = attribute(1, b"tcm-user/0/b1/ploop/disk\0")
        numbers = attribute(2, struct.pack("=I", 1)) + attribute(8, struct.pack("=I", 11))
        changed = attribute(5, struct.pack("=Q", size))
        await self._send.send(message(FAMILY.message_type, 3, name, numbers, changed))
        with trio.fail_after(30):
            while len(self.replies) == before:  # noqa: ASYNC110
                await trio.sleep(0.1)
        (status,) = struct.unpack_from("=i", self.replies[-1], 24)
        return int(status)

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
async def channel(
    rig: Rig, clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> Channel:
    """Of a served backstore whose writers wait for replies."""
    channel = Channel()

    async def subscribe() -> tuple[Channel, netlink.Family]:
        await trio.lowlevel.checkpoint()
        return channel, FAMILY

    monkeypatch.setattr(server, "_subscribe", subscribe)
    rig.machine.add(1)
    rig.machine.set(1, "attrib/nl_reply_supported", 1)
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.disk.bound)
    return channel


async def test_a_larger_one_makes_the_disk_grow(rig: Rig, channel: Channel) -> None:
    assert await channel.resize(SIZE) == 0
    assert rig.disk.size == SIZE
    assert await channel.resize(2 * SIZE) == 0
    assert rig.disk.size == 2 * SIZE


async def test_a_smaller_one_is_refused_and_what_is_true_is_written(
    rig: Rig, channel: Channel
) -> None:
    """The kernel has believed it already where nobody waits for an answer."""
    rig.machine.set(1, "attrib/dev_size", SIZE // 2)
    assert await channel.resize(SIZE // 2) == -errno.EINVAL
    assert rig.disk.size == SIZE
    assert rig.machine.value(1, "attrib/dev_size") == str(SIZE)


@pytest.mark.parametrize(
    ("problem", "number"),
    [
        (StorageError(errno.ENOSPC, "grow"), errno.ENOSPC),
        (BusyError("is in standby"), errno.EBUSY),
    ],
)
async def test_what_keeps_it_from_growing_is_the_writers_error(
    rig: Rig, channel: Channel, problem: StorageError | BusyError, number: int
) -> None:
    rig.disk.problem = problem
    rig.machine.set(1, "attrib/dev_size", 2 * SIZE)
    assert await channel.resize(2 * SIZE) == -number
    assert rig.disk.size == SIZE
    assert rig.machine.value(1, "attrib/dev_size") == str(SIZE)
    rig.disk.problem = None
    assert await channel.resize(2 * SIZE) == 0
