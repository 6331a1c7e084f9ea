"""The operations of one file that are under way or wait for their turn."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from typing import Final

from ploopd.errors import StorageError
from ploopd.fileio.backends import Backend
from ploopd.fileio.buffers import BufferPool
from ploopd.fileio.operations import Operation
from ploopd.fileio.waiting import Waiter

MOST_OPERATIONS: Final = 64
"""Operations of one file that are under way at a time."""

MOST_BYTES: Final = 16 << 20
"""Bytes of them: what a file that hangs can hold of memory."""


class OperationQueue:
    """Begins operations, at most so many at a time, and tells whoever waits when they end.

    Once abandoned it begins nothing and tells nobody; `idle` is called when the last operation that
    was under way has come back.
    """

    __slots__ = (
        "_abandoned",
        "_bytes",
        "_idle",
        "_running",
        "_waiting",
        "backend",
        "buffers",
        "path",
    )

    def __init__(self, path: str, backend: Backend, buffers: BufferPool) -> None:
        self.path = path
        self.backend = backend
        self.buffers = buffers
        self._running: set[Operation] = set()
        self._waiting: deque[Operation] = deque()
        self._bytes = 0
        self._abandoned = False
        self._idle: Callable[[], None] | None = None

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting)

    def start(self, operation: Operation) -> None:
        """Begin an operation now, or when others have ended."""
        if self._abandoned:
            done, operation.done = operation.done, None
            if done is not None:
                done(StorageError(errno.EBADF, "use", path=self.path))
        elif self._waiting or not self._has_room(operation):
            self._waiting.append(operation)
        else:
            self._begin(operation)

    def _has_room(self, operation: Operation) -> bool:
        running = len(self._running)
        if running == 0:
            return True
        return running < MOST_OPERATIONS and self._bytes + operation.length <= MOST_BYTES

    def _begin(self, operation: Operation) -> None:
        self._running.add(operation)
        self._bytes += operation.length
        operation.begin()

    def adopt(self, operation: Operation) -> None:
        """An operation that has been begun elsewhere is one of this queue's from now on."""
        self._running.add(operation)
        self._bytes += operation.length

    def finish(self, operation: Operation, error: StorageError | None) -> None:
        """An operation has ended: begin the next one and tell whoever waits."""
        self._running.remove(operation)
        self._bytes -= operation.length
        while self._waiting and self._has_room(self._waiting[0]):
            following = self._waiting.popleft()
            if following.done is not None:  # not disowned before it began
                self._begin(following)
        if operation.done is not None:
            operation.done(error)
        if self._idle is not None and not self._running:
            idle, self._idle = self._idle, None
            idle()

    def abandon(self, idle: Callable[[], None]) -> None:
        """Drop what waits, disown what is under way; `idle` is called when that has come back."""
        self._abandoned = True
        waiting, self._waiting = self._waiting, deque()
        for operation in (*self._running, *waiting):
            done, operation.done = operation.done, None
            if isinstance(done, Waiter):  # a task, which must not sleep for ever
                done(StorageError(errno.ECANCELED, "use", path=self.path))
        if not self._running:
            idle()
            return
        self._idle = idle
        self.backend.disown()
        self.backend.kick()
