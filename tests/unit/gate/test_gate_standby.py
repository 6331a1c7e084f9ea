"""What an error of the device means to the gate: standby, a latch, an answer; and the way back."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from ploopd.errors import BusyError, StorageError, UsageError
from ploopd.gate.errnos import STANDBY_ERRNOS
from ploopd.gate.filter import Gate
from ploopd.gate.state import GateState
from ploopd.storage.device import BlockDevice
from scst_shim import QueueFlags, StandbyCheck
from tests.support.memory_device import Completion, MemoryDevice
from tests.unit.gate.harness import SIZE, Bench, data

Answers = list[StorageError | None]


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
