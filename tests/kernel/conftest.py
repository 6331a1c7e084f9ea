"""Tests with the kernel's own iSCSI initiator run inside a user-mode-linux guest.

On the host only `test_guest.py` and `test_booted_systemd.py` are collected: they boot guests and
run `guest/` and `booted/` in there.
"""

from __future__ import annotations

import os

import pytest

from tests.kernel.guest_run import GuestRun

IN_GUEST = os.environ.get("PLOOPD_IN_GUEST") == "1"
BESIDE = pytest.StashKey[GuestRun]()

collect_ignore = ["test_guest.py", "test_booted_systemd.py"] if IN_GUEST else []
collect_ignore_glob = [] if IN_GUEST else ["guest/*", "booted/*"]


def pytest_collection_finish(session: pytest.Session) -> None:
    """In a run of more than its tests the guests are booted first."""
    if IN_GUEST or session.config.option.collectonly:
        return
    ours = [item for item in session.items if item.path.name == "test_guest.py"]
    if ours and len(session.items) > len(ours):
        session.config.stash[BESIDE] = GuestRun(beside=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    run = session.config.stash.get(BESIDE, None)
    if run is not None:
        run.stop()
