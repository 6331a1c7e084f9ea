"""Boots user-mode-linux guests and runs the tests in `guest/` there, against a real kernel.

The guests' pytest prints to this run's terminal; its junit files are read to see what really ran.
"""

from __future__ import annotations

from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from tests.kernel.conftest import BESIDE
from tests.kernel.guest_run import JUNIT, NO_GUEST, TIMEOUT, GuestRun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT + 40)]


def test_kernel_initiator_in_the_guest(
    request: pytest.FixtureRequest,
    capfd: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    with capfd.disabled():
        print("\n--- in the user-mode-linux guests ---", flush=True)
        run = request.config.stash.get(BESIDE, None) or GuestRun(beside=False)
        try:
            statuses = run.finish()
        finally:
            run.stop()
        print("--- back on the host ---", flush=True)
    if set(statuses) == {NO_GUEST} and not JUNIT.exists():
        pytest.skip("NOT TESTED WITH A KERNEL: the guest does not start (its reason is above)")
    assert set(statuses) == {0}, f"the guests' pytest ended with {statuses}"
    suites = ElementTree.parse(JUNIT).getroot()
    cases = list(suites.iter("testcase"))
    ran = [case for case in cases if case.find("skipped") is None]
    record_property("guest_tests_run", len(ran))
    assert ran, "every test in the guest was skipped"
