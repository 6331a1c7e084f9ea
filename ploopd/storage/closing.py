"""The end of a volume, and what comes before a flush: settling, probing, closing."""

from __future__ import annotations

import trio

from ploopd.errors import ReadOnlyError, StorageError
from ploopd.storage.core import Core
from ploopd.storage.request import Request
from ploopd.storage.stack import Stack


async def settle(core: Core, request: Request) -> None:
    """Write doubtful BAT entries again, as a part of `request`."""
    assert core.bat is not None
    error = None
    try:
        await core.bat.settle(core.locks)
    except StorageError as failure:
        error = failure
    request.ended(error)
    core.kick()


async def probe(core: Core, stack: Stack) -> None:
    """Write the first bytes of the top file again as they are, and sync; raises StorageError."""
    if stack.read_only:
        raise ReadOnlyError("a read-only image is not written to", path=stack.top.file.path)
    start = bytearray(stack.probe_bytes())
    await core.top.aread(memoryview(start), 0)
    await core.top.awrite(memoryview(start), 0)
    await core.sync.wait()


async def close(core: Core, stack: Stack) -> None:
    """See `Volume.close`."""
    await _idle(core)
    if stack.read_only:
        await trio.to_thread.run_sync(stack.close)
        return
    try:
        if core.sync.failed is not None:
            raise core.sync.failed.again()
        if core.bat is not None and core.bat.doubtful:
            await core.bat.settle(core.locks)
        await trio.to_thread.run_sync(stack.finish, core.used_end(), abandon_on_cancel=True)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(stack.close)


async def _idle(core: Core) -> None:
    if core.requests.active:
        idle = trio.Event()
        core.requests.on_idle = lambda _error: idle.set()
        await idle.wait()
