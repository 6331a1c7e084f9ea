"""Boots the user-mode-linux guest with systemd as process 1, twice, and runs `booted/` there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = Path(os.environ.get("PLOOPD_TEST_OUT", ROOT / "out")) / "kernel" / "booted"
TIMEOUT = 400

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT + 40)]


def boot(test: str) -> list[ElementTree.Element]:
    """Start the machine and run one file of tests as a service of it; the cases that ran."""
    junit = OUT / f"{test}.xml"
    junit.unlink(missing_ok=True)
    guest = [str(HERE / "run.sh"), "-i", "systemd", "-m", "1G"]
    guest += ["-t", str(TIMEOUT), "-o", str(OUT), "--"]
    pytest_command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no"]
    pytest_command += ["-m", "kernel", f"--junitxml=/out/{test}.xml"]
    command = [*guest, *pytest_command, str(HERE / "booted" / f"{test}.py")]
    cpu = str(min(os.sched_getaffinity(0)))  # where the guest is that waits most
    environment = os.environ | {"PLOOPD_IN_GUEST": "1", "PLOOPD_GUEST_CPU": cpu}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if status == 125 and not junit.exists():
        pytest.skip("NOT TESTED WITH SYSTEMD: the guest does not start (its reason is above)")
    assert status == 0, f"the guest's pytest ended with {status}"
    cases = ElementTree.parse(junit).getroot().iter("testcase")
    return [case for case in cases if case.find("skipped") is None]


def test_the_units_on_a_machine_that_is_started_twice(capfd: pytest.CaptureFixture[str]) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    disk = OUT / "disk"
    shutil.rmtree(disk, ignore_errors=True)
    try:
        with capfd.disabled():
            print("\n--- in the guest, with systemd ---", flush=True)
            assert boot("test_units"), "every test was skipped"
            print("\n--- the same machine, started again ---", flush=True)
            assert boot("test_after_boot"), "every test was skipped"
            print("--- back on the host ---", flush=True)
    finally:
        shutil.rmtree(disk, ignore_errors=True)
