"""Tests with the kernel's own iSCSI initiator run inside a user-mode-linux guest.

On the host only `test_guest.py` and `test_booted_systemd.py` are collected: they boot the guest and
run `guest/` and `booted/` in there.
"""

from __future__ import annotations

import os

IN_GUEST = os.environ.get("PLOOPD_IN_GUEST") == "1"

collect_ignore = ["test_guest.py", "test_booted_systemd.py"] if IN_GUEST else []
collect_ignore_glob = [] if IN_GUEST else ["guest/*", "booted/*"]
