"""Group commit: everybody who wants the file synced shares one fdatasync.

A request that arrives while a sync runs waits for the next one, because the running one need not
cover what was written since it began.  After a failed sync nothing written before can be relied
upon, and trying again would succeed without having written it (the kernel drops the dirty pages or
marks them clean), so the error stays until the image is opened anew, or somebody has written all
of it again (`forgive`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio

from ploopd.errors import StorageError
from ploopd.storage.device import Done


class SyncObserver(Protocol):
    """Whoever keeps things that depend on a sync: the allocator, the BAT."""

    def sync_begins(self) -> None: ...

    def sync_ended(self, *, success: bool) -> None: ...


class SyncGroup:
    """The syncs of one file; used from the event loop's thread only.

    `start` queues one sync and calls its argument when it has ended; `kick` begins what is queued.
    `failed` is the first error there
    was: it answers every later request.
    """

    __slots__ = ("_kick", "_observers", "_running", "_start", "_waiting", "failed")

    def __init__(
        self, start: Callable[[Done], None], observer: SyncObserver, kick: Callable[[], None]
    ) -> None:
        self._start = start
        self._kick = kick
        self._observers = [observer]
        self._running: list[Done] | None = None
        self._waiting: list[Done] = []
        self.failed: StorageError | None = None

    def observe(self, observer: SyncObserver) -> None:
        """Tell one more of what happens; before the first sync."""
        self._observers.append(observer)

    def forgive(self) -> None:
        """All that a failed sync may have lost has been written again: the next one counts."""
        self.failed = None

    def request(self, done: Done) -> None:
        """Call `done` when all writes that have ended before now are on stable storage."""
        if self.failed is not None:
            done(self.failed)
            return
        self._waiting.append(done)
        if self._running is None:
            self._next()

    async def wait(self) -> None:
        """The same for a task; raises StorageError."""
        ended = trio.Event()
        errors: list[StorageError] = []

        def done(error: StorageError | None) -> None:
            if error is not None:
                errors.append(error)
            ended.set()

        self.request(done)
        self._kick()
        await ended.wait()
        if errors:
            raise errors[0].again()

    def _next(self) -> None:
        self._running, self._waiting = self._waiting, []
        for observer in self._observers:
            observer.sync_begins()
        self._start(self._ended)

    def _ended(self, error: StorageError | None) -> None:
        finished, self._running = self._running or [], None
        for observer in self._observers:
            observer.sync_ended(success=error is None)
        if error is not None:
            self.failed = error
            finished += self._waiting
            self._waiting = []
        elif self._waiting:
            self._next()
        for done in finished:
            done(error)
