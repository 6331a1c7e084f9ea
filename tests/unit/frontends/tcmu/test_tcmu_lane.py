"""READs and WRITEs that wait without being tasks: over the gate, as the kernel sees them."""

from __future__ import annotations

import errno
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from ploopd.fileio.buffers import BufferPool
from ploopd.frontends.tcmu.handler import Handler
from ploopd.frontends.tcmu.lane import MOST_LENGTH
from ploopd.frontends.tcmu.ring import Ring
from ploopd.gate.events import Event
from ploopd.gate.filter import Gate
from ploopd.scsi.logical_unit import LogicalUnit
from scst_shim import QueueFlags, StandbyCheck
from tests.support.fake_tcmu import Answer, FakeKernel
from tests.support.lane_device import LaneMemoryDevice
from tests.support.memory_device import pattern
from tests.unit.scsi.harness import cdb10

SIZE = 16 << 20
ABORT_TASK, LUN_RESET = 1, 5
GOOD, BUSY, ABORTED = 0, 8, 0x40
INSIDE = pattern(SIZE, 7)


def new_disk() -> LaneMemoryDevice:
    return LaneMemoryDevice(SIZE, bytearray(INSIDE))


@dataclass
class Rig:
    """A handler between a fake kernel and a gate."""

    kernel: FakeKernel = field(default_factory=lambda: FakeKernel(data_size=4 << 20))
    disk: LaneMemoryDevice = field(default_factory=new_disk)
    events: list[Event] = field(default_factory=list)
    told: int = 0

    def __post_init__(self) -> None:
        check = StandbyCheck()
        check.enable()
        self.gate = Gate(
            self.disk,
            name="disk",
            fuses=QueueFlags("disk", check, warn=lambda _: None),
            clock=lambda: 0.0,
            on_event=self.events.append,
        )
        self.gate.bind()
        self.unit = LogicalUnit(
            self.gate, identity=uuid.UUID(int=1), buffers=BufferPool(), clock=lambda: 0.0
        )
        ring = Ring(memoryview(self.kernel.memory))
        self.handler = Handler(ring, self.unit, "disk", self._on_answer)

    def _on_answer(self) -> None:
        self.told += 1

    def read(self, lba: int, blocks: int = 8) -> int:
        command_id = self.kernel.command(cdb10(0x28, lba, blocks)[:10], expect=blocks * 512)
        assert command_id is not None
        self.handler.process()
        return command_id

    def write(self, lba: int, seed: int, blocks: int = 8) -> int:
        data = pattern(blocks * 512, seed)
        command_id = self.kernel.command(cdb10(0x2A, lba, blocks)[:10], out=data)
        assert command_id is not None
        self.handler.process()
        return command_id

    @property
    def in_lane(self) -> int:
        return len(self.disk.lane)

    def statuses(self) -> dict[int, int]:
        """Of what has been answered since the last call."""
        return {answer.command_id: answer.status for answer in self.kernel.harvest()}

    def one(self) -> Answer:
        (answer,) = self.kernel.harvest()
        return answer


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.handler.close()
    rig.kernel.close()


def test_they_are_answered_as_they_complete(rig: Rig) -> None:
    first, second = rig.read(8), rig.write(100, 42)
    assert (rig.in_lane, len(rig.unit.tasks), rig.gate.executing_count) == (2, 0, 2)
    assert rig.handler.busy == 2
    assert rig.kernel.harvest() == []
    rig.disk.lane.complete()
    one, two = rig.kernel.harvest()
    assert (one.command_id, one.status, one.data) == (first, GOOD, INSIDE[4096:8192])
    assert (two.command_id, two.status) == (second, GOOD)
    assert rig.disk.data[51200 : 51200 + 4096] == pattern(4096, 42)
    assert rig.disk.lane.adopted == 0
    assert (rig.unit.stats.reads, rig.unit.stats.writes) == (1, 1)
    assert rig.handler.ring.drained
    assert rig.told == 2


def test_what_is_written_is_what_was_there_when_it_came(rig: Rig) -> None:
    """The storage never works on shared memory: the kernel takes that back at an abort."""
    rig.write(0, 3)
    at, length = rig.kernel.outstanding[1].iovs[0]
    rig.kernel.view[at : at + length] = bytes(length)
    rig.disk.lane.complete()
    assert rig.disk.data[:4096] == pattern(4096, 3)


def test_a_later_one_may_be_first(rig: Rig) -> None:
    ids = [rig.read(lba) for lba in (0, 8, 16)]
    rig.disk.lane.requests.reverse()
    rig.disk.lane.complete(2)
    answers = rig.kernel.harvest()
    assert [answer.command_id for answer in answers] == ids[:0:-1]
    assert [answer.data for answer in answers] == [INSIDE[8192:12288], INSIDE[4096:8192]]
    assert not rig.handler.ring.drained


def test_what_is_not_for_the_lane_becomes_a_task(rig: Rig) -> None:
    rig.read(0, MOST_LENGTH // 512 + 8)
    rig.kernel.piece = 1024
    rig.read(0)
    rig.kernel.piece = 1 << 20
    rig.disk.lane.room = 0
    rig.read(0)
    assert (rig.in_lane, len(rig.unit.tasks)) == (0, 3)
    while rig.disk.complete():
        pass
    assert set(rig.statuses().values()) == {GOOD}


def test_an_error_is_reported_with_its_address(rig: Rig) -> None:
    rig.disk.fail("read", errno.ENODATA)
    rig.read(24)
    rig.disk.lane.complete()
    answer = rig.one()
    assert (answer.status, answer.sense[2] & 15, answer.sense[12:14]) == (2, 3, b"\x11\0")
    assert int.from_bytes(answer.sense[3:7], "big") == 24
    assert not rig.unit.tasks


def test_a_standby_error_parks_it_until_the_disk_is_replaced(rig: Rig) -> None:
    failing, other = rig.write(0, 1), rig.read(128)
    rig.disk.fail("write", errno.EIO, times=None)
    rig.disk.lane.complete()
    assert (rig.gate.standby_text, rig.gate.parked_count) == ("on", 1)
    assert rig.statuses() == {other: GOOD}
    (parked,) = rig.handler._nexus.tasks.values()
    assert parked.cdb == cdb10(0x2A, 0, 8).ljust(16, b"\0"), "without what is behind it in the ring"
    later = rig.read(0)
    assert (rig.in_lane, rig.gate.parked_count) == (0, 2)
    fresh = new_disk()
    rig.gate.begin_recovery()
    rig.gate.swap(fresh)
    rig.gate.leave_standby()
    while fresh.complete():
        pass
    one, two = rig.kernel.harvest()
    assert (one.command_id, one.status) == (failing, GOOD)
    assert (two.command_id, two.data) == (later, pattern(4096, 1))


@pytest.mark.parametrize("function", [ABORT_TASK, LUN_RESET])
def test_an_abort_waits_for_what_has_begun(rig: Rig, function: int) -> None:
    command_id, other = rig.write(0, 1), rig.write(64, 2)
    rig.kernel.task_management(function, [command_id])
    rig.handler.process()
    assert (rig.in_lane, rig.kernel.harvest()) == (0, [])
    rig.disk.complete()
    assert rig.statuses() == {command_id: ABORTED, other: GOOD}
    assert rig.disk.data[:4096] == pattern(4096, 1), "it had begun"


def test_given_back_commands_are_busy_when_they_have_ended(rig: Rig) -> None:
    ids = [rig.read(0), rig.write(64, 2)]
    rig.handler.give_back()
    assert rig.kernel.harvest() == []
    rig.disk.complete()
    assert rig.statuses() == dict.fromkeys(ids, BUSY)
    assert rig.handler.ring.drained


def test_closing_forgets_what_is_under_way() -> None:
    rig = Rig()
    rig.read(0)
    rig.write(64, 2)
    ended = []
    rig.handler.close(lambda: ended.append(True))
    assert not ended
    rig.disk.complete()
    assert ended
    assert rig.kernel.harvest() == []
    rig.kernel.close()
