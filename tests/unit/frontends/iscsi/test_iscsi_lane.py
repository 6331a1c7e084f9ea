"""READs and WRITEs that wait without being tasks: over the gate, as initiators see them."""

from __future__ import annotations

import errno
import uuid
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from ploopd.frontends.iscsi.config import IscsiConfig, Limits
from ploopd.gate.events import Event
from ploopd.gate.filter import Gate
from ploopd.scsi.logical_unit import LogicalUnit
from scst_shim import QueueFlags, StandbyCheck
from tests.support.cdb import read_10, read_16, write_10, write_16
from tests.support.iscsi_client import TARGET, Client
from tests.support.iscsi_pdu import Pdu
from tests.support.lane_device import LaneMemoryDevice
from tests.support.memory_device import pattern
from tests.unit.frontends.iscsi.rig import SIZE, Rig, engine_of, quiet

ABORT_TASK, ABORT_TASK_SET, CLEAR_TASK_SET, LUN_RESET = 1, 2, 4, 5
SYNCHRONIZE_CACHE = bytes([0x35]) + bytes(9)
SMALL = IscsiConfig(iqn=TARGET, limits=Limits(output_arena=64 << 10, receive_buffer=1 << 20))


def new_device() -> LaneMemoryDevice:
    return LaneMemoryDevice(SIZE, bytearray(pattern(SIZE, 7)))


@dataclass
class LaneRig(Rig):
    """The usual rig with a gate between unit and device."""

    events: list[Event] = field(default_factory=list)
    disk: LaneMemoryDevice = field(default_factory=new_device)

    def __post_init__(self) -> None:
        super().__post_init__()
        check = StandbyCheck()
        check.enable()
        self.gate = Gate(
            self.disk,
            name="disk",
            fuses=QueueFlags("disk", check, warn=lambda _: None),
            clock=lambda: self.now,
            on_event=self.events.append,
        )
        self.gate.bind()
        self.target.remove_unit(0)
        self.unit = LogicalUnit(
            self.gate, identity=uuid.UUID(int=1), buffers=self.buffers, clock=lambda: self.now
        )
        self.target.add_unit(0, self.unit)

    def replaced(self) -> LaneMemoryDevice:
        """As recovery does; returns the new device with the old one's content."""
        fresh = new_device()
        fresh.data[:] = self.disk.data
        self.gate.begin_recovery()
        self.gate.swap(fresh)
        self.gate.leave_standby()
        self.disk = fresh
        return fresh


def read(client: Client, lba: int, blocks: int = 8) -> int:
    tag, pdu = client.initiator.command(read_10(lba, blocks), read=blocks * 512)
    client.send(pdu)
    return tag


def write(client: Client, lba: int, seed: int, blocks: int = 8) -> int:
    content = pattern(blocks * 512, seed)
    tag, pdu = client.initiator.command(write_10(lba, blocks), write=len(content), data=content)
    client.send(pdu)
    return tag


def manage(client: Client, function: int, tag: int = 0xFFFFFFFF) -> None:
    tail = client.initiator.cmd_sn.to_bytes(4, "big") + bytes(12)
    _, pdu = client.initiator.request(0x02, 0x80 | function, immediate=True, word20=tag, tail=tail)
    client.send(pdu)


def answers(client: Client) -> list[Pdu]:
    found = []
    while not quiet(client):
        found.append(client.next_pdu())
    return found


def in_lane(rig: LaneRig) -> int:
    return len(rig.disk.lane)


# -- all goes well


def test_reads_and_writes_are_answered_as_they_complete() -> None:
    rig = LaneRig()
    client = rig.logged_in()
    first = read(client, 8)
    second = write(client, 100, 42)
    assert (in_lane(rig), len(rig.unit.tasks), rig.gate.executing_count) == (2, 0, 2)
    assert quiet(client)
    rig.disk.lane.complete()
    one, two = answers(client)
    assert (one.tag, one.opcode, one.status) == (first, 0x25, 0)
    assert one.data == pattern(SIZE, 7)[4096:8192]
    assert (two.tag, two.opcode, two.status) == (second, 0x21, 0)
    assert two.stat_sn == one.stat_sn + 1
    assert bytes(rig.disk.data[51200 : 51200 + 4096]) == pattern(4096, 42)
    assert rig.disk.lane.adopted == 0
    assert (rig.unit.stats.reads, rig.unit.stats.writes) == (1, 1)
    assert (rig.gate.executing_count, rig.gate._busy.count) == (0, 0)


def test_the_command_window_counts_them() -> None:
    rig = LaneRig()
    client = rig.logged_in()
    window = rig.config.limits.window
    before = client.initiator.max_cmd_sn
    read(client, 0)
    rig.disk.lane.complete()
    answer = client.next_pdu()
    assert (answer.max_cmd_sn - before, answer.exp_cmd_sn) == (1, client.initiator.cmd_sn)
    tags = [read(client, lba * 8) for lba in range(window)]
    assert in_lane(rig) + len(rig.disk.outstanding) == window
    read(client, 0)
    assert in_lane(rig) + len(rig.disk.outstanding) == window, "beyond the window: ignored"
    rig.disk.lane.complete()
    rig.disk.complete()
    assert sorted(answer.tag for answer in answers(client)) == sorted(tags)


def test_objects_and_buffers_are_used_again_and_given_back() -> None:
    rig = LaneRig()
    client = rig.logged_in()
    for _ in range(50):
        read(client, 0)
        write(client, 64, 3)
        rig.disk.lane.complete()
        assert len(answers(client)) == 2
    assert rig.buffers.outstanding == 2
    engine_of(client).lost("test")
    assert rig.buffers.outstanding == 0


@pytest.mark.parametrize("blocks", [1, 64, 256, 512])
def test_every_length_comes_back_whole(blocks: int) -> None:
    rig = LaneRig(config=SMALL)
    client = rig.logged_in()
    tags = {read(client, lba, blocks): lba for lba in (0, 1000, 2000)}
    rig.disk.lane.complete()
    rig.disk.complete()
    for _ in tags:
        data = b""
        while True:
            answer = client.next_pdu()
            data += answer.data
            if answer.flags & 1:
                break
        start = tags[answer.tag] * 512
        assert data == pattern(SIZE, 7)[start : start + blocks * 512]
    engine_of(client).lost("test")
    assert rig.buffers.outstanding == 0


def test_a_read_longer_than_a_segment_is_not_for_the_lane() -> None:
    rig = LaneRig()
    client = rig.logged_in(MaxRecvDataSegmentLength="4096")
    read(client, 0, 16)
    assert (in_lane(rig), len(rig.disk.outstanding)) == (0, 1)
    read(client, 0, 8)
    assert in_lane(rig) == 1


def test_a_full_lane_is_passed_by() -> None:
    rig = LaneRig()
    rig.disk.lane.room = 1
    client = rig.logged_in()
    tags = [read(client, 0), read(client, 8)]
    assert (in_lane(rig), len(rig.disk.outstanding)) == (1, 1)
    rig.disk.complete()
    rig.disk.lane.complete()
    assert [answer.tag for answer in answers(client)] == tags[::-1]


def test_a_tag_in_use_is_refused() -> None:
    rig = LaneRig()
    client = rig.logged_in()
    tag = read(client, 0)
    _, pdu = client.initiator.command(read_16(8, 8), read=4096, tag=tag)
    client.send(pdu)
    assert client.next_pdu().opcode == 0x3F, "task in progress"
    rig.disk.lane.complete()
    assert client.next_pdu().tag == tag


def test_data_that_nobody_asked_for_ends_it() -> None:
    rig = LaneRig()
    client = rig.logged_in()
    tag = write(client, 0, 1)
    client.send(client.initiator.data_out(tag, bytes(512), offset=0))
    answer = client.next_pdu()
    assert (answer.tag, answer.sense_code) == (tag, (0xB, 0x0C0C))
    rig.disk.complete()
    assert quiet(client)
    assert rig.buffers.outstanding == 0


# -- errors


def test_an_error_is_reported_with_its_address() -> None:
    rig = LaneRig()
    client = rig.logged_in()
    rig.disk.fail("read", errno.ENODATA)
    errors = rig.unit.stats.errors
    tag = read(client, 24)
    rig.disk.lane.complete()
    answer = client.next_pdu()
    assert (answer.tag, answer.status, answer.sense_code) == (tag, 2, (3, 0x1100))
    assert int.from_bytes(answer.sense[3:7], "big") == 24
    assert rig.unit.stats.errors == errors + 1
    assert not rig.unit.tasks


def test_a_failed_write_latches_and_the_lane_takes_no_more_of_them() -> None:
    rig = LaneRig()
    client = rig.logged_in()
    rig.disk.fail("write", errno.ENODATA)
    write(client, 0, 1)
    rig.disk.lane.complete()
    assert client.next_pdu().status == 2
    assert rig.gate.latched is not None
    write(client, 0, 1)
    assert in_lane(rig) == 0
    assert client.next_pdu().sense_code[0] == 7
    read(client, 0)
    assert in_lane(rig) == 1


# -- standby


def test_a_standby_error_parks_it_and_the_others_end_by_themselves() -> None:
    rig = LaneRig()
    client = rig.logged_in()
    tags = [write(client, 0, 1), write(client, 64, 2), read(client, 128)]
    rig.disk.fail("write", errno.EIO, start=0, end=512, times=None)
    rig.disk.lane.complete()
    assert rig.gate.standby_text == "on"
    assert rig.gate.parked_count == 1
    assert [answer.tag for answer in answers(client)] == tags[1:]
    later = read(client, 0)
    assert in_lane(rig) == 0, "the gate is closed"
    assert rig.gate.parked_count == 2
    fresh = rig.replaced()
    fresh.complete()
    fresh.complete()
    both = answers(client)
    assert [answer.tag for answer in both] == [tags[0], later]
    assert both[1].data == pattern(4096, 1), "the read waited for the write before it"
    read(client, 0)
    assert in_lane(rig) == 1, "open again"


def test_parked_in_its_original_place() -> None:
    rig = LaneRig()
    client = rig.logged_in()
    first = write(client, 0, 1)
    rig.gate.enter_standby("test")
    second = write(client, 0, 2)
    rig.disk.fail("write", errno.EIO)
    rig.disk.lane.complete()
    assert rig.gate.parked_count == 2
    fresh = rig.replaced()
    while fresh.outstanding:
        fresh.complete(1)
    assert [answer.tag for answer in answers(client)] == [first, second]
    assert bytes(fresh.data[:4096]) == pattern(4096, 2)


@pytest.mark.trio
async def test_draining_waits_for_them(autojump_clock: trio.testing.MockClock) -> None:
    rig = LaneRig()
    client = rig.logged_in()
    tag = read(client, 0)
    rig.gate.begin_recovery()
    async with trio.open_nursery() as nursery:
        drained: list[bool] = []

        async def drain() -> None:
            drained.append(await rig.gate.drain(5))

        nursery.start_soon(drain)
        await trio.testing.wait_all_tasks_blocked()
        assert (drained, in_lane(rig), len(rig.disk.outstanding)) == ([], 0, 1)
        rig.disk.complete()
    assert drained == [True]
    assert client.next_pdu().tag == tag


@pytest.mark.trio
async def test_those_that_hang_are_disowned_and_executed_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    rig = LaneRig()
    client = rig.logged_in()
    tags = [write(client, 0, 5), read(client, 8)]
    rig.gate.begin_recovery()
    assert await rig.gate.drain(5) is False
    assert (rig.gate.parked_count, rig.gate.executing_count) == (2, 0)
    old = rig.disk
    fresh = new_device()
    rig.gate.swap(fresh)
    rig.disk = fresh
    rig.gate.leave_standby()
    old.complete()  # late, and void
    assert quiet(client)
    fresh.complete()
    assert sorted(answer.tag for answer in answers(client)) == tags
    assert bytes(fresh.data[:4096]) == pattern(4096, 5), "the data did not go with the old buffer"


def test_parked_too_long_is_busy() -> None:
    rig = LaneRig()
    client = rig.logged_in()
    tag = write(client, 0, 1)
    rig.now += 5
    rig.disk.fail("write", errno.EIO)
    rig.disk.lane.complete()
    assert rig.gate.next_deadline() == rig.now - 5 + 20, "counted from its arrival"
    rig.gate.expire(rig.now + 16)
    answer = client.next_pdu()
    assert (answer.tag, answer.status) == (tag, 8)


# -- order


def test_overlapping_writes_are_never_in_execution_together() -> None:
    rig = LaneRig()
    client = rig.logged_in()
    tags = [write(client, 0, 1), write(client, 4, 2), write(client, 64, 3)]
    assert (in_lane(rig), len(rig.disk.outstanding), rig.gate.parked_count) == (0, 2, 1)
    rig.disk.complete()
    rig.disk.complete()
    assert sorted(answer.tag for answer in answers(client)) == tags
    assert [row.offset for row in rig.disk.log] == [0, 64 * 512, 4 * 512]
    assert bytes(rig.disk.data[: 4 * 512]) == pattern(4096, 1)[: 4 * 512]
    assert bytes(rig.disk.data[4 * 512 : 12 * 512]) == pattern(4096, 2)


def test_a_lane_write_waits_for_a_discard_and_a_discard_for_a_lane_write() -> None:
    rig = LaneRig()
    client = rig.logged_in()
    write(client, 0, 1)
    rig.gate.discard(0, 1 << 20, lambda _: None)
    assert [op.op for op in rig.disk.outstanding] == ["write"]
    rig.disk.complete(1)
    assert [op.op for op in rig.disk.outstanding] == ["discard"]
    write(client, 0, 2)
    assert [op.op for op in rig.disk.outstanding] == ["discard"]
    rig.disk.complete(1)
    assert [op.op for op in rig.disk.outstanding] == ["write"]
    rig.disk.complete()
    assert bytes(rig.disk.data[:4096]) == pattern(4096, 2)
    assert len(answers(client)) == 2


def test_a_sync_comes_after_the_writes_that_were_answered() -> None:
    rig = LaneRig()
    client = rig.logged_in()
    write(client, 0, 1)
    rig.disk.lane.complete()
    client.next_pdu()
    _, pdu = client.initiator.command(SYNCHRONIZE_CACHE)
    client.send(pdu)
    rig.disk.complete()
    assert [row.op for row in rig.disk.log] == ["write", "flush"]


def test_an_ordered_command_waits_for_them() -> None:
    rig = LaneRig()
    client = rig.logged_in()
    first = write(client, 0, 1)
    ordered, pdu = client.initiator.command(read_16(0, 8), read=4096, attribute=2)
    client.send(pdu)
    last = read(client, 0)
    assert (in_lane(rig), len(rig.disk.outstanding)) == (0, 1)
    for _ in range(3):
        rig.disk.complete(1)
    assert [answer.tag for answer in answers(client)] == [first, ordered, last]


def test_compare_and_write_waits_for_a_write_of_its_range() -> None:
    rig = LaneRig()
    client = rig.logged_in()
    write(client, 0, 1, blocks=1)
    content = pattern(512, 1) + pattern(512, 9)
    cdb = bytes([0x89, 0]) + bytes(8) + bytes([0, 0, 0, 1, 0, 0])
    tag, pdu = client.initiator.command(cdb, write=1024, data=content)
    client.send(pdu)
    assert [op.op for op in rig.disk.outstanding] == ["write"]
    for _ in range(3):
        rig.disk.complete(1)
    assert [(answer.tag, answer.status) for answer in answers(client)][-1] == (tag, 0)
    assert bytes(rig.disk.data[:512]) == pattern(512, 9)


# -- aborts


@pytest.mark.parametrize("function", [ABORT_TASK, ABORT_TASK_SET, CLEAR_TASK_SET, LUN_RESET])
def test_an_abort_waits_for_it_and_it_answers_nothing(function: int) -> None:
    rig = LaneRig()
    client = rig.logged_in()
    tag = write(client, 0, 1)
    manage(client, function, tag)
    assert quiet(client), "in execution"
    rig.disk.complete()
    (answer,) = answers(client)
    assert (answer.opcode, answer.response) == (0x22, 0)
    assert (rig.gate.executing_count, rig.gate._busy.count, len(rig.unit.tasks)) == (0, 0, 0)
    assert answer.max_cmd_sn - answer.exp_cmd_sn == rig.config.limits.window - 1
    assert rig.buffers.outstanding == 0


def test_a_reset_by_another_initiator_ends_it() -> None:
    rig = LaneRig()
    client, other = rig.logged_in(), rig.client()
    other.initiator.isid = b"\x80\x00\x00\x00\x00\x02"
    other.login()
    read(client, 0)
    manage(other, LUN_RESET)
    assert quiet(other)
    rig.disk.complete()
    assert [answer.opcode for answer in answers(other)] == [0x22]
    assert quiet(client)


def test_an_aborted_write_in_standby_never_reaches_an_image() -> None:
    rig = LaneRig()
    client = rig.logged_in()
    tag = write(client, 0, 1)
    manage(client, ABORT_TASK, tag)
    rig.disk.fail("write", errno.EIO)
    rig.disk.complete()
    assert [answer.opcode for answer in answers(client)] == [0x22]
    fresh = rig.replaced()
    assert not fresh.outstanding
    assert not fresh.log


def test_a_lost_connection_waits_for_them_before_the_next_session() -> None:
    rig = LaneRig()
    client = rig.logged_in()
    write(client, 0, 1)
    engine_of(client).lost("cable")
    assert rig.gate.executing_count == 1
    again = rig.client()
    with pytest.raises(AssertionError, match="nothing to receive"):
        again.login()
    rig.disk.complete()
    assert again.next_pdu().login_status == 0
    assert rig.buffers.outstanding == 0
    assert rig.gate.executing_count == 0


def test_a_unit_taken_away_lets_them_end() -> None:
    rig = LaneRig()
    client = rig.logged_in()
    tag = read(client, 0)
    rig.target.remove_unit(0)
    assert in_lane(rig) == 0
    rig.disk.complete()
    assert client.next_pdu().tag == tag


def test_a_write_16_and_a_read_16_take_it_too() -> None:
    rig = LaneRig()
    client = rig.logged_in()
    content = pattern(512, 3)
    _, pdu = client.initiator.command(write_16(5, 1), write=512, data=content)
    client.send(pdu)
    assert in_lane(rig) == 1
