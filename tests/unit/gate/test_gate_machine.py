"""The gate as a state machine: calls in every order, against a model of what is owed to whom."""

from __future__ import annotations

import errno

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ploopd.errors import BusyError, StorageError
from ploopd.gate.filter import Gate
from ploopd.gate.limits import ParkLimits
from ploopd.gate.parking import Request, RequestState
from ploopd.gate.state import GateState
from scst_shim import QueueFlags, StandbyCheck
from tests.support.memory_device import Completion, MemoryDevice

BLOCK = 512
BLOCKS = 8
PARK_MAX = 20.0


class GateMachine(RuleBasedStateMachine):
    """Every request is known by its index; `answers[i]` are what its `done` was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.check = StandbyCheck()
        self.check.enable()
        self.flags = QueueFlags("disk", self.check, warn=lambda _: None)
        self.device = self.fresh()
        self.gate = Gate(
            self.device,
            name="disk",
            fuses=self.flags,
            clock=lambda: self.now,
            on_event=lambda _: None,
            limits=ParkLimits(max_requests=5, park_max=PARK_MAX),
        )
        self.gate.bind()
        self.bound = True
        self.requests: list[Request] = []
        self.answers: list[list[StorageError | None]] = []
        self.dropped: set[int] = set()
        self.swapped = False

    def fresh(self) -> MemoryDevice:
        return MemoryDevice(BLOCK * BLOCKS, completion=Completion.MANUAL, inline=False)

    @rule(
        op=st.sampled_from(["read", "write", "zero", "discard", "flush"]), block=st.integers(0, 7)
    )
    def issue(self, op: str, block: int) -> None:
        answers: list[StorageError | None] = []
        self.answers.append(answers)
        gate, offset, buffer = self.gate, block * BLOCK, memoryview(bytearray(BLOCK))
        match op:
            case "read":
                request = gate.read(offset, buffer, answers.append)
            case "write":
                request = gate.write(offset, buffer, answers.append)
            case "zero":
                request = gate.write_zeroes(offset, BLOCK, answers.append)
            case "discard":
                request = gate.discard(offset, BLOCK, answers.append)
            case _:
                request = gate.flush(answers.append)
        self.requests.append(request)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.requests:
            index = data.draw(st.integers(0, len(self.requests) - 1))
            before = len(self.answers[index])
            if self.requests[index].cancel():
                assert before == 0
                self.dropped.add(index)

    @precondition(lambda self: self.device.outstanding)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.device.outstanding) - 1))
        self.device.complete(1, index=index)

    @precondition(lambda self: self.device.outstanding)
    @rule(number=st.sampled_from([errno.EIO, errno.EBUSY, errno.ENOTCONN, errno.ENOSPC]))
    def fail(self, number: int) -> None:
        self.device.fail(None, number)
        self.device.complete(1)
        self.device.heal()
        fuses = self.bound and self.check.enabled
        if number != errno.ENOSPC and fuses:
            assert self.gate.state is not GateState.ACTIVE
            assert self.gate.standby_text == "on"

    @rule()
    def enter(self) -> None:
        if self.flags.supported:
            self.gate.enter_standby("test")
            assert self.gate.state is not GateState.ACTIVE

    @precondition(lambda self: self.gate.state is GateState.STANDBY)
    @rule()
    def leave(self) -> None:
        self.gate.leave_standby()

    @rule()
    def begin(self) -> None:
        if self.gate.state is GateState.RECOVERING:
            try:
                self.gate.begin_recovery()
            except BusyError:
                return
            raise AssertionError("a second recovery was begun")
        self.gate.begin_recovery()
        self.swapped = False

    @precondition(lambda self: self.gate.state is GateState.RECOVERING)
    @rule()
    def drain_and_swap(self) -> None:
        while self.device.outstanding:
            self.device.complete()
        self.device = self.fresh()
        self.gate.swap(self.device)
        self.swapped = True

    @precondition(lambda self: self.gate.state is GateState.RECOVERING and self.swapped)
    @rule()
    def recover(self) -> None:
        self.gate.leave_standby()
        assert self.gate.latched is None

    @precondition(lambda self: self.gate.state is GateState.RECOVERING)
    @rule(untouched=st.booleans())
    def give_up(self, untouched: bool) -> None:
        self.gate.fail_recovery(BusyError("no"), untouched=untouched)

    @rule(seconds=st.sampled_from([1.0, 25.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.gate.expire(self.now)
        for request in self.requests:
            if request.state is RequestState.PARKED:
                assert request.admitted_at + PARK_MAX > self.now

    @rule()
    def rebind(self) -> None:
        if self.bound:
            self.gate.unbind()
        else:
            self.gate.bind()
        self.bound = not self.bound

    @rule()
    def clear_latch(self) -> None:
        self.gate.clear_latch()

    @invariant()
    def everybody_is_owed_one_answer(self) -> None:
        for index, (request, answers) in enumerate(zip(self.requests, self.answers, strict=True)):
            ended = request.state is RequestState.ENDED
            wanted = 0 if not ended or index in self.dropped else 1
            assert len(answers) == wanted, f"{request} has {len(answers)} answers"

    @invariant()
    def counts_agree(self) -> None:
        parked = [each for each in self.requests if each.state is RequestState.PARKED]
        executing = [each for each in self.requests if each.state is RequestState.EXECUTING]
        assert self.gate.parked_count == len(parked) <= 5 + len(executing)
        assert self.gate.parked_bytes == sum(each.held_bytes for each in parked)
        assert self.gate.executing_count == len(executing) == len(self.device.outstanding)

    @invariant()
    def nothing_is_begun_while_closed(self) -> None:
        buffer = memoryview(bytearray(BLOCK))
        if self.gate.state is not GateState.ACTIVE:
            assert self.gate.try_read(0, buffer) is False
            assert self.gate.try_write(0, buffer) is False

    @invariant()
    def the_text_is_one_of_three_and_agrees(self) -> None:
        text = self.gate.standby_text
        if not self.bound:
            assert text == "not supported"
        elif self.gate.state is GateState.STANDBY:
            assert text == "on"
        elif self.gate.state is GateState.ACTIVE:
            assert text == "off"

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        """Parked requests of an active device wait for one that is in execution."""
        if self.gate.state is GateState.ACTIVE and self.gate.parked_count:
            assert self.gate.executing_count


GateMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestGateMachine = pytest.mark.timeout(600)(GateMachine.TestCase)
