"""Commands of the ring on a real logical unit: at once, as tasks, aborted, given back."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from ploopd.frontends.tcmu.handler import Handler
from ploopd.frontends.tcmu.ring import Ring
from tests.support.fake_tcmu import Answer, FakeKernel
from tests.support.memory_device import Completion, MemoryDevice, pattern
from tests.unit.scsi.harness import Bench, cdb, cdb10, cdb16, make_bench

READ, WRITE = 0x28, 0x2A
UNMAP_CDB = cdb("42 00 00 00 00 00 00 00 18 00")[:10]


@dataclass
class Rig:
    """A handler between a fake kernel and a unit on a memory device."""

    kernel: FakeKernel = field(default_factory=FakeKernel)
    bench: Bench = field(default_factory=lambda: make_bench(16 << 20))
    told: int = 0

    def __post_init__(self) -> None:
        ring = Ring(memoryview(self.kernel.memory))
        self.handler = Handler(ring, self.bench.unit, "disk", self._on_answer)

    def _on_answer(self) -> None:
        self.told += 1

    @property
    def device(self) -> MemoryDevice:
        return self.bench.device

    def send(self, command: bytes, *, out: bytes = b"", expect: int = 0) -> Answer:
        command_id = self.kernel.command(command, out=out, expect=expect)
        assert self.handler.process()
        (answer,) = self.kernel.harvest()
        assert answer.command_id == command_id
        return answer


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.handler.close()
    rig.kernel.close()
    assert not rig.bench.buffers.out


def sense(answer: Answer) -> tuple[int, int]:
    assert answer.status == 2
    return answer.sense[2] & 0xF, answer.sense[12] << 8 | answer.sense[13]


@pytest.mark.parametrize("piece", [1 << 20, 4096, 1000])
def test_a_write_is_read_back(rig: Rig, piece: int) -> None:
    rig.kernel.piece = piece
    data = pattern(16384, 1)
    assert rig.send(cdb10(WRITE, 100, 32)[:10], out=data).status == 0
    answer = rig.send(cdb10(READ, 100, 32)[:10], expect=16384)
    assert (answer.status, answer.data) == (0, data)
    assert all(row.inline for row in rig.device.log)


@pytest.mark.parametrize("piece", [1 << 20, 1000])
def test_what_cannot_be_done_at_once_becomes_a_task(rig: Rig, piece: int) -> None:
    rig.device.inline = False
    rig.kernel.piece = piece
    data = pattern(8192, 2)
    assert rig.send(cdb16(0x8A, 8, 16), out=data).status == 0
    answer = rig.send(cdb16(0x88, 8, 16), expect=8192)
    assert (answer.status, answer.data) == (0, data)
    assert not any(row.inline for row in rig.device.log)


def test_many_commands_make_one_kick(rig: Rig) -> None:
    for lba in range(8):
        rig.kernel.command(cdb10(READ, lba * 8, 8)[:10], expect=4096)
    assert rig.handler.process()
    assert len(rig.kernel.harvest()) == 8
    assert rig.told == 0
    assert not rig.handler.process()


def test_inquiry_says_who_it_is_and_nothing_more(rig: Rig) -> None:
    answer = rig.send(cdb("12 00 00 00 ff 00")[:6], expect=255)
    assert answer.data[8:16] == b"PLOOPD  "
    assert answer.read_length == len(answer.data) < 255
    assert b"\xee" not in answer.data


def test_no_unit_attention_that_the_kernel_gives_itself(rig: Rig) -> None:
    assert rig.send(cdb("00")[:6]).status == 0
    assert rig.kernel.task_management(5, [])
    assert rig.handler.process()
    assert rig.send(cdb("00")[:6]).status == 0


def test_a_reset_reaches_the_other_front_ends(rig: Rig) -> None:
    other = rig.bench.login()
    rig.kernel.task_management(5, [])
    rig.handler.process()
    assert other.send(cdb("00")).sense == (6, 0x2903)


def test_a_new_capacity_is_told(rig: Rig) -> None:
    rig.bench.unit.capacity_changed()
    assert sense(rig.send(cdb("00")[:6])) == (6, 0x2A09)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        pytest.param(cdb("ff")[:10], (5, 0x2000), id="unknown opcode"),
        pytest.param(
            cdb("7f 00 00 00 00 00 00 18 00 09").ljust(32, b"\0"), (5, 0x2000), id="32-byte CDB"
        ),
        pytest.param(cdb10(READ, 1 << 30, 8)[:10], (5, 0x2100), id="past the end"),
        pytest.param(cdb10(READ, 0, 8, flags=0x20)[:10], (5, 0x2400), id="protection"),
    ],
)
def test_bad_commands_get_sense(rig: Rig, command: bytes, expected: tuple[int, int]) -> None:
    answer = rig.send(command, expect=4096)
    assert sense(answer) == expected
    assert answer.data == b""


def test_data_out_that_does_not_match_the_cdb(rig: Rig) -> None:
    before = bytes(rig.device.data)
    answer = rig.send(cdb10(WRITE, 0, 8)[:10], out=b"x" * 1024)
    assert rig.device.data[:1024] == b"x" * 1024 or answer.status == 2
    assert rig.device.data[1024:] == before[1024:], "nothing but what was sent is written"
    answer = rig.send(UNMAP_CDB, out=bytes(4))
    assert sense(answer) == (5, 0x1A00)


def test_a_longer_buffer_than_the_cdb_asks_for_is_zeroed(rig: Rig) -> None:
    rig.device.data[:512] = b"d" * 512
    answer = rig.send(cdb10(READ, 0, 1)[:10], expect=4096)
    assert answer.data == b"d" * 512
    assert answer.read_length == 512


def test_a_storage_error_is_a_medium_error(rig: Rig) -> None:
    rig.device.fail("read", errno.ENXIO, times=None)
    assert sense(rig.send(cdb10(READ, 8, 8)[:10], expect=4096)) == (3, 0x1100)


def test_one_piece_outside_of_the_data_area_breaks_the_ring(rig: Rig) -> None:
    at = 128 + rig.kernel.head
    rig.kernel.command(cdb10(READ, 0, 8)[:10], expect=4096)
    rig.kernel.words[(at + 48) // 4] = len(rig.kernel.memory) - 4095
    rig.handler.process()
    assert rig.handler.broken is not None
    assert not rig.device.log


class TestLater:
    """Commands that end outside of `process`."""

    @pytest.fixture
    def rig(self) -> Iterator[Rig]:
        rig = Rig(bench=make_bench(16 << 20, completion=Completion.MANUAL))
        rig.device.inline = False
        yield rig
        rig.handler.close()
        rig.kernel.close()
        assert not rig.bench.buffers.out

    def start(self, rig: Rig, count: int) -> list[int]:
        ids = []
        for lba in range(count):
            command_id = rig.kernel.command(cdb10(WRITE, lba, 1)[:10], out=bytes([lba + 1]) * 512)
            assert command_id is not None
            ids.append(command_id)
        rig.handler.process()
        assert rig.handler.busy == count
        return ids

    def test_answers_come_in_the_order_of_the_storage(self, rig: Rig) -> None:
        ids = self.start(rig, 3)
        rig.device.complete(1, index=2)
        rig.device.complete(1, index=0)
        assert [a.command_id for a in rig.kernel.harvest()] == [ids[2], ids[0]]
        assert rig.told == 2
        assert rig.handler.busy == 1
        rig.device.complete()
        assert rig.handler.ring.drained

    def test_an_aborted_write_never_lands(self, rig: Rig) -> None:
        ids = self.start(rig, 3)
        rig.kernel.task_management(1, [ids[1], 999])
        assert rig.handler.process()
        assert [(a.command_id, a.status) for a in rig.kernel.harvest()] == [(ids[1], 0x40)]
        rig.device.complete()
        rig.kernel.harvest()
        assert rig.device.data[:1536] == b"\1" * 512 + bytes(512) + b"\3" * 512

    def test_an_abort_waits_for_what_has_begun(self, rig: Rig) -> None:
        ids = self.start(rig, 1)
        rig.device.cancellable = False
        rig.kernel.task_management(1, ids)
        rig.handler.process()
        assert rig.kernel.harvest() == []
        rig.device.complete()
        assert [a.status for a in rig.kernel.harvest()] == [0x40]

    def test_an_id_that_is_used_again_is_another_command(self, rig: Rig) -> None:
        (old,) = self.start(rig, 1)
        rig.device.complete()
        rig.kernel.harvest()
        rig.kernel.task_management(1, [old])  # too late: it has been answered
        (new,) = self.start(rig, 1)
        assert new == old
        assert rig.handler.busy == 1
        rig.device.complete()
        assert [a.status for a in rig.kernel.harvest()] == [0]

    def test_a_reset_aborts_what_the_kernel_names(self, rig: Rig) -> None:
        ids = self.start(rig, 4)
        rig.kernel.task_management(5, ids)
        rig.handler.process()
        assert [a.status for a in rig.kernel.harvest()] == [0x40] * 4
        rig.device.complete()
        assert rig.device.data[:2048] == bytes(2048)

    def test_given_back_commands_are_busy_and_not_done(self, rig: Rig) -> None:
        ids = self.start(rig, 4)
        rig.handler.give_back()
        assert sorted(a.command_id for a in rig.kernel.harvest()) == ids
        assert {a.status for a in rig.kernel.answers} == {8}
        assert rig.handler.ring.drained
        assert rig.device.complete() == 0

    def test_a_piece_outside_of_the_data_area_breaks_the_ring_and_nobody_else(
        self, rig: Rig
    ) -> None:
        rig.kernel.piece = 2048
        at = 128 + rig.kernel.head
        rig.kernel.command(cdb10(READ, 0, 8)[:10], expect=4096)
        rig.kernel.words[(at + 48 + 16) // 4] = 8  # the second piece is in the mailbox
        assert not rig.handler.process()
        rig.device.complete()  # does not hear of it
        assert rig.handler.broken is not None
        assert rig.told == 1

    def test_closing_forgets_what_is_under_way(self, rig: Rig) -> None:
        self.start(rig, 2)
        rig.device.cancellable = False
        rig.handler.close()
        rig.device.complete()
        assert rig.kernel.harvest() == []


def test_closing_twice_is_one_close() -> None:
    rig = Rig()
    rig.handler.close()
    rig.handler.close()
    rig.kernel.close()
