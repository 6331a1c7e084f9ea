"""What the gate parks and what comes out again: order, cancellation, limits, hung requests."""

from __future__ import annotations

import errno
import math

import pytest
import trio
import trio.testing

from ploopd.errors import ParkTimeoutError
from ploopd.gate.events import EventKind
from ploopd.gate.limits import ParkLimits
from ploopd.gate.state import GateState
from tests.support.memory_device import Completion, MemoryDevice
from tests.unit.gate.harness import SIZE, Bench, data


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
