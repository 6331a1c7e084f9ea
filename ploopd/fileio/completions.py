"""From other threads and the kernel into the event loop: an eventfd and a queue of results."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress

Callback = Callable[[int], None]
"""What an operation ends with, in the loop's thread: a result ≥ 0 or a negative errno."""


class Completions:
    """Results on their way to the loop.  `post` is for any thread, the rest for the loop's."""

    __slots__ = ("_signalled", "fd", "queue")

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.queue: deque[tuple[Callback, int]] = deque()
        self._signalled = False

    def post(self, callback: Callback, result: int) -> None:
        """Queue a result; the first one since the last `drain` wakes the loop."""
        self.queue.append((callback, result))
        if not self._signalled:
            self._signalled = True
            os.eventfd_write(self.fd, 1)

    def drain(self) -> None:
        """Take the wake-up back, before looking at what there is.

        In this order: a result that finds `_signalled` set has been queued before it is cleared, so
        whoever looks then sees it.  The other way round a wake-up could be read that belongs to a
        result posted in between, and the flag would stay set for ever.
        """
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)
        self._signalled = False

    def deliver(self) -> None:
        """Call back everything that is there now; the callbacks may queue more."""
        queue = self.queue
        for _ in range(len(queue)):
            callback, result = queue.popleft()
            callback(result)

    def close(self) -> None:
        os.close(self.fd)
