"""File operations on a disk: any alignment, exclusion, standby, interrupts."""

from __future__ import annotations

import errno
import os
import random

import pytest

from ploopd.fileio.libc import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE
from ploopd.gate.limits import ParkLimits
from ploopd.gate.state import GateState
from tests.support.memory_device import Completion
from tests.unit.frontends.fuse.harness import MIB, Answers, FakeDevice

PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


def content(seed: int, size: int = 4 * MIB) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def filled() -> Answers:
    device = FakeDevice()
    device.memory.data[:] = content(1)
    return Answers(device)


@pytest.mark.parametrize("inline", [True, False])
def test_reads_and_writes_of_any_place_and_size(filled: Answers, inline: bool) -> None:
    filled.device.memory.inline = inline
    model = bytearray(content(1))
    rng = random.Random(7)
    for _ in range(300):
        offset, size = rng.randrange(4 * MIB), rng.choice([1, 511, 512, 513, 4096, 70_000])
        if rng.random() < 0.5:
            data = rng.randbytes(size)
            room = min(size, 4 * MIB - offset)
            filled.write(offset, data)
            assert filled.got.pop() == (0, room)
            model[offset : offset + room] = data[:room]
        else:
            filled.read(offset, size)
            assert filled.got.pop() == (0, bytes(model[offset : offset + size]))
    assert filled.device.memory.data == model
    assert not filled.device.buffers.out


def test_the_end_of_the_disk(filled: Answers) -> None:
    end = 4 * MIB
    filled.read(end, 100)
    filled.read(end + 4096, 100)
    assert filled.got == [(0, b""), (0, b"")]
    filled.got.clear()
    filled.write(end, b"x")
    filled.write(end - 1, b"xyz")
    assert filled.got == [(errno.ENOSPC, None), (0, 1)]
    assert filled.device.memory.data[-1:] == b"x"


def test_aligned_writes_take_one_operation(filled: Answers) -> None:
    filled.write(4096, bytes(4096))
    assert [each.op for each in filled.device.memory.log] == ["write"]
    assert filled.device.memory.log[0].inline


@pytest.mark.parametrize(("write_cache", "stable"), [(True, True), (False, False)])
def test_stable_writes_are_fua(write_cache: bool, stable: bool) -> None:
    answers = Answers(FakeDevice(write_cache=write_cache))
    answers.write(0, bytes(512), stable=stable)
    assert answers.device.memory.log[-1].fua


def test_part_of_a_block_is_exclusive_while_it_is_read_and_written() -> None:
    answers = Answers(FakeDevice(completion=Completion.MANUAL))
    memory = answers.device.memory
    memory.inline = False
    first = answers.write(10, b"a")
    second = answers.write(20, b"b")
    assert first is not None
    assert second is not None
    assert len(memory.outstanding) == 1, "the second waits for the first"
    while memory.outstanding:
        memory.complete(1)
    assert answers.got == [(0, 1), (0, 1)]
    assert bytes(memory.data[10:21]) == b"a" + bytes(9) + b"b"
    assert not answers.device.unit.tasks.tasks


def test_whole_blocks_do_not_wait_for_each_other() -> None:
    answers = Answers(FakeDevice(completion=Completion.MANUAL))
    answers.device.memory.inline = False
    answers.read(0, 512)
    answers.write(512, bytes(512))
    assert len(answers.device.memory.outstanding) == 2
    answers.device.memory.complete()


@pytest.mark.parametrize(("offset", "length"), [(1000, 5000), (512, 1024), (100, 50), (500, 100)])
@pytest.mark.parametrize("mode", [PUNCH, FALLOC_FL_ZERO_RANGE, FALLOC_FL_ZERO_RANGE | 1])
def test_punched_and_zeroed_ranges_read_as_zeros(
    filled: Answers, offset: int, length: int, mode: int
) -> None:
    model = bytearray(content(1))
    model[offset : offset + length] = bytes(length)
    filled.disk.allocate(offset, length, mode, filled)
    assert filled.got == [(0, None)]
    assert filled.device.memory.data == model
    assert not filled.device.buffers.out


def test_a_hole_is_discarded_and_a_range_is_zeroed(filled: Answers) -> None:
    filled.disk.allocate(0, 2 * MIB, PUNCH, filled)
    filled.disk.allocate(2 * MIB, MIB, FALLOC_FL_ZERO_RANGE, filled)
    assert [each.op for each in filled.device.memory.log] == ["discard", "write_zeroes"]
    assert filled.device.unit.stats.unmapped_bytes == 2 * MIB


@pytest.mark.parametrize(
    ("offset", "length", "mode", "number"),
    [
        (0, 512, 0, errno.EOPNOTSUPP),
        (0, 512, FALLOC_FL_KEEP_SIZE, errno.EOPNOTSUPP),
        (0, 512, 0x08, errno.EOPNOTSUPP),
        (4 * MIB - 512, 1024, FALLOC_FL_ZERO_RANGE, errno.ENOSPC),
        (4 * MIB, 512, PUNCH, 0),
    ],
)
def test_other_allocations(
    filled: Answers, offset: int, length: int, mode: int, number: int
) -> None:
    filled.disk.allocate(offset, length, mode, filled)
    assert filled.got == [(number, None)]
    assert filled.device.memory.data == content(1)


def test_a_read_only_disk_is_not_written() -> None:
    answers = Answers(FakeDevice(read_only=True))
    answers.write(0, bytes(512))
    answers.disk.allocate(0, 512, PUNCH, answers)
    answers.disk.flush(answers)
    assert answers.got == [(errno.EROFS, None), (errno.EROFS, None), (0, None)]


def test_data_and_holes() -> None:
    answers = Answers(FakeDevice())
    answers.write(MIB + 5, b"x")
    seek = answers.disk.seek
    assert seek(0, os.SEEK_DATA) == MIB
    assert seek(MIB + 7, os.SEEK_DATA) == MIB + 7
    assert seek(MIB, os.SEEK_HOLE) == 2 * MIB
    assert seek(7, os.SEEK_HOLE) == 7
    with pytest.raises(OSError) as beyond:
        seek(2 * MIB, os.SEEK_DATA)
    assert beyond.value.errno == errno.ENXIO
    with pytest.raises(OSError) as outside:
        seek(4 * MIB, os.SEEK_HOLE)
    assert outside.value.errno == errno.ENXIO


def test_a_full_disk_ends_in_a_hole() -> None:
    answers = Answers(FakeDevice())
    answers.write(0, bytes(4 * MIB))
    assert answers.disk.seek(0, os.SEEK_HOLE) == 4 * MIB


# -- failures and standby ------------------------------------------------------------------


def test_what_is_parked_is_executed_after_the_recovery(filled: Answers) -> None:
    filled.device.memory.fail("write", errno.EIO)
    filled.write(0, b"y" * 512)
    assert filled.got == []
    assert filled.device.gate.state is GateState.STANDBY
    filled.read(0, 512)
    assert filled.got == []
    filled.device.gate.begin_recovery()
    filled.device.gate.leave_standby()
    assert filled.got == [(0, 512), (0, b"y" * 512)]
    assert not filled.device.buffers.out


def test_an_interrupt_ends_what_is_parked_and_it_never_happens(filled: Answers) -> None:
    filled.device.gate.enter_standby("test")
    operation = filled.write(0, b"z" * 512)
    assert operation is not None
    operation.interrupt()
    assert filled.got == [(errno.EINTR, None)]
    filled.device.gate.leave_standby()
    assert filled.device.memory.data == content(1)
    assert not filled.device.buffers.out
    assert not filled.device.unit.tasks.tasks


def test_an_interrupt_does_not_lose_what_is_being_executed() -> None:
    device = FakeDevice(completion=Completion.MANUAL)
    device.memory.inline = device.memory.cancellable = False
    answers = Answers(device)
    operation = answers.write(0, b"q" * 512)
    assert operation is not None
    operation.interrupt()
    assert answers.got == []
    device.memory.complete()
    assert answers.got == [(0, 512)]


def test_an_interrupt_ends_what_waits_for_its_turn() -> None:
    device = FakeDevice(completion=Completion.MANUAL)
    device.memory.inline = False
    answers = Answers(device)
    answers.write(10, b"a")
    waiting = answers.write(20, b"b")
    assert waiting is not None
    waiting.interrupt()
    assert answers.got == [(errno.EINTR, None)]
    while device.memory.outstanding:
        device.memory.complete(1)
    assert bytes(device.memory.data[:21]) == bytes(10) + b"a" + bytes(10)


def test_busy_is_repeated_until_it_is_executed() -> None:
    device = FakeDevice(limits=ParkLimits(park_max=5.0))
    answers = Answers(device)
    device.gate.enter_standby("test")
    answers.write(0, b"w" * 512)
    device.clock.now = 6.0
    assert device.gate.expire(6.0) == 1
    assert answers.got == []
    assert len(answers.timers) == 1
    answers.run_timers()
    assert device.gate.parked_count == 1
    device.gate.leave_standby()
    assert answers.got == [(0, 512)]
    assert bytes(device.memory.data[:512]) == b"w" * 512


def test_an_interrupt_between_two_tries() -> None:
    device = FakeDevice(limits=ParkLimits(park_max=5.0))
    answers = Answers(device)
    device.gate.enter_standby("test")
    operation = answers.read(0, 512)
    assert operation is not None
    device.gate.expire(6.0)
    operation.interrupt()
    answers.run_timers()
    assert answers.got == [(errno.EINTR, None)]
    assert device.gate.parked_count == 0


@pytest.mark.parametrize(
    ("failure", "seen"),
    [(errno.ENOSPC, errno.ENOSPC), (errno.EDQUOT, errno.ENOSPC), (errno.ENXIO, errno.ENXIO)],
)
def test_errors_that_are_not_standby(filled: Answers, failure: int, seen: int) -> None:
    filled.device.memory.fail("write", failure, times=None)
    filled.write(0, bytes(512))
    assert filled.got == [(seen, None)]
    assert filled.device.unit.stats.errors == 1


def test_with_a_fuse_off_the_error_comes_out(filled: Answers) -> None:
    filled.device.unbind()
    filled.device.memory.fail("read", errno.EIO, times=None)
    filled.read(0, 512)
    assert filled.got == [(errno.EIO, None)]


def test_an_error_in_the_middle_of_a_partial_write_leaves_the_block(filled: Answers) -> None:
    filled.device.memory.fail("read", errno.ENXIO, inline=False)
    filled.write(5, b"abc")
    assert filled.got == [(errno.ENXIO, None)]
    assert filled.device.memory.data == content(1)
    assert not filled.device.buffers.out


def test_a_long_discard_gives_way() -> None:
    device = FakeDevice(size=256 * MIB)
    device.clock.step = 0.01  # every look at the clock takes longer than a slice
    answers = Answers(device)
    answers.disk.allocate(0, 256 * MIB, PUNCH, answers)
    turns = 0
    while not answers.got:
        assert answers.timers
        answers.run_timers()
        turns += 1
    assert answers.got == [(0, None)]
    assert turns == 4


def test_tasks_of_files_are_not_aborted_by_a_reset_of_the_unit() -> None:
    from ploopd.scsi.task_management import abort_all

    device = FakeDevice(completion=Completion.MANUAL)
    device.memory.inline = False
    answers = Answers(device)
    answers.read(0, 512)
    done: list[bool] = []
    abort_all(list(device.unit.tasks), lambda: done.append(True))
    assert done == [True]
    device.memory.complete()
    assert answers.got == [(0, bytes(512))]
