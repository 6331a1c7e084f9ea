"""What becomes of commands that are parked when the daemon ends: none of them fails."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from ploopd.frontends.tcmu.server import TcmuServer
from ploopd.gate.events import Event
from ploopd.gate.filter import Gate
from ploopd.gate.state import GateState
from ploopd.scsi.logical_unit import LogicalUnit
from scst_shim import QueueFlags, StandbyCheck
from tests.support.fake_tcmu import FakeKernel
from tests.support.memory_device import Completion, MemoryDevice
from tests.unit.frontends.tcmu.rig import READ, SIZE, Daemon, Disk, Machine, Rig
from tests.unit.scsi.harness import IDENTITY, Bench, ManualClock, TestBuffers, cdb10, make_bench

BUSY = 8
WRITE = cdb10(0x2A, 0, 8)[:10]

pytestmark = pytest.mark.trio


class GatedDisk(Disk):
    """A disk whose requests wait at a real gate when its storage fails."""

    def __init__(self, name: str) -> None:
        check = StandbyCheck()
        check.enable()
        device = MemoryDevice(SIZE, completion=Completion.MANUAL, inline=False)
        self.events: list[Event] = []
        self.gate = Gate(
            device,
            name=name,
            fuses=QueueFlags(name, check),
            clock=trio.current_time,
            on_event=self.events.append,
        )
        plain = make_bench(SIZE)
        unit = LogicalUnit(self.gate, identity=IDENTITY, buffers=TestBuffers(), clock=ManualClock())
        super().__init__(name, Bench(device, TestBuffers(), unit, plain.target))

    def bind(self) -> None:
        super().bind()
        self.gate.bind()

    def unbind(self) -> None:
        super().unbind()
        self.gate.unbind()  # what is still parked fails here


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    machine = Machine(tmp_path)
    daemon = Daemon({"disk": GatedDisk("disk")})
    async with trio.open_nursery() as nursery:
        state = tmp_path / "state"
        yield Rig(machine, daemon, state, nursery, TcmuServer(daemon, state, kernel=machine))
        nursery.cancel_scope.cancel()


async def begin(rig: Rig) -> tuple[FakeKernel, GatedDisk, MemoryDevice]:
    """A read and a write in execution."""
    disk = rig.disk
    assert isinstance(disk, GatedDisk)
    fake = rig.machine.add(1)
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: disk.bound)
    fake.command(READ, expect=4096)
    fake.command(WRITE, out=bytes(4096))
    rig.file.kernel_end.send(b"\1\0\0\0")
    device = disk.bench.device
    await rig.until(lambda: len(device.outstanding) == 2)
    return fake, disk, device


async def test_an_end_without_a_drain_leaves_them_in_the_ring(
    rig: Rig, clock: trio.testing.MockClock
) -> None:
    async with trio.open_nursery() as rig.nursery:
        fake, disk, device = await begin(rig)
        device.fail(None, errno.EIO, times=None)
        device.complete()
        assert (disk.gate.state, disk.gate.parked_count) == (GateState.STANDBY, 2)
        rig.nursery.cancel_scope.cancel()
    assert not disk.bound
    fake.harvest()
    assert not fake.answers, "the next daemon has the kernel answer them BUSY"
    assert not list(rig.state.glob("*.json"))


async def test_a_storage_that_fails_while_the_daemon_ends(
    rig: Rig, clock: trio.testing.MockClock
) -> None:
    fake, disk, device = await begin(rig)
    rig.nursery.start_soon(rig.server.shutdown, 5.0)
    await trio.sleep(1)
    device.fail("write", errno.EIO)
    device.complete(1, index=1)  # the write is parked, and the read hangs for good
    assert (disk.gate.state, disk.gate.parked_count) == (GateState.STANDBY, 1)
    await rig.until(lambda: rig.daemon.released)
    fake.harvest()
    assert [answer.status for answer in fake.answers] == [BUSY]
    assert not list(rig.state.glob("*.json"))


async def test_a_device_that_is_deleted_while_its_commands_wait(
    rig: Rig, clock: trio.testing.MockClock
) -> None:
    _, disk, device = await begin(rig)
    device.fail("write", errno.EIO)
    device.complete(1, index=1)
    assert (disk.gate.parked_count, len(device.outstanding)) == (1, 1)
    rig.machine.remove(1)
    rig.file.kernel_end.send(b"gone")
    await rig.until(lambda: rig.daemon.released)
    assert rig.file.closed
    assert disk.gate.parked_count == 0, "it must not be executed any more"
    device.complete()  # late, and nobody is there any more
    rig.machine.fakes[1].close()  # nor has a view of it
