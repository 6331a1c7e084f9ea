"""The seam between files and the way operations are executed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import trio

from ploopd.errors import UnsupportedError, UsageError
from ploopd.fileio import uring
from ploopd.fileio.buffers import Buffer, BufferPool
from ploopd.fileio.completions import Callback
from ploopd.fileio.ring_engine import RingEngine
from ploopd.fileio.thread_engine import ThreadEngine

ENGINE_KINDS = ("auto", "io_uring", "threads")


class IoEngine(Protocol):
    """Executes file operations that may take long; one per process, used by the loop's thread.

    Every operation ends in one `callback(result)`, called by `kick` or by the `run` task: a result
    ≥ 0 or a negative errno.  Short transfers, EINTR and EAGAIN are passed on as they are.  Buffers
    are referenced until then.
    """

    interlude: Callable[[], None] | None
    """Called, while `collecting`, between groups of completions: somebody answers them."""
    collecting: bool

    @property
    def kind(self) -> str:
        """ "io_uring" or "threads"."""
        ...

    @property
    def buffers(self) -> BufferPool:
        """Where the buffers of its operations come from."""
        ...

    def may_stall(self, fd: int, stalls: bool) -> None:
        """Say of an `fd` that is going to be used whether its file system can hang (FUSE, NFS)."""
        ...

    def read(self, fd: int, buffer: Buffer, start: int, offset: int, callback: Callback) -> None:
        """Fill `buffer` from its byte `start` on with what is at `offset + start`."""
        ...

    def write(self, fd: int, buffer: Buffer, start: int, offset: int, callback: Callback) -> None:
        """Write `buffer` from its byte `start` on to `offset + start`."""
        ...

    def fdatasync(self, fd: int, callback: Callback) -> None: ...

    def fallocate(
        self, fd: int, mode: int, offset: int, length: int, callback: Callback
    ) -> None: ...

    def call(
        self,
        fd: int,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        callback: Callback,
    ) -> None:
        """Call any blocking function for the file `fd` in a worker thread."""
        ...

    def disown(self, fd: int) -> None:
        """Nobody waits for `fd` any more: end what has not begun with ECANCELED."""
        ...

    def ready(self) -> int:
        """How many operations have completed and wait for `kick`."""
        ...

    def kick(self) -> None:
        """Begin what was queued; call back what has completed.  Once per batch."""
        ...

    async def run(self, *, task_status: trio.TaskStatus[None] = ...) -> None:
        """The task that reaps completions; runs until cancelled."""
        ...

    def close(self) -> object:
        """Give everything back; `run` must have ended."""
        ...


def make_engine(kind: str = "auto") -> IoEngine:
    """The engine for this process: io_uring where it works, else threads.

    Raises `UnsupportedError` when io_uring was asked for and is not to be had, `UsageError` for an
    unknown kind.
    """
    if kind not in ENGINE_KINDS:
        raise UsageError(
            "unknown I/O engine", field="io", value=kind, hint="use auto, io_uring or threads"
        )
    if kind == "threads":
        return ThreadEngine()
    reason = uring.probe()
    if reason is None:
        return RingEngine()
    if kind == "io_uring":
        raise UnsupportedError(f"io_uring cannot be used: {reason}", hint="use --io threads")
    return ThreadEngine()
