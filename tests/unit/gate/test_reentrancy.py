"""Completions that act on the gate: they issue, cancel and answer from inside it."""

from __future__ import annotations

import errno

import pytest

from ploopd.errors import ParkTimeoutError, StorageError
from ploopd.gate.filter import Gate
from ploopd.gate.limits import ParkLimits
from ploopd.gate.parking import Request
from scst_shim import QueueFlags, StandbyCheck
from tests.support.memory_device import Completion, MemoryDevice

SIZE = 1 << 20


def gate_over(device: MemoryDevice, limits: ParkLimits | None = None) -> Gate:
    check = StandbyCheck()
    check.enable()
    gate = Gate(
        device,
        name="disk",
        fuses=QueueFlags("disk", check),
        clock=lambda: 0.0,
        on_event=lambda _: None,
        limits=limits,
    )
    gate.bind()
    return gate


@pytest.mark.parametrize("cancellable", [True, False])
def test_the_answer_to_a_disowned_request_may_cancel_the_next_one(cancellable: bool) -> None:
    """Beyond the limits a disowned request is answered BUSY while others are still to come."""
    device = MemoryDevice(SIZE, completion=Completion.MANUAL, cancellable=cancellable)
    gate = gate_over(device, ParkLimits(max_requests=1))
    answers: list[tuple[str, StorageError | None]] = []
    cancelled: list[bool] = []
    requests: list[Request] = []

    def done(name: str, victim: int) -> None:
        def finished(error: StorageError | None) -> None:
            answers.append((name, error))
            cancelled.append(requests[victim].cancel())

        requests.append(gate.write(len(requests) * 512, memoryview(bytes(512)), finished))

    done("a", 2)
    done("b", 3)
    done("c", 1)
    done("d", 1)
    gate.begin_recovery()
    gate.write(8192, memoryview(bytes(512)), lambda _: None)  # fills the room there is
    gate.disown()
    assert [(name, type(error)) for name, error in answers] == [
        ("a", ParkTimeoutError),
        ("b", ParkTimeoutError),
    ]
    assert cancelled == [True, True]
    assert gate.executing_count == 0
    fresh = MemoryDevice(SIZE)
    gate.swap(fresh)
    gate.leave_standby()
    assert [row.offset for row in fresh.log] == [8192]
    device.complete()
    assert len(answers) == 2


def test_an_answer_may_abort_what_its_own_failure_would_park() -> None:
    device = MemoryDevice(SIZE, completion=Completion.MANUAL)
    gate = gate_over(device)
    answers: list[StorageError | None] = []
    first = gate.write(0, memoryview(bytes(512)), answers.append)
    second = gate.write(0, memoryview(bytes(512)), lambda _: None)
    assert second.cancel() is True  # it waits for the first
    assert first.cancel() is False
    device.fail("write", errno.EIO)
    device.complete()
    assert [error and error.errno for error in answers] == [errno.ECANCELED]
    assert (gate.parked_count, gate.executing_count) == (0, 0)
