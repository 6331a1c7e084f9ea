"""From other threads and the kernel into the event loop: an eventfd and a queue of results."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable

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
        """Take the wake-up back, before looking at what there is."""
        self._signalled = False
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return

    def deliver(self) -> None:
        """Call back everything that is there now; the callbacks may queue more."""
        queue = self.queue
        for _ in range(len(queue)):
            callback, result = queue.popleft()
            callback(result)

    def close(self) -> None:
        os.close(self.fd)
