"""Boots the user-mode-linux guest and runs the tests in `guest/` there, against a real kernel.

The guest's pytest prints to this run's terminal; its junit file is read to see what really ran.
"""

from __future__ import annotations

from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from tests.kernel.conftest import BESIDE
from tests.kernel.guest_run import JUNIT, TIMEOUT, GuestRun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT + 40)]


def test_kernel_initiator_in_the_guest(
    request: pytest.FixtureRequest,
    capfd: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    with capfd.disabled():
        print("\n--- in the user-mode-linux guest ---", flush=True)
        run = request.config.stash.get(BESIDE, None) or GuestRun(beside=False)
        status = run.finish()
        print("--- back on the host ---", flush=True)
    if status == 125 and not JUNIT.exists():
        pytest.skip("NOT TESTED WITH A KERNEL: the guest does not start (its reason is above)")
    assert status == 0, f"the guest's pytest ended with {status}"
    suites = ElementTree.parse(JUNIT).getroot()
    cases = list(suites.iter("testcase"))
    ran = [case for case in cases if case.find("skipped") is None]
    record_property("guest_tests_run", len(ran))
    assert ran, "every test in the guest was skipped"
