"""Telling inotify that `queue/standby` has changed.

FUSE has no message by which a file system could report a change to inotify: its events come from
system calls that go through the mount.  So the daemon makes one itself: it sets the file's time of
modification, which is IN_MODIFY, what sysfs reports for an attribute that was notified.  A thread
does that, because the call comes back to this very process to be answered.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import trio

from ploopd.fileio.libc import set_modified_now


class Toucher:
    """Touches files of the view, each at least once after `changed`."""

    def __init__(self, mountpoint: Path) -> None:
        self._mountpoint = mountpoint
        self._paths: set[str] = set()
        self._wanted = trio.Event()
        self._limiter = trio.CapacityLimiter(1)

    def changed(self, path: str) -> None:
        """The file at `path`, below the mount point, reads differently now."""
        self._paths.add(path)
        self._wanted.set()

    async def run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            paths, self._paths = self._paths, set()
            for path in paths:
                full = os.path.join(self._mountpoint, path)
                await trio.to_thread.run_sync(
                    _touch, full, abandon_on_cancel=True, limiter=self._limiter
                )


def _touch(path: str) -> None:
    # Whoever has unmounted the view from outside watches nothing any more.
    with contextlib.suppress(OSError):
        set_modified_now(path)
