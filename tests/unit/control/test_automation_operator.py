"""When automatic recovery stands back: operators, another policy, no device any more, the end."""

from __future__ import annotations

import errno
from typing import cast

import pytest
import trio
import trio.testing

from ploopd.control.automation import RecoveryPolicy
from ploopd.devices import Device
from ploopd.errors import PloopError, StorageError
from ploopd.gate.events import EventKind
from ploopd.gate.state import GateState
from tests.unit.control.automation_rig import Rig, rig

pytestmark = pytest.mark.trio


async def test_a_standby_of_an_operator_is_left_alone(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rig() as r:
        r.hold()
        await trio.sleep(100)
        # Not even when the storage fails meanwhile.
        r.fail()
        await trio.sleep(100)
        assert r.gate.faulted
        assert r.files.asked == []
        assert r.recoverer.describe() == "reopen, held by an operator"
        r.gate.leave_standby()
        r.fail()
        await trio.sleep(1)
        assert r.gate.state is GateState.ACTIVE
        assert len(r.files.asked) == 2


async def test_an_operator_holds_a_device_that_is_being_recovered(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rig() as r:
        r.files.seconds = 5.0
        r.fail()
        await trio.sleep(2)
        assert r.gate.state is GateState.RECOVERING
        r.hold()
        await trio.sleep(100)
        assert r.gate.state is GateState.STANDBY
        assert [what for _, what, _ in r.files.asked] == ["verify", "replace"]
        assert EventKind.HELD in r.kinds()


async def test_a_hold_in_the_last_moment_of_a_replace_still_holds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rig() as r:

        async def replace(path: str) -> None:
            r.gate.begin_recovery()
            r.hold()  # after the last checkpoint: the cancellation comes too late
            r.gate.leave_standby()
            await trio.lowlevel.checkpoint()

        r.files.replace = replace  # type: ignore[method-assign]
        r.fail()
        await trio.sleep(100)
        assert r.gate.state is GateState.STANDBY
        assert r.recoverer.describe() == "reopen, held by an operator"


async def test_a_replace_by_hand_stops_the_attempt_and_comes_first(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rig() as r:
        r.files.seconds = 50.0
        r.fail()
        await trio.sleep(1)
        async with r.automation.operator(cast(Device, r.device)):
            assert r.gate.state is GateState.STANDBY
            assert not r.device.replacing
            await trio.sleep(100)
            assert len(r.files.asked) == 2, "nothing is tried while the operator works"
            r.gate.begin_recovery()
            r.gate.leave_standby()
        await trio.sleep(100)
        assert r.gate.state is GateState.ACTIVE
        assert len(r.files.asked) == 2


async def test_after_a_replace_by_hand_that_failed_it_goes_on(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rig() as r:
        r.files.seconds = 50.0
        r.fail()
        await trio.sleep(1)
        async with r.automation.operator(cast(Device, r.device)):
            r.gate.begin_recovery()
            r.gate.fail_recovery(PloopError("no such file"))
        r.files.seconds = 0.0
        await trio.sleep(10)
        assert r.gate.state is GateState.ACTIVE


async def test_a_replace_that_fails_on_a_healthy_device_is_the_operators_affair(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rig() as r:
        async with r.automation.operator(cast(Device, r.device)):
            r.gate.begin_recovery()
            r.gate.fail_recovery(PloopError("no such file"))
        await trio.sleep(100)
        assert r.gate.state is GateState.STANDBY
        assert r.files.asked == []


async def test_the_end_comes_while_an_attempt_is_under_way(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rig() as r:
        r.files.seconds = 1000.0
        r.fail()
        await trio.sleep(1)
    assert trio.current_time() < r.began + 2
    assert r.gate.state is GateState.STANDBY
    assert not r.bus.quiet


async def test_the_replace_that_a_command_asks_for_does_not_stop_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rig(mode="command", command=("/hook",)) as r:
        r.hook_seconds = 10.0
        r.fail()
        await trio.sleep(5)
        async with r.automation.operator(cast(Device, r.device)):
            r.gate.begin_recovery()
            r.gate.leave_standby()
        await trio.sleep(100)
        assert r.hook_stopped == 0
        assert len(r.hooks) == 1


async def test_a_hold_stops_a_command(autojump_clock: trio.testing.MockClock) -> None:
    async with rig(mode="command", command=("/hook",)) as r:
        r.hook_seconds = 10.0
        r.fail()
        await trio.sleep(5)
        r.hold()
        await trio.sleep(100)
        assert (r.hook_stopped, len(r.hooks)) == (1, 1)


async def test_the_end_comes_while_a_command_runs(autojump_clock: trio.testing.MockClock) -> None:
    async with rig(mode="command", command=("/hook",)) as r:
        r.hook_seconds = 1000.0
        r.fail()
        await trio.sleep(1)
    assert r.hook_stopped == 1


async def test_another_policy_holds_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with rig(delay=20.0) as r:
        device = cast(Device, r.device)
        r.device.volume_open = False
        r.files.verdicts["/a"] = StorageError(errno.EIO, "open")
        r.fail()
        await trio.sleep(5)
        assert len(r.files.asked) == 1
        r.automation.change(device, RecoveryPolicy(mode="reopen", candidates=("/b",)))
        await trio.sleep(0.5)
        assert r.files.asked[-1] == (5, "replace", "/b")
        assert r.gate.state is GateState.ACTIVE
        r.automation.change(device, RecoveryPolicy(mode="command", command=("/x",), delay=1.0))
        r.hook_seconds = 50.0
        r.fail()
        await trio.sleep(1.5)
        assert len(r.hooks) == 1
        # An attempt of a mode that is no more is stopped, and by hand is by hand.
        r.automation.change(device, RecoveryPolicy())
        await trio.sleep(100)
        assert (r.hook_stopped, len(r.hooks)) == (1, 1)
        assert r.automation.describe(device) == "manual"
        r.automation.hold(device)
        assert EventKind.HELD not in r.kinds()
        r.automation.change(device, RecoveryPolicy(mode="reopen", candidates=("/b",)))
        await trio.sleep(0.5)
        assert r.gate.state is GateState.ACTIVE


async def test_a_device_that_goes_away_is_not_recovered(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rig() as r:
        r.automation.remove(cast(Device, r.device))
        r.fail()
        await trio.sleep(50)
        assert r.files.asked == []
        assert r.bus._subscribers == [r.events.append]


async def test_who_is_recovered_by_hand_can_be_recovered_automatically_later(
    autojump_clock: trio.testing.MockClock,
) -> None:
    made = Rig(RecoveryPolicy())
    del made.automation._recoverers["disk"]
    made.automation._hook = made.hook
    device = cast(Device, made.device)
    async with trio.open_nursery() as nursery:
        await nursery.start(made.automation.run)
        made.automation.add(device, RecoveryPolicy())
        made.automation.change(device, RecoveryPolicy(delay=2.0))
        assert made.automation._recoverers == {}
        made.fail()
        await trio.sleep(10)
        assert made.hooks == []
        made.automation.change(device, RecoveryPolicy(mode="command", command=("/x",)))
        await trio.sleep(0.5)
        assert [at for at, _ in made.hooks] == [10]
        nursery.cancel_scope.cancel()
