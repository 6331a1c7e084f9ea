"""The end of a volume, and the question whether it can be written to: closing and probing."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import Final

import trio

from ploopd.errors import ReadOnlyError, StorageError
from ploopd.storage.core import Core
from ploopd.storage.stack import Stack

_LOOK_AGAIN: Final = 0.01


async def probe(core: Core, stack: Stack) -> None:
    """Write the first bytes of the top file again as they are, and sync; raises StorageError."""
    if stack.read_only:
        raise ReadOnlyError("a read-only image is not written to", path=stack.top.file.path)
    start = bytearray(stack.probe_bytes())
    await core.top.aread(memoryview(start), 0)
    await core.top.awrite(memoryview(start), 0)
    await core.sync.wait()


async def close(core: Core, stack: Stack) -> None:
    """See `Volume.close`.  Cancelled, it abandons the files: nothing waits for a dead storage."""
    try:
        await _idle(core)
        await _quiet(stack)
        problem = await _finish(core, stack)
        await _in_thread(stack.close)
    except trio.Cancelled:
        stack.abandon()
        raise
    if problem is not None:
        raise problem


async def _finish(core: Core, stack: Stack) -> StorageError | None:
    """Everything that makes the image a closed one; returns why it is not."""
    if stack.read_only:
        return None
    if core.sync.failed is not None:
        return core.sync.failed.again()
    if stack.abandoned:
        return StorageError(errno.ECANCELED, "close", path=stack.top.file.path)
    try:
        if core.bat is not None and core.bat.doubtful:
            await core.bat.settle(core.locks)
        await _in_thread(partial(stack.finish, core.used_end()))
    except StorageError as error:
        return error
    return None


async def _in_thread(blocking: Callable[[], None]) -> None:
    # A limiter of its own: trio's counts threads that hang for ever, and this must not wait for
    # those of other volumes.
    limiter = trio.CapacityLimiter(1)
    await trio.to_thread.run_sync(blocking, abandon_on_cancel=True, limiter=limiter)


async def _idle(core: Core) -> None:
    """Wait for the requests under way; StorageError (ECANCELED) if they were abandoned."""
    if core.requests.active:
        idle = trio.Event()
        abandoned: list[StorageError] = []

        def ended(error: StorageError | None) -> None:
            if error is not None:
                abandoned.append(error)
            idle.set()

        core.requests.on_idle = ended
        core.kick()  # what was started and nobody has kicked would never end
        await idle.wait()
        if abandoned:
            raise abandoned[0]


async def _quiet(stack: Stack) -> None:
    """Wait for operations that somebody has given up, a probe for one.

    They may still change the files.  And files are closed by a thread, which must not find
    anything to disown: the engine is for the loop's thread alone.
    """
    while stack.in_flight and not stack.abandoned:  # noqa: ASYNC110 - seldom, and not for long
        await trio.sleep(_LOOK_AGAIN)
