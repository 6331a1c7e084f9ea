"""When automatic recovery does what: a real gate, scripted files, a clock that jumps."""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
import trio.testing

from ploopd.control.automation import (
    REPORT_SECONDS,
    Automation,
    DeviceFiles,
    Recoverer,
    RecoveryPolicy,
)
from ploopd.control.hook import HookResult
from ploopd.control.verification import Fingerprint
from ploopd.devices import Device
from ploopd.errors import NotFoundError, PloopError, StorageError, UsageError
from ploopd.gate.events import Event, EventBus, EventKind
from ploopd.gate.filter import Gate
from ploopd.gate.state import GateState
from scst_shim import QueueFlags, StandbyCheck
from tests.support.memory_device import MemoryDevice

SIZE = 1 << 20
pytestmark = pytest.mark.trio


class NoJitter(random.Random):
    """The middle of every range."""

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


class Files:
    """What each file answers; records what is asked at which second."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.verdicts: dict[str, PloopError | None] = {}
        self.failures: dict[str, PloopError] = {}
        self.prints: dict[str, Fingerprint] = {}
        self.asked: list[tuple[float, str, str]] = []
        self.seconds = 0.0
        self.closed_by_us: list[bool] = []

    def _log(self, what: str, path: str) -> None:
        self.asked.append((round(trio.current_time() - self.rig.began, 3), what, path))

    async def fingerprint(self, path: str) -> Fingerprint | None:
        await trio.lowlevel.checkpoint()
        return self.prints.get(path, (1, 1, 1, 1))

    async def verify(self, path: str, *, closed_by_us: bool) -> None:
        self._log("verify", path)
        self.closed_by_us.append(closed_by_us)
        await trio.lowlevel.checkpoint()
        verdict = self.verdicts.get(path)
        if verdict is not None:
            raise verdict

    async def replace(self, path: str) -> None:
        self._log("replace", path)
        gate, device = self.rig.gate, self.rig.device
        device.replacing = True
        gate.begin_recovery()
        gate.report(EventKind.REPLACE_STARTED, image=path)
        finished = False
        try:
            await trio.sleep(self.seconds)
            device.volume_open = False
            if path in self.failures:
                raise self.failures[path]
            finished = True
        finally:
            device.replacing = False
            if not finished:
                gate.fail_recovery(PloopError("did not work"))
        device.volume_open = True
        device.volume.layers[0].path = path
        gate.leave_standby()


class Rig:
    """A device whose storage fails on demand, and its recoverer."""

    def __init__(self, policy: RecoveryPolicy) -> None:
        self.began = trio.current_time()
        self.bus = EventBus()
        self.events: list[Event] = []
        self.bus.subscribe(self.events.append)
        check = StandbyCheck()
        check.enable()
        self.gate = Gate(
            MemoryDevice(SIZE),
            name="disk",
            fuses=QueueFlags("disk", check, warn=lambda _: None),
            clock=trio.current_time,
            on_event=self.bus.publish,
        )
        self.gate.bind()
        self.device = SimpleNamespace(
            name="disk",
            gate=self.gate,
            env=SimpleNamespace(events=self.bus),
            replacing=False,
            volume_open=True,
            has_descriptor=False,
            volume=SimpleNamespace(layers=[SimpleNamespace(level=0, path="/a")]),
        )
        self.files = Files(self)
        self.hooks: list[tuple[float, Mapping[str, str]]] = []
        self.hook_seconds = 0.0
        self.hook_stopped = 0
        device = cast(Device, self.device)
        files = cast(DeviceFiles, self.files)
        control = Path("/run/c.sock")
        self.recoverer = Recoverer(device, policy, control, NoJitter(), self.hook, files)
        self.automation = Automation(control)
        self.automation._recoverers["disk"] = self.recoverer

    async def hook(
        self, command: Sequence[str], variables: Mapping[str, str], limit: float
    ) -> HookResult:
        self.hooks.append((round(trio.current_time() - self.began, 3), dict(variables)))
        try:
            await trio.sleep(self.hook_seconds)
        except trio.Cancelled:
            self.hook_stopped += 1
            raise
        return HookResult(status=3, elapsed=0.0, stderr="no luck", timed_out=False)

    def fail(self) -> None:
        self.gate.judge(StorageError(errno.EIO, "write", path="/a", offset=4096))

    def operator(self) -> object:
        return self.automation.operator(cast(Device, self.device))

    def hold(self) -> None:
        """What `standby enter` does."""
        self.gate.enter_standby("entered by ploopctl")
        self.automation.hold(cast(Device, self.device))

    def kinds(self) -> list[EventKind]:
        return [event.kind for event in self.events]


@asynccontextmanager
async def rig(**policy: object) -> AsyncIterator[Rig]:
    made = Rig(RecoveryPolicy(**{"mode": "reopen", **policy}))  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.recoverer.run)
        await trio.testing.wait_all_tasks_blocked()
        yield made
        nursery.cancel_scope.cancel()


async def test_the_same_file_is_tried_at_once_and_then_with_growing_pauses(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rig() as r:
        await trio.sleep(100)
        assert r.files.asked == []
        r.device.volume_open = False
        r.files.verdicts["/a"] = StorageError(errno.EIO, "open", path="/a")
        r.fail()
        await trio.sleep(150)
        times = [at - 100 for at, what, _ in r.files.asked if what == "verify"]
        assert times == [0, 1, 3, 7, 15, 31, 61, 91, 121]
        assert "9 attempts: /a: open failed" in r.recoverer.describe()
        r.files.verdicts.clear()
        await trio.sleep(2)
        assert r.gate.state is GateState.ACTIVE
        assert r.files.asked[-1] == (251, "replace", "/a")
        assert r.recoverer.describe() == "reopen"


async def test_the_pauses_start_again_with_each_standby(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rig(delay=2.0, delay_max=5.0) as r:
        for begin in (0, 100):
            await trio.sleep_until(r.began + begin)
            r.device.volume_open = False
            r.files.asked.clear()
            r.files.verdicts["/a"] = StorageError(errno.EIO, "open")
            r.fail()
            await trio.sleep(12)
            assert [at - begin for at, *_ in r.files.asked] == [0, 2, 6, 11]
            r.files.verdicts.clear()
            await trio.sleep(10)
            assert r.gate.state is GateState.ACTIVE


async def test_pauses_vary_by_a_quarter(autojump_clock: trio.testing.MockClock) -> None:
    async with rig(delay=1.0, delay_max=1.0) as r:
        r.recoverer._rng = random.Random(7)
        r.device.volume_open = False
        r.files.verdicts["/a"] = StorageError(errno.EIO, "open")
        r.fail()
        await trio.sleep(100)
        times = [at for at, *_ in r.files.asked]
        pauses = [b - a for a, b in itertools.pairwise(times)]
        assert 0.75 <= min(pauses) < 0.85
        assert 1.15 < max(pauses) <= 1.25


async def test_an_error_that_sticks_to_open_files_does_not_keep_them_open(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The look fails as long as the device has its files open: replace has to close them."""
    async with rig() as r:
        r.files.verdicts["/a"] = StorageError(errno.EIO, "open")
        r.files.failures["/a"] = StorageError(errno.EIO, "open")
        r.fail()
        await trio.sleep(5)
        # Once with a replace, which closes; from then on the look decides.
        assert [what for _, what, _ in r.files.asked] == ["verify", "replace", "verify", "verify"]
        assert r.files.closed_by_us == [False, True, True]


async def test_candidates_are_tried_after_the_file_itself(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig(candidates=("/b", "/a", "/c")) as r:
        r.device.volume_open = False
        r.files.verdicts["/a"] = StorageError(errno.EIO, "open")
        r.files.verdicts["/b"] = NotFoundError("no such file", path="/b")
        r.fail()
        await trio.sleep(0.5)
        assert [(what, path) for _, what, path in r.files.asked] == [
            ("verify", "/a"),
            ("verify", "/b"),
            ("verify", "/c"),
            ("replace", "/c"),
        ]
        assert r.gate.state is GateState.ACTIVE
        assert "event=recovered-elsewhere device=disk image=/c instead_of=/a" in caplog.text
        # From now on /c is the file that the device has, and /a is a candidate.
        r.files.asked.clear()
        r.fail()
        await trio.sleep(0.5)
        assert r.files.asked[0][1:] == ("verify", "/c")


async def test_a_candidate_that_we_have_closed_ourselves_may_be_closed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rig(candidates=("/b",)) as r:
        r.device.volume_open = False
        r.files.verdicts["/a"] = StorageError(errno.EIO, "open")
        r.files.failures["/b"] = StorageError(errno.EIO, "read")
        r.fail()
        await trio.sleep(1.5)
        assert [path for _, what, path in r.files.asked if what == "verify"] == ["/a", "/b"] * 2
        assert r.files.closed_by_us == [True, False, True, True]


async def test_a_wrong_candidate_is_reported_once_and_skipped(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig(candidates=("/b",)) as r:
        r.device.volume_open = False
        r.files.verdicts["/a"] = StorageError(errno.EIO, "open")
        r.files.verdicts["/b"] = UsageError("is another disk", path="/b")
        r.fail()
        await trio.sleep(50)
        looks = [at for at, _, path in r.files.asked if path == "/b"]
        assert looks == [0], "a file that has not changed is not looked at again"
        await trio.sleep(600)
        refused = [event for event in r.events if event.kind is EventKind.CANDIDATE_REFUSED]
        assert [dict(event.details) for event in refused] == [
            {"image": "/b", "error": "/b: is another disk"}
        ]
        # One that has changed is; and another reason is another report.
        r.files.prints["/b"] = (1, 2, 3, 4)
        r.files.verdicts["/b"] = UsageError("is too small", path="/b")
        await trio.sleep(40)
        assert r.kinds().count(EventKind.CANDIDATE_REFUSED) == 2
        r.files.prints["/b"] = (1, 2, 3, 5)
        r.files.verdicts["/b"] = None
        await trio.sleep(40)
        assert r.gate.state is GateState.ACTIVE


async def test_a_storage_that_still_fails_is_one_line_per_minute(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with rig(delay=1.0, delay_max=1.0) as r:
        caplog.set_level("INFO")
        r.files.failures["/a"] = StorageError(errno.EIO, "fsync", path="/a")
        r.fail()
        caplog.clear()
        await trio.sleep(10 * REPORT_SECONDS - 1)
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == 10, lines
        assert all("event=recovery-attempt-failed device=disk image=/a" in one for one in lines)
        assert "fsync failed" in lines[0]
        assert r.kinds().count(EventKind.REPLACE_FAILED) > 500
        r.files.failures.clear()
        await trio.sleep(2)
        assert "event=recovered" in caplog.records[-1].getMessage()
        assert not r.bus.quiet


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


# -- command -----------------------------------------------------------------------------------


async def test_a_command_is_run_with_growing_pauses_and_told_everything(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rig(mode="command", command=("/hook",), timeout=20.0) as r:
        r.hook_seconds = 5.0
        r.fail()
        await trio.sleep(40)
        assert [at for at, _ in r.hooks] == [0, 6, 13, 22, 35]
        assert r.hooks[2][1] == {
            "PLOOPD_EVENT": "standby-entered",
            "PLOOPD_DEVICE": "disk",
            "PLOOPD_IMAGE": "/a",
            "PLOOPD_ERRNO": "EIO",
            "PLOOPD_CAUSE": r.gate.cause,
            "PLOOPD_STATE": "on",
            "PLOOPD_ATTEMPT": "3",
            "PLOOPD_CONTROL": "/run/c.sock",
        }
        ended = [event for event in r.events if event.kind is EventKind.RECOVERY_COMMAND]
        assert dict(ended[0].details) == {"status": 3, "elapsed": 0.0, "stderr": "no luck"}
        assert "exit code 3" in r.recoverer.describe()


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


async def test_a_command_that_cannot_be_run_is_an_event(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rig(mode="command", command=("/none",)) as r:

        async def missing(*_: object) -> HookResult:
            await trio.lowlevel.checkpoint()
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/none")

        r.recoverer._hook = missing
        r.fail()
        await trio.sleep(0.5)
        (event,) = [one for one in r.events if one.kind is EventKind.RECOVERY_COMMAND]
        assert event.details["status"] == -1
        assert "/none" in str(event.details["stderr"])


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
