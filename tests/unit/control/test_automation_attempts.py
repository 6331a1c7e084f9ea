"""What automatic recovery tries, and when: pauses, candidates, reports, commands."""

from __future__ import annotations

import errno
import itertools
import random

import pytest
import trio
import trio.testing

from ploopd.control.automation import REPORT_SECONDS
from ploopd.control.hook import HookResult
from ploopd.errors import NotFoundError, StorageError, UsageError
from ploopd.gate.events import EventKind
from ploopd.gate.state import GateState
from tests.unit.control.automation_rig import rig

pytestmark = pytest.mark.trio


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
