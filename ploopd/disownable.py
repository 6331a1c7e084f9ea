"""Blocking calls that may hang for ever, in worker threads that can be let go."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import trio

from ploopd.errors import ExitCode, PloopError

T = TypeVar("T")


async def disownable(
    blocking: Callable[[], T],
    *,
    deadline: float,
    what: str,
    undo: Callable[[T], object],
    limiter: trio.CapacityLimiter,
) -> T:
    """Run `blocking` in a worker thread, for `deadline` seconds at most.

    When the time is up, or the caller is cancelled, the thread is disowned: what it still returns
    goes to `undo`, in the event loop's thread, and until then `limiter` has room for another one
    in its place.  Raises PloopError (exit code TIMEOUT) when the time is up; `what` says in a few
    words what took too long.
    """
    call = _Call(blocking, undo, limiter)
    wanted = False
    try:
        with trio.move_on_after(deadline):
            await trio.to_thread.run_sync(call.work, abandon_on_cancel=True, limiter=limiter)
        wanted = True
    finally:
        result = call.leave(wanted=wanted)
    if not result:
        raise PloopError(f"{what} took longer than {deadline:g} s", exit_code=ExitCode.TIMEOUT)
    return result[0]


class _Call(Generic[T]):
    """One call and who is interested in it.  `work` is for the thread, the rest for the loop's."""

    def __init__(
        self, blocking: Callable[[], T], undo: Callable[[T], object], limiter: trio.CapacityLimiter
    ) -> None:
        self._blocking = blocking
        self._undo = undo
        self._limiter = limiter
        self._token = trio.lowlevel.current_trio_token()
        self._lock = threading.Lock()
        self._running = False
        self._disowned = False
        self._result: list[T] = []

    def work(self) -> None:
        """Call, and hand over what comes back, if anything does."""
        if not self._set_running(True):
            return
        try:
            self._result.append(self._blocking())
        finally:
            if not self._set_running(False):
                # After the end of the loop the kernel takes care of what was opened.
                with contextlib.suppress(trio.RunFinishedError):
                    self._token.run_sync_soon(self._came_back)

    def _set_running(self, running: bool) -> bool:
        """False if nobody waits for it."""
        with self._lock:
            self._running = running
            return not self._disowned

    def leave(self, *, wanted: bool) -> list[T]:
        """The caller goes; returns the result if there is one and it is `wanted`."""
        with self._lock:
            self._disowned = True
            running = self._running
        if running:
            self._limiter.total_tokens += 1
        elif wanted:
            return self._result
        else:
            self._undo_result()
        return []

    def _came_back(self) -> None:
        self._limiter.total_tokens -= 1
        self._undo_result()

    def _undo_result(self) -> None:
        for value in self._result:
            self._undo(value)
