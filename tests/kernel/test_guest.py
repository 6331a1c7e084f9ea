"""Boots the user-mode-linux guest and runs the tests in `guest/` there, against a real kernel.

The guest's pytest prints to this run's terminal; its junit file is read to see what really ran.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = Path(os.environ.get("PLOOPD_TEST_OUT", ROOT / "out")) / "kernel"
TIMEOUT = 600
"""Seconds for the guest, which runs on one CPU and shares it with whatever else there is."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT + 40)]


def test_kernel_initiator_in_the_guest(
    capfd: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    junit = OUT / "junit.xml"
    junit.unlink(missing_ok=True)
    command = [str(HERE / "run.sh"), "-t", str(TIMEOUT), "-o", str(OUT), "--"]
    command += [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--color=no",
        "--durations=10",
        "-m",
        "kernel",
    ]
    command += ["--junitxml=/out/junit.xml", str(HERE / "guest")]
    environment = os.environ | {"PLOOPD_IN_GUEST": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with capfd.disabled():
        print("\n--- in the user-mode-linux guest ---", flush=True)
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        print("--- back on the host ---", flush=True)
    if status == 125 and not junit.exists():
        pytest.skip("NOT TESTED WITH A KERNEL: the guest does not start (its reason is above)")
    assert status == 0, f"the guest's pytest ended with {status}"
    suites = ElementTree.parse(junit).getroot()
    cases = list(suites.iter("testcase"))
    ran = [case for case in cases if case.find("skipped") is None]
    record_property("guest_tests_run", len(ran))
    assert ran, "every test in the guest was skipped"
