"""The gate over a device in memory: what passes, what is parked, and what comes out again."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable

import pytest
import trio
import trio.testing

from ploopd.errors import BusyError, ParkTimeoutError, StorageError, UsageError
from ploopd.gate.errnos import STANDBY_ERRNOS
from ploopd.gate.events import Event, EventKind
from ploopd.gate.filter import Gate
from ploopd.gate.limits import ParkLimits
from ploopd.gate.state import GateState
from ploopd.storage.device import BlockDevice
from scst_shim import QueueFlags, StandbyCheck
from tests.support.memory_device import Completion, MemoryDevice

SIZE = 1 << 20
Answers = list[StorageError | None]


class Bench:
    """A gate, its device, and what they reported."""

    def __init__(
        self,
        *,
        key: bool = True,
        en: bool = True,
        limits: ParkLimits | None = None,
        completion: Completion = Completion.AT_ONCE,
        inline: bool = True,
        cancellable: bool = False,
    ) -> None:
        self.now = 0.0
        self.events: list[Event] = []
        self.check = StandbyCheck()
        if key:
            self.check.enable()
        self.completion = completion
        self.device = MemoryDevice(
            SIZE, completion=completion, inline=inline, cancellable=cancellable
        )
        self.gate = Gate(
            self.device,
            name="disk",
            fuses=QueueFlags("disk", self.check, warn=lambda _: None),
            clock=lambda: self.now,
            on_event=self.events.append,
            limits=limits,
        )
        if en:
            self.gate.bind()

    def kinds(self) -> list[str]:
        return [event.kind.value for event in self.events]

    def fail(self, op: str | None = None, number: int = errno.EIO) -> None:
        self.device.fail(op, number, times=None)

    def replaced(self) -> MemoryDevice:
        """Replace the device by a copy, as recovery does; returns the copy."""
        self.gate.begin_recovery()
        fresh = MemoryDevice(SIZE, data=bytearray(self.device.data), completion=self.completion)
        self.gate.swap(fresh)
        self.gate.leave_standby()
        return fresh


def data(byte: bytes = b"x", length: int = 512) -> memoryview:
    return memoryview(bytearray(byte * length))


def slow_calls(gate: BlockDevice, answers: Answers) -> dict[str, Callable[[], object]]:
    """Every slow operation of a block device."""
    return {
        "read": lambda: gate.read(0, data(), answers.append),
        "write": lambda: gate.write(0, data(), answers.append, fua=True),
        "write_zeroes": lambda: gate.write_zeroes(0, 512, answers.append, unmap=True, fua=True),
        "discard": lambda: gate.discard(0, 512, answers.append),
        "flush": lambda: gate.flush(answers.append),
    }


OPS = list(slow_calls(MemoryDevice(512), []))


def test_an_open_gate_is_the_device() -> None:
    bench, answers = Bench(), []
    gate: BlockDevice = bench.gate
    assert (gate.size, gate.cluster_size, gate.read_only) == (SIZE, 1 << 20, False)
    assert gate.try_write(0, data(b"a")) is True
    buffer = data()
    assert gate.try_read(0, buffer) is True
    assert bytes(buffer) == b"a" * 512
    for call in slow_calls(gate, answers).values():
        call()
    gate.kick()
    assert answers == [None] * 5
    assert [row.op for row in bench.device.log] == ["write", "read", *OPS]
    assert all(row.fua for row in bench.device.log if not row.inline and "write" in row.op)
    assert bench.device.kicks == 1
    assert sum(extent.length for extent in gate.extents(0, SIZE)) == SIZE
    assert bench.events == []


@pytest.mark.parametrize("number", sorted(STANDBY_ERRNOS))
@pytest.mark.parametrize("op", OPS)
def test_each_standby_errno_of_each_operation_parks_it(op: str, number: int) -> None:
    bench, answers = Bench(), []
    bench.fail(None, number)
    slow_calls(bench.gate, answers)[op]()
    assert answers == []
    assert bench.gate.standby_text == "on"
    assert bench.gate.state is GateState.STANDBY
    assert bench.kinds() == ["standby-entered", "parked"]
    assert bench.events[0].details["errno"] == errno.errorcode[number]
    fresh = bench.replaced()
    assert answers == [None]
    assert [row.op for row in fresh.log] == [op]
    assert bench.gate.standby_text == "off"


@pytest.mark.parametrize("op", ["read", "write"])
def test_an_inline_error_sends_the_caller_to_the_slow_path_which_parks(op: str) -> None:
    bench, answers = Bench(), []
    bench.fail()
    gate = bench.gate
    attempt = gate.try_read if op == "read" else gate.try_write
    assert attempt(0, data()) is False
    assert gate.state is GateState.STANDBY
    assert attempt(0, data()) is False
    slow_calls(gate, answers)[op]()
    assert (answers, gate.parked_count, gate.parked_bytes) == ([], 1, 512)
    assert len(bench.device.log) == 1  # while closed the device is not touched


@pytest.mark.parametrize(("key", "en"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("inline", [True, False])
def test_with_a_fuse_off_the_error_is_reported_and_the_device_latched(
    key: bool, en: bool, inline: bool
) -> None:
    bench, answers = Bench(key=key, en=en), []
    gate = bench.gate
    bench.device.fail("write", errno.EIO)
    if inline:
        with pytest.raises(StorageError) as caught:
            gate.try_write(0, data())
        error: StorageError | None = caught.value
    else:
        gate.write(0, data(), answers.append)
        error = answers.pop()
    assert error is not None
    assert error.errno == errno.EIO
    assert gate.state is GateState.ACTIVE
    assert gate.standby_text == "not supported"
    assert bench.kinds() == ["latched-read-only"]
    assert gate.read_only
    assert gate.try_read(0, data()) is True
    assert gate.try_write(0, data()) is False
    for op in ("write", "write_zeroes", "discard", "read", "flush"):
        slow_calls(gate, answers)[op]()
    numbers = [error and error.errno for error in answers]
    assert numbers == [errno.EROFS] * 3 + [None] * 2
    assert gate.clear_latch() is True
    assert gate.clear_latch() is False
    assert gate.try_write(0, data()) is True


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_storage_is_neither_standby_nor_a_latch(number: int) -> None:
    bench, answers = Bench(), []
    bench.device.fail("write", number)
    bench.gate.write(0, data(), answers.append)
    assert answers[0] is not None
    assert answers[0].errno == number
    assert bench.gate.state is GateState.ACTIVE
    assert bench.gate.latched is None
    assert bench.gate.try_write(0, data()) is True


def test_another_errno_with_both_fuses_on_is_reported_and_latches_until_a_replace() -> None:
    bench, answers = Bench(), []
    bench.device.fail("write", errno.ESTALE)
    bench.gate.write(0, data(), answers.append)
    assert answers[0] is not None
    assert answers[0].errno == errno.ESTALE
    assert bench.gate.latched is answers[0]
    bench.replaced()
    assert bench.gate.latched is None
    assert bench.gate.try_write(0, data()) is True


@pytest.mark.parametrize(
    "number", [errno.EBADFD, errno.EROFS, errno.ECANCELED, errno.EOPNOTSUPP, errno.ENOSPC]
)
def test_another_errno_after_the_storage_has_failed_is_the_same_failure(number: int) -> None:
    """GlusterFS answers ENOTCONN first and EBADFD to what else it had in execution; ext4 on a disk
    that dies answers EIO first and then EROFS."""
    bench, first, second = Bench(completion=Completion.MANUAL, inline=False), [], []
    bench.gate.write(0, data(), first.append)
    bench.gate.read(512, data(), second.append)
    bench.device.fail("write", errno.ENOTCONN)
    bench.device.complete(1)
    bench.device.fail("read", number)
    bench.device.complete(1)
    if number == errno.ENOSPC:  # says nothing about the storage's health
        assert [each.errno for each in second if each is not None] == [number]
        return
    assert (first, second, bench.gate.parked_count) == ([], [], 2)
    assert bench.gate.latched is None
    bench.replaced().complete(2)
    assert (first, second) == ([None], [None])


def test_an_errno_that_means_a_full_disk_cannot_be_made_a_standby_errno() -> None:
    with pytest.raises(UsageError, match="ENOSPC"):
        Gate(
            MemoryDevice(512),
            name="disk",
            fuses=QueueFlags("disk", StandbyCheck()),
            clock=lambda: 0.0,
            on_event=lambda _: None,
            standby_errnos=[errno.EIO, errno.ENOSPC],
        )


def test_a_request_that_fails_in_execution_keeps_its_place_before_later_ones() -> None:
    bench = Bench(completion=Completion.MANUAL, inline=False)
    order: list[int] = []

    def issue(number: int) -> None:
        offset = number % 4 * 512
        bench.gate.write(offset, data(bytes([number])), lambda _: order.append(number))

    for number in range(4):
        issue(number)
    bench.fail()
    bench.device.complete(1, index=2)  # the third fails first, then the others
    for number in range(4, 8):
        issue(number)
    bench.device.complete()
    assert (order, bench.gate.parked_count) == ([], 8)
    fresh = bench.replaced()
    for first in (0, 4):
        assert [each.offset for each in fresh.outstanding] == [0, 512, 1024, 1536]
        fresh.complete(4)
        assert order == list(range(first + 4))
    assert [fresh.data[n * 512] for n in range(4)] == [4, 5, 6, 7]
    assert bench.kinds().count("standby-entered") == 1  # on the edge only


def test_changes_that_overlap_one_in_execution_wait_for_it_also_without_any_fault() -> None:
    bench, answers = Bench(completion=Completion.MANUAL), []
    gate, outstanding = bench.gate, bench.device.outstanding
    gate.write(0, data(b"a", 1024), answers.append)
    assert gate.try_write(512, data(b"b")) is False
    gate.write(512, data(b"b"), answers.append)
    gate.discard(1024, 512, answers.append)  # touches only its neighbour
    gate.read(512, data(), answers.append)
    assert [each.op for each in outstanding] == ["write", "discard"]  # the read waits for "b"
    while outstanding:
        bench.device.complete(1)
    assert answers == [None] * 4
    assert bytes(bench.device.data[:1024]) == b"a" * 512 + b"b" * 512
    assert gate.try_write(512, data(b"c")) is True
    assert bench.events == []  # nothing of this is worth a line in the log


def test_a_later_write_does_not_survive_an_earlier_one_that_fails_and_overlaps() -> None:
    bench, answers = Bench(completion=Completion.MANUAL), []
    bench.gate.write(0, data(b"1"), answers.append)
    bench.gate.write(0, data(b"2"), answers.append)
    bench.fail()
    bench.device.complete(1)
    assert bench.gate.parked_count == 2
    fresh = bench.replaced()
    while fresh.outstanding:
        fresh.complete()
    assert fresh.data[:1] == b"2"


def test_requests_that_do_not_overlap_are_released_together_with_one_kick() -> None:
    bench, answers = Bench(completion=Completion.MANUAL), []
    bench.gate.enter_standby("test")
    for number in range(100):
        bench.gate.write(number * 512, data(), answers.append)
    fresh = bench.replaced()
    assert len(fresh.outstanding) == 100
    assert fresh.kicks == 1
    assert bench.gate.try_read(0, data()) is True  # nothing is parked any more: open again
    assert bench.gate.try_write(0, data()) is False  # except where a write is in execution
    assert bench.gate.try_write(100 * 512, data()) is True


def test_the_inline_path_stays_closed_while_released_requests_wait_for_their_turn() -> None:
    bench, answers = Bench(completion=Completion.MANUAL), []
    bench.gate.enter_standby("test")
    for byte in (b"a", b"b"):
        bench.gate.write(0, data(byte), answers.append)
    fresh = bench.replaced()
    assert bench.gate.try_write(0, data(b"c")) is False
    bench.gate.write(0, data(b"c"), answers.append)
    bench.gate.read(4096, data(), answers.append)  # overlaps nothing: at once
    assert [each.op for each in fresh.outstanding] == ["write", "read"]
    while fresh.outstanding:
        fresh.complete()
    assert bytes(fresh.data[:1]) == b"c"
    assert bench.gate.try_write(0, data(b"d")) is True


def test_a_flush_is_released_after_the_writes_before_it_and_before_those_after() -> None:
    bench, answers = Bench(completion=Completion.MANUAL), []
    bench.gate.enter_standby("test")
    bench.gate.write(0, data(), answers.append)
    bench.gate.flush(answers.append)
    bench.gate.write(4096, data(), answers.append)
    fresh = bench.replaced()
    steps = []
    while fresh.outstanding:
        steps.append([each.op for each in fresh.outstanding])
        fresh.complete(1)
    assert steps == [["write"], ["flush"], ["write"]]


def test_a_fault_during_the_release_stops_it_and_nothing_is_lost() -> None:
    bench, answers = Bench(), []
    bench.gate.enter_standby("test")
    for number in range(10):
        bench.gate.write(number * 512, data(), answers.append)
    bench.gate.begin_recovery()
    second = MemoryDevice(SIZE)
    second.fail("write", errno.ENOTCONN, start=3 * 512, end=4 * 512, times=None)
    bench.gate.swap(second)
    bench.gate.leave_standby()
    assert bench.gate.state is GateState.STANDBY
    assert (len(answers), bench.gate.parked_count) == (3, 7)
    bench.device = second
    second.heal()
    third = bench.replaced()
    assert answers == [None] * 10
    assert [row.offset for row in third.log] == [number * 512 for number in range(3, 10)]


def test_ten_thousand_released_requests_do_not_recurse() -> None:
    bench, answers = Bench(limits=ParkLimits(max_requests=20_000)), []
    bench.gate.enter_standby("test")
    for _ in range(10_000):
        bench.gate.write_zeroes(0, 512, answers.append)
    bench.replaced()
    assert len(answers) == 10_000


def test_a_cancelled_parked_write_never_reaches_any_device() -> None:
    bench, answers = Bench(), []
    bench.fail("write")
    requests = [bench.gate.write(n * 512, data(b"z"), answers.append) for n in range(3)]
    assert requests[1].cancel() is True
    assert requests[1].cancel() is False
    fresh = bench.replaced()
    assert answers == [None, None]
    assert [row.offset for row in fresh.log] == [0, 1024]
    assert bytes(fresh.data[512:1024]) == bytes(512)
    assert requests[0].cancel() is False


def test_a_cancelled_request_the_device_has_not_begun_is_dropped() -> None:
    bench, answers = Bench(completion=Completion.MANUAL, cancellable=True), []
    request = bench.gate.write(0, data(), answers.append)
    assert request.cancel() is True
    assert bench.device.outstanding == []
    assert bench.gate.executing_count == 0


@pytest.mark.parametrize("fails", [False, True])
def test_a_request_cancelled_in_execution_is_answered_once_and_never_executed_again(
    fails: bool,
) -> None:
    bench, answers = Bench(completion=Completion.MANUAL), []
    request = bench.gate.write(0, data(), answers.append)
    assert request.cancel() is False
    if fails:
        bench.fail("write")
    bench.device.complete()
    assert len(answers) == 1
    assert (answers[0] and answers[0].errno) == (errno.ECANCELED if fails else None)
    if fails:
        assert bench.gate.parked_count == 0
        assert bench.replaced().log == []


@pytest.mark.parametrize("limits", [ParkLimits(max_requests=3), ParkLimits(max_bytes=1536)])
def test_beyond_the_limits_requests_are_answered_busy_at_once(limits: ParkLimits) -> None:
    bench, answers = Bench(limits=limits), []
    bench.gate.enter_standby("test")
    for number in range(6):
        bench.gate.write(number * 512, data(), answers.append)
    assert [type(error) for error in answers] == [ParkTimeoutError] * 3
    assert bench.kinds().count("park-limit") == 1
    assert len(bench.replaced().log) == 3


def test_after_park_max_requests_are_answered_busy_and_never_executed() -> None:
    bench, answers = Bench(limits=ParkLimits(park_max=20.0)), []
    notified: list[float] = []
    bench.gate.notify_parked(lambda: notified.append(bench.now))
    bench.gate.enter_standby("test")
    assert bench.gate.next_deadline() is None
    for second in range(3):
        bench.now = float(second)
        bench.gate.write(second * 512, data(), answers.append)
    assert notified == [0.0]
    assert bench.gate.next_deadline() == 20.0
    assert bench.gate.expire(19.9) == 0
    assert bench.gate.expire(21.0) == 2
    assert [type(error) for error in answers] == [ParkTimeoutError] * 2
    assert bench.gate.next_deadline() == 22.0
    assert bench.gate.parked_bytes == 512
    assert [row.offset for row in bench.replaced().log] == [1024]


def test_time_in_execution_counts_towards_park_max() -> None:
    bench, answers = Bench(completion=Completion.MANUAL), []
    bench.gate.write(0, data(), answers.append)
    bench.now = 15.0
    bench.fail()
    bench.device.complete()
    assert bench.gate.next_deadline() == 20.0


def test_parking_for_ever_is_an_explicit_choice() -> None:
    bench, answers = Bench(limits=ParkLimits(park_max=None)), []
    bench.gate.enter_standby("test")
    bench.gate.write(0, data(), answers.append)
    assert bench.gate.next_deadline() is None
    assert bench.gate.expire(math.inf) == 0
    assert bench.gate.parked_count == 1


def test_binding_sets_en_and_the_last_unbinding_clears_it() -> None:
    bench = Bench(en=False)
    assert bench.gate.standby_text == "not supported"
    bench.gate.bind()
    bench.gate.bind()
    bench.gate.unbind()
    assert bench.gate.standby_text == "off"
    bench.gate.unbind()
    assert bench.gate.standby_text == "not supported"
    with pytest.raises(ValueError, match="no front end"):
        bench.gate.unbind()


def test_removing_the_last_front_end_in_standby_fails_what_is_parked() -> None:
    bench, answers = Bench(), []
    bench.fail()
    bench.gate.write(0, data(), answers.append)
    bench.gate.unbind()
    assert answers[0] is not None
    assert answers[0].errno == errno.EIO
    bench.gate.read(0, data(), answers.append)
    assert answers[1] is not None
    assert "no working storage" in str(answers[1])
    bench.gate.bind()
    assert bench.gate.standby_text == "on"
    bench.gate.read(0, data(), answers.append)
    assert bench.gate.parked_count == 1


def test_entering_standby_by_hand_needs_both_fuses_and_is_idempotent() -> None:
    bench = Bench()
    bench.gate.enter_standby("maintenance")
    bench.gate.enter_standby("again")
    assert bench.gate.cause == "maintenance"
    assert not bench.gate.faulted
    assert bench.kinds() == ["standby-entered"]
    with pytest.raises(UsageError, match="not supported"):
        Bench(en=False).gate.enter_standby("maintenance")


def test_leaving_an_active_device_is_refused() -> None:
    with pytest.raises(BusyError, match="active"):
        Bench().gate.leave_standby()


@pytest.mark.parametrize("began", ["active", "standby"])
def test_a_failed_recovery_ends_in_standby_unless_an_active_device_is_untouched(began: str) -> None:
    for untouched in (True, False):
        bench, answers = Bench(), []
        if began == "standby":
            bench.gate.enter_standby("test")
        bench.gate.begin_recovery()
        bench.gate.write(0, data(), answers.append)
        bench.gate.fail_recovery(BusyError("no"), untouched=untouched)
        resumed = began == "active" and untouched
        assert bench.gate.state is (GateState.ACTIVE if resumed else GateState.STANDBY)
        assert bench.gate.standby_text == ("off" if resumed else "on")
        assert answers == ([None] if resumed else [])


def test_an_active_device_whose_storage_fails_during_a_recovery_does_not_go_on() -> None:
    bench, answers = Bench(completion=Completion.MANUAL), []
    bench.gate.write(0, data(), answers.append)
    bench.gate.begin_recovery()
    assert bench.gate.standby_text == "off"
    bench.fail("write")
    bench.device.complete()
    assert (bench.gate.state, bench.gate.standby_text) == (GateState.RECOVERING, "on")
    bench.gate.fail_recovery(BusyError("no"), untouched=True)
    assert bench.gate.state is GateState.STANDBY
    assert (answers, bench.gate.parked_count) == ([], 1)
    bench.replaced().complete()
    assert answers == [None]


def test_swap_is_refused_outside_recovery_and_for_another_geometry() -> None:
    bench = Bench()
    with pytest.raises(ValueError, match="while active"):
        bench.gate.swap(MemoryDevice(SIZE))
    bench.gate.begin_recovery()
    with pytest.raises(ValueError, match="geometry"):
        bench.gate.swap(MemoryDevice(SIZE // 2))
    bench.gate.swap(MemoryDevice(SIZE * 2))
    assert bench.gate.size == SIZE * 2


@pytest.mark.trio
async def test_drain_waits_for_what_is_in_execution(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bench, answers = Bench(completion=Completion.MANUAL), []
    bench.gate.write(0, data(), answers.append)
    bench.gate.begin_recovery()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _() -> None:
            await trio.sleep(3)
            bench.device.complete()

        assert await bench.gate.drain(5.0) is True
    assert (trio.current_time(), answers) == (3.0, [None])


@pytest.mark.trio
async def test_hung_requests_are_disowned_executed_again_and_their_late_results_void(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bench, order = Bench(completion=Completion.MANUAL), []
    for number in range(3):
        bench.gate.write(0, data(bytes([number + 1])), lambda _, n=number: order.append(n))
    bench.gate.begin_recovery()
    assert await bench.gate.drain(5.0) is False
    assert trio.current_time() == 5.0
    assert (bench.gate.executing_count, bench.gate.parked_count) == (0, 3)
    assert bench.gate.try_write(SIZE - 512, data()) is False
    assert EventKind.DISOWNED in [event.kind for event in bench.events]
    old, fresh = bench.device, MemoryDevice(SIZE)
    bench.gate.swap(fresh)
    bench.gate.leave_standby()
    assert order == [0, 1, 2]
    old.complete()
    assert order == [0, 1, 2]
    assert (old.data[0], fresh.data[0]) == (1, 3)


@pytest.mark.trio
async def test_a_hung_request_that_was_cancelled_is_answered_and_not_executed_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bench, answers = Bench(completion=Completion.MANUAL), []
    request = bench.gate.write(0, data(), answers.append)
    assert request.cancel() is False
    bench.gate.begin_recovery()
    await bench.gate.drain(1.0)
    assert answers[0] is not None
    assert answers[0].errno == errno.ECANCELED
    fresh = MemoryDevice(SIZE)
    bench.gate.swap(fresh)
    bench.gate.leave_standby()
    assert fresh.log == []
    bench.device.complete()
    assert len(answers) == 1
