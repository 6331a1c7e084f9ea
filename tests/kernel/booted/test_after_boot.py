"""The machine was started again: everything comes back by itself, in the right order."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernel.booted.conftest import ctl_json, journal, show, status_of
from tests.kernel.booted.test_units import IQN, URL, exported
from tests.kernel.guest.conftest import OpenIscsi
from tests.kernel.guest.run import sh

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(90)]

PLOOPD, TARGET, EXPORTS = (
    f"{name}.service" for name in ("ploopd", "rtslib-fb-targetctl", "ploopd-exports")
)


@pytest.fixture(scope="module", autouse=True)
def started() -> None:
    if not Path("/out/disk/restore.sh").exists():
        pytest.skip("this is the first start")
    sh("systemctl", "is-system-running", "--wait", check=False)


def test_nothing_failed(started: None) -> None:
    assert "0 loaded units listed" in sh("systemctl", "list-units", "--failed", "--no-pager")


def test_the_handler_is_there_before_the_kernels_target(started: None) -> None:
    assert {show(one, "ActiveState") for one in (PLOOPD, TARGET, EXPORTS)} == {"active"}
    ready = int(show(PLOOPD, "ActiveEnterTimestampMonotonic"))
    restoring = int(show(TARGET, "ExecMainStartTimestampMonotonic"))
    restored = int(show(TARGET, "ActiveEnterTimestampMonotonic"))
    exporting = int(show(EXPORTS, "ExecMainStartTimestampMonotonic"))
    assert 0 < ready <= restoring < restored <= exporting
    # Ends go the other way round: the target is cleared while its handler answers.
    assert TARGET in show(PLOOPD, "Before").split()


def test_what_targetctl_saved_and_what_ploopctl_exported(
    started: None, initiator: OpenIscsi
) -> None:
    assert exported() == {"a": [f"{IQN}/0"], "b": [f"{IQN}-b/0"]}
    # One of them was in saveconfig.json, the other one only in the memory of ploopd.
    messages = [one["MESSAGE"] for one in journal(EXPORTS)]
    assert any(f"b: {IQN}-b/0: exported" in message for message in messages)
    devices = {one["device"] for one in ctl_json("lio", "list")["backstores"]}
    assert devices == {"a", "b"}
    initiator.discover(URL)
    disk = initiator.login(URL)
    with disk.open("rb") as opened:
        assert any(opened.read(1 << 20)), "what the load wrote before the machine was stopped"
    initiator.logout(URL)


def test_confined_as_ever(started: None) -> None:
    status = status_of(int(show(PLOOPD, "MainPID")))
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
