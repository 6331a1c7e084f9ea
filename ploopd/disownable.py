"""Blocking calls that may hang for ever, in worker threads that can be let go."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

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
    goes to `undo`, in the event loop's thread.  Raises PloopError (exit code TIMEOUT) when the time
    is up; `what` says in a few words what took too long.
    """
    token = trio.lowlevel.current_trio_token()
    lock = threading.Lock()
    disowned = False
    result: list[T] = []

    def work() -> None:
        value = blocking()
        with lock:
            if not disowned:
                result.append(value)
                return
        try:
            token.run_sync_soon(undo, value)
        except trio.RunFinishedError:
            return  # the process is ending: the kernel takes care of what was opened

    wanted = False
    try:
        with trio.move_on_after(deadline):
            await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)
        wanted = True
    finally:
        with lock:
            disowned = True
        if not wanted and result:
            undo(result.pop())
    if not result:
        raise PloopError(f"{what} took longer than {deadline:g} s", exit_code=ExitCode.TIMEOUT)
    return result[0]
