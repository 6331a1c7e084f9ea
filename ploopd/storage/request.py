"""One request of a client while it is under way: its parts, its first error, its completion."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from ploopd.errors import StorageError
from ploopd.storage.device import Done

MakeDurable = Callable[[Done], None]
"""Calls its argument when what has ended before is on stable storage."""


class RequestCount:
    """How many requests of a volume are under way, and whom to tell when there are none."""

    __slots__ = ("active", "on_idle")

    def __init__(self) -> None:
        self.active = 0
        self.on_idle: Done | None = None

    def ended(self) -> None:
        """One request less."""
        self.active -= 1
        if self.active == 0:
            self._tell(None)

    def abandoned(self) -> None:
        """Nobody waits for the requests any more."""
        self._tell(StorageError(errno.ECANCELED, "close"))

    def _tell(self, error: StorageError | None) -> None:
        on_idle, self.on_idle = self.on_idle, None
        if on_idle is not None:
            on_idle(error)


class Request:
    """A request split into parts; implements `Pending`.

    It is created with one part, the issuing itself, so that `done` is not called before all the
    others have been counted.  `make_durable`: what comes before `done` (FUA, flush), or None.
    """

    __slots__ = ("_begun", "_cancelled", "_count", "_done", "_error", "_make_durable", "_parts")

    def __init__(
        self, count: RequestCount, done: Done, make_durable: MakeDurable | None = None
    ) -> None:
        self._count = count
        self._done = done
        self._make_durable = make_durable
        self._parts = 1
        self._error: StorageError | None = None
        self._begun = False
        self._cancelled = False
        count.active += 1

    @classmethod
    def adopted(cls, count: RequestCount, done: Done) -> Request:
        """For one of the lane, which is counted and has begun: its only part ends by `ended`."""
        request = cls(count, done)
        count.active -= 1
        request._begun = True
        return request

    def begin(self) -> bool:
        """Called before a part does anything; False if the request was cancelled: drop the part."""
        if self._cancelled:
            return False
        self._begun = True
        return True

    def add_part(self) -> None:
        """One more part, which ends in one call of `ended`."""
        self._parts += 1

    def ended(self, error: StorageError | None) -> None:
        """A part has ended; after the last one `done` is called with the first error."""
        if error is not None and self._error is None:
            self._error = error
        self._parts -= 1
        if self._parts:
            return
        if self._error is None and self._make_durable is not None:
            self._make_durable(self._finish)
        else:
            self._finish(self._error)

    def cancel(self) -> bool:
        """See `Pending.cancel`."""
        if self._begun or self._cancelled or self._parts == 0:
            return False
        self._cancelled = True
        self._count.ended()
        return True

    def _finish(self, error: StorageError | None) -> None:
        self._count.ended()
        self._done(error)


class Finished:
    """What a request that ended before its method returned leaves behind; implements `Pending`."""

    __slots__ = ()

    def cancel(self) -> bool:
        """Too late."""
        return False


FINISHED: Final = Finished()
