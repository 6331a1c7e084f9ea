"""The journal around a device: what is recorded, when it is dropped, how its bound is kept."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

import pytest

from ploopd.errors import StorageError
from ploopd.storage.device import Done, Pending
from ploopd.storage.journal import RECORD_OVERHEAD, Journal
from ploopd.storage.journaled import JournaledDevice
from ploopd.storage.lane import LaneRequest
from ploopd.storage.replay import replay
from ploopd.storage.request import FINISHED
from tests.support.lane_device import LaneMemoryDevice
from tests.support.memory_device import Completion, MemoryDevice, pattern

KIB = 1024
SIZE = 4 << 20


class Setup:
    """A journaled memory device; `answers[n]` is what the n-th slow call was answered."""

    def __init__(
        self,
        limit: int = 1 << 20,
        completion: Completion = Completion.MANUAL,
        *,
        inline: bool = True,
    ) -> None:
        self.memory = MemoryDevice(SIZE, completion=completion, inline=inline, cancellable=True)
        self.journal = Journal(limit)
        self.failures: list[StorageError] = []
        self.device = JournaledDevice(self.memory, self.journal, self.failures.append)
        self.answers: list[list[StorageError | None]] = []

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> Pending:
        return self.device.write(offset, memoryview(data), self.answer(), fua=fua)

    def flush(self) -> Pending:
        return self.device.flush(self.answer())

    def answer(self) -> Done:
        answers: list[StorageError | None] = []
        self.answers.append(answers)
        return answers.append

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return [key for key, _ in self.journal.records()]

    def outstanding(self) -> list[str]:
        return [each.op for each in self.memory.outstanding]


def test_an_inline_write_is_recorded_before_it_is_answered() -> None:
    setup = Setup()
    assert setup.device.try_write(512, memoryview(b"a" * 512))
    assert list(setup.journal.records()) == [((512, 512), bytearray(b"a" * 512))]


def test_a_slow_change_is_recorded_when_it_has_taken_effect_and_before_it_is_answered() -> None:
    setup = Setup()
    seen: list[int] = []
    setup.device.write(0, memoryview(b"a" * 512), lambda _: seen.append(len(setup.journal)))
    setup.device.write_zeroes(512, 512, lambda _: seen.append(len(setup.journal)), unmap=False)
    setup.device.discard(1024, 512, lambda _: seen.append(len(setup.journal)))
    assert not setup.journal
    assert setup.journal.used == 512 + 3 * RECORD_OVERHEAD
    setup.memory.complete()
    assert seen == [1, 2, 3]
    assert setup.ranges == [(0, 512), (512, 512), (1024, 512)]
    assert setup.journal.used == setup.journal.held


def test_a_change_that_failed_is_not_recorded() -> None:
    setup = Setup()
    setup.memory.fail("write", errno.EIO, times=2)
    with pytest.raises(StorageError):
        setup.device.try_write(0, memoryview(b"a" * 512))
    setup.write(0, b"a" * 512)
    setup.memory.complete()
    assert setup.answers[0][0] is not None
    assert not setup.journal
    assert setup.journal.used == 0


def test_a_flush_drops_what_was_answered_before_it_was_started() -> None:
    setup = Setup()
    setup.device.try_write(0, memoryview(b"a" * 512))
    setup.write(512, b"b" * 512)
    setup.flush()
    setup.device.try_write(1024, memoryview(b"c" * 512))
    setup.memory.complete()  # the slow write ended after the flush was started
    assert setup.answers == [[None], [None]]
    assert sorted(setup.ranges) == [(512, 512), (1024, 512)]


def test_a_flush_that_fails_or_is_cancelled_drops_nothing() -> None:
    setup = Setup()
    setup.device.try_write(0, memoryview(b"a" * 512))
    assert setup.flush().cancel()
    setup.memory.fail("flush", errno.EIO)
    setup.flush()
    setup.memory.complete()
    assert setup.answers[0] == []
    assert setup.answers[1][0] is not None
    assert setup.ranges == [(0, 512)]
    assert not setup.failures  # whoever asked for it was told


def test_a_write_with_fua_supersedes_older_records_and_is_not_needed_without_them() -> None:
    setup = Setup()
    setup.write(0, b"a" * 512, fua=True)
    setup.memory.complete()
    assert not setup.journal
    setup.device.try_write(0, memoryview(b"b" * 1024))
    setup.write(512, b"c" * 512, fua=True)
    setup.memory.complete()
    assert setup.ranges == [(0, 1024), (512, 512)]


@pytest.mark.parametrize("inline", [True, False])
def test_after_a_change_has_failed_no_flush_counts_until_an_operator_trusts_it(
    inline: bool,
) -> None:
    """Its error may have been that of an older write, which the storage had only promised."""
    setup = Setup(completion=Completion.AT_ONCE)
    setup.device.try_write(0, memoryview(b"a" * 512))
    setup.memory.fail("write", errno.EIO)
    if inline:
        with pytest.raises(StorageError):
            setup.device.try_write(512, memoryview(b"b" * 512))
    else:
        setup.write(512, b"b" * 512)
    setup.flush()
    (error,) = setup.answers[-1]
    assert error is not None
    assert error.errno == errno.EIO
    assert setup.ranges == [(0, 512)]
    setup.device.trust()
    setup.flush()
    assert setup.answers[-1] == [None]
    assert not setup.journal


def test_a_full_storage_is_no_reason_to_distrust_it() -> None:
    setup = Setup(completion=Completion.AT_ONCE)
    setup.memory.fail("write", errno.ENOSPC)
    setup.write(512, b"b" * 512)
    setup.flush()
    assert setup.answers[-1] == [None]


def test_half_full_it_is_flushed_once_and_nobody_waits() -> None:
    setup = Setup(limit=64 * KIB)
    for index in range(8):
        assert setup.device.try_write(index * 4 * KIB, memoryview(pattern(4 * KIB, index)))
    assert setup.outstanding() == ["flush"]
    assert setup.memory.kicks == 1
    assert setup.device.try_write(0, memoryview(pattern(4 * KIB, 99)))
    assert setup.outstanding() == ["flush"]
    setup.memory.complete()
    assert setup.ranges == [(0, 4 * KIB)]


def test_a_steady_writer_never_exceeds_the_bound_and_is_never_refused() -> None:
    limit = 64 * KIB
    setup = Setup(limit=limit)
    ended = 0
    largest = 0
    for index in range(400):
        data = memoryview(pattern(4 * KIB, index))
        offset = index * 4 * KIB % SIZE
        if setup.device.try_write(offset, data):
            ended += 1
        else:
            setup.device.write(offset, data, setup.answer())
        largest = max(largest, setup.journal.used)
        if index % 40 == 39:
            setup.memory.complete(1)
    while setup.memory.outstanding:
        setup.memory.complete()
        largest = max(largest, setup.journal.used)
    assert all(answers == [None] for answers in setup.answers)
    assert ended + len(setup.answers) == 400
    assert len(setup.answers) > 10, "nothing ever waited"
    assert largest <= limit
    flushes = [row for row in setup.memory.log if row.op == "flush"]
    assert len(flushes) >= 400 * 4 * KIB // limit


def test_those_that_wait_for_room_keep_their_order_and_are_not_overtaken() -> None:
    setup = Setup(limit=16 * KIB)
    assert setup.device.try_write(0, memoryview(bytes(12 * KIB)))
    setup.write(16 * KIB, b"a" * 8 * KIB)  # waits
    assert not setup.device.try_write(32 * KIB, memoryview(b"b" * 512))  # would fit
    setup.write(32 * KIB, b"b" * 512)
    assert setup.outstanding() == ["flush"]
    setup.memory.complete(1)
    assert setup.outstanding() == ["write", "write"]
    setup.memory.complete()
    slow = [row for row in setup.memory.log if row.op == "write" and not row.inline]
    assert [row.offset for row in slow] == [16 * KIB, 32 * KIB]
    assert setup.device.try_write(0, memoryview(b"c" * 512))


def test_room_that_is_reserved_by_changes_in_execution_is_waited_for() -> None:
    setup = Setup(limit=16 * KIB, inline=False)
    setup.write(0, bytes(15 * KIB))
    setup.write(16 * KIB, bytes(15 * KIB))
    assert setup.outstanding() == ["write"]  # nothing that a flush could drop
    setup.memory.complete(1)
    assert setup.outstanding() == ["flush"]
    setup.memory.complete(1)
    assert setup.outstanding() == ["write"]
    setup.memory.complete()
    assert setup.answers == [[None], [None]]


def test_room_of_a_change_that_failed_is_given_to_those_that_wait() -> None:
    setup = Setup(limit=16 * KIB, inline=False)
    setup.memory.fail("write", errno.ENOSPC)
    setup.write(0, bytes(15 * KIB))
    setup.write(16 * KIB, bytes(15 * KIB))
    setup.memory.complete(1)
    assert setup.outstanding() == ["write"]
    setup.memory.complete()
    assert setup.answers[1] == [None]


def test_one_that_waits_can_be_cancelled_and_one_in_execution_gives_its_room_back() -> None:
    setup = Setup(limit=17 * KIB, inline=False)
    running = setup.write(0, bytes(15 * KIB))
    waiting = setup.write(16 * KIB, bytes(15 * KIB))
    setup.write(32 * KIB, bytes(512))
    assert waiting.cancel()
    assert not waiting.cancel()
    assert setup.outstanding() == ["write", "write"]  # the third one fits now
    assert running.cancel()
    assert setup.journal.used == 512 + RECORD_OVERHEAD
    setup.memory.complete()
    assert setup.answers == [[], [], [None]]


def test_a_write_larger_than_the_bound_is_written_through() -> None:
    setup = Setup(limit=16 * KIB)
    setup.device.try_write(0, memoryview(b"a" * 4 * KIB))
    assert not setup.device.try_write(0, memoryview(b"b" * 32 * KIB))
    setup.write(0, b"b" * 32 * KIB)
    setup.memory.complete(1)
    assert setup.answers == [[]]
    assert setup.outstanding() == ["flush"]
    assert setup.ranges == [(0, 4 * KIB)]
    setup.memory.complete()
    assert setup.answers == [[None]]
    assert not setup.journal, "an older record would land on top of it"


def test_a_write_larger_than_the_bound_fails_with_its_flush() -> None:
    setup = Setup(limit=16 * KIB)
    setup.memory.fail("flush", errno.EIO)
    setup.write(0, b"b" * 32 * KIB)
    setup.memory.complete()
    assert setup.answers[0][0] is not None


class FullDevice(MemoryDevice):
    """Its syncs fail for want of room until `sync_again`, which the test ends."""

    sync_failed: StorageError | None = None
    again: Done | None = None

    def sync_again(self, rewrite: Callable[[], Awaitable[None]], done: Done) -> Pending:
        self.again = done
        return FINISHED


def test_while_there_is_no_room_a_write_larger_than_the_bound_waits_or_fails() -> None:
    """It has no record, and would be lost, or overwritten by what is written again."""
    full = FullDevice(SIZE, completion=Completion.MANUAL)
    device = JournaledDevice(full, Journal(16 * KIB), lambda _: None)
    answers: list[StorageError | None] = []
    device.write(0, memoryview(bytes(32 * KIB)), answers.append)
    full.sync_failed = StorageError(errno.ENOSPC, "fdatasync")  # somebody else's, meanwhile
    full.complete()
    assert [error and error.errno for error in answers] == [errno.ENOSPC]
    device.write(0, memoryview(bytes(32 * KIB)), answers.append)
    assert not full.outstanding
    assert full.again is not None, "nobody makes room for it"
    full.sync_failed = None
    full.again(None)
    assert [each.op for each in full.outstanding] == ["write"]
    full.complete()
    assert answers[1:] == [None]


def test_a_forced_flush_that_fails_is_reported_and_ends_those_that_wait() -> None:
    setup = Setup(limit=16 * KIB)
    setup.memory.fail("flush", errno.EIO, times=None)
    assert setup.device.try_write(0, memoryview(bytes(12 * KIB)))
    setup.write(16 * KIB, bytes(12 * KIB))
    setup.memory.complete()
    assert [error.errno for error in setup.failures] == [errno.EIO]
    (error,) = setup.answers[0]
    assert error is not None
    assert error.errno == errno.EIO
    assert setup.ranges == [(0, 12 * KIB)]
    assert setup.device.try_write(64 * KIB, memoryview(bytes(512)))  # not tried again for each
    assert not setup.memory.outstanding
    setup.write(16 * KIB, bytes(12 * KIB))
    setup.memory.complete()
    assert len(setup.failures) == 2


def test_a_device_that_completes_at_once_is_no_problem() -> None:
    setup = Setup(limit=16 * KIB, completion=Completion.AT_ONCE, inline=False)
    for index in range(100):
        setup.write(index * 4 * KIB, pattern(4 * KIB, index))
    assert setup.answers == [[None]] * 100
    assert setup.journal.used <= 16 * KIB


def test_a_retired_device_changes_the_journal_no_more() -> None:
    setup = Setup()
    setup.device.try_write(0, memoryview(bytes(512)))
    setup.write(512, bytes(512))
    setup.flush()
    setup.device.retire()
    setup.memory.complete()
    assert setup.ranges == [(0, 512)]


@pytest.mark.parametrize("writing", [False, True])
def test_the_lane_is_for_reads(writing: bool) -> None:
    """A write in it would end without a record."""
    memory = LaneMemoryDevice(SIZE, bytearray(SIZE))
    device = JournaledDevice(memory, Journal(1 << 20), lambda _: None)
    request = LaneRequest()
    request.offset, request.length, request.writing = 0, 512, writing
    assert device.lane.usable
    assert device.lane.begin(request) != writing
    assert len(device.lane) == len(memory.lane) == (not writing)


@pytest.mark.trio
async def test_a_replay_does_everything_again_in_order_and_then_flushes() -> None:
    journal = Journal(1 << 20)
    journal.wrote(0, memoryview(b"a" * 4096))
    journal.wrote(8192, memoryview(b"b" * 512))
    journal.zeroed(512, 512, unmap=True)
    journal.mark()
    journal.wrote(1024, memoryview(b"c" * 512))
    journal.zeroed(8192, 512, unmap=False)
    device = MemoryDevice(SIZE, completion=Completion.ON_KICK)
    assert await replay(journal, device) == 4096 + 512 + 512
    assert device.data[:4096] == b"a" * 512 + bytes(512) + b"c" * 512 + b"a" * 2560
    assert device.data[8192:8704] == bytes(512)
    assert device.log[-1].op == "flush"
    assert [row.op for row in device.log].count("flush") == 1
    assert [(row.op, row.unmap) for row in device.log if row.op == "write_zeroes"] == [
        ("write_zeroes", True),
        ("write_zeroes", False),
    ]
    assert len(journal) == 5


@pytest.mark.trio
async def test_a_replay_of_nothing_touches_nothing() -> None:
    device = MemoryDevice(SIZE)
    assert await replay(Journal(1 << 20), device) == 0
    assert not device.log


@pytest.mark.trio
@pytest.mark.parametrize("op", ["write", "write_zeroes", "flush"])
async def test_a_replay_that_fails_leaves_the_journal(op: str) -> None:
    journal = Journal(1 << 20)
    for index in range(200):
        journal.wrote(index * 512, memoryview(bytes(512)))
    journal.zeroed(1 << 20, 512, unmap=False)
    device = MemoryDevice(SIZE, completion=Completion.ON_KICK)
    device.fail(op, errno.EIO)
    with pytest.raises(StorageError):
        await replay(journal, device)
    assert not device.outstanding
    assert len(journal) == 201
    assert await replay(journal, device) == 200 * 512
