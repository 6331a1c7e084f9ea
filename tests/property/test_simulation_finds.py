"""The episodes in virtual time find what they are for: gates that are wrong in one way each."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from ploopd.errors import ParkTimeoutError, StorageError
from ploopd.gate.filter import Gate
from ploopd.gate.lane import GateLane
from ploopd.gate.parking import Attempt, Op, ParkedRequests, Request, RequestState
from ploopd.gate.queue import RequestQueue
from ploopd.gate.ranges import BusyRanges
from ploopd.gate.release import ReleaseOrder
from ploopd.gate.room import Room
from ploopd.gate.state import GateState
from scst_shim import QueueFlags
from tests.support import interpreted
from tests.support.virtual.choices import seeded
from tests.support.virtual.play import problem

ENOUGH = 500
"""Episodes within which every one of these must be found."""

Break = Callable[[pytest.MonkeyPatch], None]
BREAKS: dict[str, Break] = {}


def mistake(function: Break) -> Break:
    BREAKS[function.__name__] = function
    return function


@mistake
def releases_in_reverse(patch: pytest.MonkeyPatch) -> None:
    release, in_order = RequestQueue.release, ParkedRequests.in_order

    def wrong(queue: RequestQueue) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(ParkedRequests, "in_order", lambda self: in_order(self)[::-1])
            release(queue)

    patch.setattr(RequestQueue, "release", wrong)


@mistake
def releases_all_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReleaseOrder, "_predecessors", lambda self, request: set())


@mistake
def lets_a_flush_overtake_the_writes_before_it(patch: pytest.MonkeyPatch) -> None:
    predecessors = ReleaseOrder._predecessors

    def wrong(order: ReleaseOrder, request: Request) -> set[Request]:
        found = predecessors(order, request)
        return set() if request.op is Op.FLUSH else found

    patch.setattr(ReleaseOrder, "_predecessors", wrong)


@mistake
def lets_writes_overtake_the_flush_before_them(patch: pytest.MonkeyPatch) -> None:
    predecessors = ReleaseOrder._predecessors

    def wrong(order: ReleaseOrder, request: Request) -> set[Request]:
        return {each for each in predecessors(order, request) if each.op is not Op.FLUSH}

    patch.setattr(ReleaseOrder, "_predecessors", wrong)


@mistake
def forgets_who_waited_behind_a_withdrawn_request(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReleaseOrder, "withdraw", ReleaseOrder.ended)


@mistake
def runs_overlapping_changes_together(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BusyRanges, "overlaps", lambda self, offset, length: False)


@mistake
def looks_only_at_narrow_ranges(patch: pytest.MonkeyPatch) -> None:
    overlaps = BusyRanges.overlaps

    def wrong(ranges: BusyRanges, offset: int, length: int) -> bool:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(ranges, "_wide", [])
            return overlaps(ranges, offset, length)

    patch.setattr(BusyRanges, "overlaps", wrong)


@mistake
def hears_disowned_results(patch: pytest.MonkeyPatch) -> None:
    finished = RequestQueue.finished

    def wrong(queue: RequestQueue, attempt: Attempt, error: StorageError | None) -> None:
        if attempt.void:
            attempt.request.done(error)
        else:
            finished(queue, attempt, error)

    patch.setattr(RequestQueue, "finished", wrong)


@mistake
def executes_a_cancelled_request(patch: pytest.MonkeyPatch) -> None:
    cancel = RequestQueue.cancel

    def wrong(queue: RequestQueue, request: Request) -> bool:
        return request.state is RequestState.PARKED or cancel(queue, request)

    patch.setattr(RequestQueue, "cancel", wrong)


@mistake
def parks_an_aborted_request_again(patch: pytest.MonkeyPatch) -> None:
    finished = RequestQueue.finished

    def wrong(queue: RequestQueue, attempt: Attempt, error: StorageError | None) -> None:
        attempt.request.abandoned = False
        finished(queue, attempt, error)

    patch.setattr(RequestQueue, "finished", wrong)


@mistake
def acknowledges_what_has_failed(patch: pytest.MonkeyPatch) -> None:
    finished = RequestQueue.finished

    def wrong(queue: RequestQueue, attempt: Attempt, error: StorageError | None) -> None:
        changes = attempt.request.op is Op.DISCARD
        finished(queue, attempt, None if changes else error)

    patch.setattr(RequestQueue, "finished", wrong)


@mistake
def gives_a_failed_request_the_last_place(patch: pytest.MonkeyPatch) -> None:
    park, numbers = RequestQueue.park, itertools.count(1 << 20)

    def wrong(queue: RequestQueue, request: Request) -> bool:
        if request.state is RequestState.EXECUTING:
            request.sequence = next(numbers)
        return park(queue, request)

    patch.setattr(RequestQueue, "park", wrong)


@mistake
def answers_busy_to_a_request_in_execution(patch: pytest.MonkeyPatch) -> None:
    expire = RequestQueue.expire

    def wrong(queue: RequestQueue, now: float) -> int:
        for request in list(queue._executing.values()):
            if now > request.admitted_at + 20.0:
                request.done(ParkTimeoutError(request.op.value))
        return expire(queue, now)

    patch.setattr(RequestQueue, "expire", wrong)


@mistake
def answers_busy_too_early(patch: pytest.MonkeyPatch) -> None:
    expire = RequestQueue.expire
    patch.setattr(RequestQueue, "expire", lambda queue, now: expire(queue, now + 2.0))


@mistake
def forgets_that_time_passes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RequestQueue, "expire", lambda queue, now: 0)


@mistake
def opens_the_inline_path_while_others_wait(patch: pytest.MonkeyPatch) -> None:
    rewire = Gate._rewire

    def wrong(gate: Gate) -> None:
        rewire(gate)
        if gate._state is GateState.ACTIVE and gate._latch is None:
            gate._write_now = gate._device.try_write

    patch.setattr(Gate, "_rewire", wrong)


@mistake
def forgets_fua_when_it_executes_again(patch: pytest.MonkeyPatch) -> None:
    start = RequestQueue.start

    def wrong(queue: RequestQueue, request: Request) -> None:
        request.fua = request.fua and request.state is not RequestState.PARKED
        start(queue, request)

    patch.setattr(RequestQueue, "start", wrong)


@mistake
def writes_other_memory_when_it_executes_again(patch: pytest.MonkeyPatch) -> None:
    start = RequestQueue.start

    def wrong(queue: RequestQueue, request: Request) -> None:
        if request.state is RequestState.PARKED and request.op is Op.WRITE:
            request.buffer = memoryview(bytes(request.length))
        start(queue, request)

    patch.setattr(RequestQueue, "start", wrong)


@mistake
def loses_count_of_parked_bytes(patch: pytest.MonkeyPatch) -> None:
    remove = ParkedRequests.remove

    def wrong(parked: ParkedRequests, request: Request) -> None:
        remove(parked, request)
        parked.size += request.op is Op.READ

    patch.setattr(ParkedRequests, "remove", wrong)


@mistake
def keeps_parked_requests_without_fuses(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RequestQueue, "fail_parked", lambda queue, error: None)


@mistake
def does_not_latch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Gate, "_consider_latch", lambda gate, error: None)


@mistake
def leaves_the_flag_set(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(QueueFlags, "clear_standby", lambda flags: False)


@mistake
def goes_on_after_a_failure_during_a_replace(patch: pytest.MonkeyPatch) -> None:
    fail = Gate.fail_recovery

    def wrong(gate: Gate, error: BaseException, *, untouched: bool = False) -> None:
        gate._faulted = gate._touched = False
        fail(gate, error, untouched=untouched)

    patch.setattr(Gate, "fail_recovery", wrong)


@mistake
def does_not_kick_the_device_after_a_release(patch: pytest.MonkeyPatch) -> None:
    pump = RequestQueue._pump

    def wrong(queue: RequestQueue, order: ReleaseOrder) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(type(queue.device), "kick", lambda device: None)
            pump(queue, order)

    patch.setattr(RequestQueue, "_pump", wrong)


@mistake
def forgets_the_changes_in_the_lane(patch: pytest.MonkeyPatch) -> None:
    begin, ended, adopt = GateLane.begin, GateLane.ended, GateLane.adopt

    class Nobody:
        count = 0

        def add(self, request: object) -> None: ...

        def remove(self, request: object) -> None: ...

    def careless(method: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(lane: GateLane, *arguments: object) -> object:
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(lane, "_busy", Nobody())
                return method(lane, *arguments)

        return wrong

    patch.setattr(GateLane, "begin", careless(begin))
    patch.setattr(GateLane, "ended", careless(ended))
    patch.setattr(GateLane, "adopt", careless(adopt))


@mistake
def does_not_empty_the_lane(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GateLane, "empty", lambda lane: None)


@mistake
def leaves_the_lane_open(patch: pytest.MonkeyPatch) -> None:
    rewire = Gate._rewire

    def wrong(gate: Gate) -> None:
        rewire(gate)
        gate.lane.reads = True

    patch.setattr(Gate, "_rewire", wrong)


@mistake
def gives_an_adopted_request_a_new_place(patch: pytest.MonkeyPatch) -> None:
    adopt, numbers = RequestQueue.adopt, itertools.count(1 << 20)

    def wrong(queue: RequestQueue, request: Request) -> Attempt:
        request.sequence = next(numbers)
        return adopt(queue, request)

    patch.setattr(RequestQueue, "adopt", wrong)


@mistake
def says_that_a_storage_is_full_each_time(patch: pytest.MonkeyPatch) -> None:
    exhausted = Room.exhausted

    def wrong(room: Room, request: Request, error: StorageError) -> None:
        room.failure = None
        exhausted(room, request, error)

    patch.setattr(Room, "exhausted", wrong)


def a_gate_that(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BREAKS[name](monkeypatch)
    found = next((seed for seed in range(ENOUGH) if problem(seeded(seed))), None)
    assert found is not None, f"{ENOUGH} episodes say that nothing is wrong"
    print(f"found by seed {found}: {problem(seeded(found))}")
    monkeypatch.undo()
    assert not problem(seeded(found))  # it is the mistake that was found


if interpreted.compiled():

    @pytest.mark.timeout(600)
    def test_gates_that_make_these_mistakes() -> None:
        """In the sources: methods of compiled classes cannot be replaced."""
        interpreted.again(__file__)

else:
    test_a_gate_that = pytest.mark.parametrize("name", BREAKS)(a_gate_that)
