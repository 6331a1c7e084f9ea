"""An operating system that fails on purpose: scripted faults under every file operation.

For tests: a `FaultyOs` is given to `File.open(layer=…)`, and a list of `Fault`s says which call on
which file fails, waits, hangs, is short or is torn.  It also records what a power cut would leave
(`crash_log`).
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch

from ploopd.fileio.crash_log import CrashLog
from ploopd.fileio.oslayer import REAL, OsLayer

OPERATIONS = frozenset(
    {"open", "read", "write", "fdatasync", "fsync", "fallocate", "truncate", "fstat", "close"}
)


@dataclass(slots=True, kw_only=True)
class Fault:
    """What happens to which calls.

    Which: operation `op` ("*" for all, "sync" for fdatasync and fsync) on paths that match `path`
    (a glob over the whole path or its last name), the `nth` such call and `count` in all (None: for
    ever), for reads and writes only if they touch `[start, end)`.

    What, in this order: wait `delay` seconds; with `hang` wait for `FaultyOs.release`; transfer
    only `short` bytes and say so; write only the first `torn` bytes and fail; fail with `error`.
    `hits` counts.
    """

    op: str
    path: str = "*"
    nth: int = 1
    count: int | None = 1
    start: int = 0
    end: int | None = None
    delay: float = 0.0
    hang: bool = False
    short: int | None = None
    torn: int | None = None
    error: int | None = None
    seen: int = field(default=0, init=False)
    hits: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.op not in OPERATIONS | {"*", "sync"}:
            raise ValueError(f"no operation is called {self.op!r}")
        if self.torn is not None and self.error is None:
            self.error = errno.EIO

    def concerns(self, op: str, path: str, offset: int, length: int) -> bool:
        """Is this one of the calls that the fault is about?"""
        if self.op not in (op, "*") and not (self.op == "sync" and op in ("fdatasync", "fsync")):
            return False
        if not (fnmatch(path, self.path) or fnmatch(os.path.basename(path), self.path)):
            return False
        if op not in ("read", "write"):
            return True
        return offset + length > self.start and (self.end is None or offset < self.end)

    def due(self, calls: int) -> bool:
        """Does call number `calls` (from 1) get it?"""
        return calls >= self.nth and (self.count is None or calls < self.nth + self.count)


class FaultyOs:
    """`OsLayer` with faults before a real one.

    `sleep` is what waits (a test's clock); `record` keeps a `CrashLog` of every file opened for
    writing, at the price of its content in memory.  Thread-safe.
    """

    def __init__(
        self,
        *faults: Fault,
        inner: OsLayer = REAL,
        sleep: Callable[[float], None] = time.sleep,
        record: bool = False,
    ) -> None:
        self.faults = list(faults)
        self.calls: list[tuple[str, str]] = []
        """(operation, path) of every call, in order."""
        self._inner = inner
        self._sleep = sleep
        self._record = record
        self._paths: dict[int, str] = {}
        self._logs: dict[str, CrashLog] = {}
        self._released = threading.Event()
        self._lock = threading.Lock()
        self._cut: int | None = None

    # The script.

    def add(self, fault: Fault) -> Fault:
        """One more fault; returns it, to look at its `hits`."""
        with self._lock:
            self.faults.append(fault)
        return fault

    def clear(self) -> None:
        """No more faults; what hangs stays so until `release`."""
        with self._lock:
            self.faults.clear()

    def release(self) -> None:
        """Let everything that hangs go on, now and from now on."""
        self._released.set()

    def power_cut(self, number: int = errno.EIO) -> None:
        """From now on every call fails with `number`, and nothing reaches a file any more."""
        self._cut = number

    def log(self, path: str | os.PathLike[str]) -> CrashLog:
        """The record of a file that was opened for writing."""
        return self._logs[os.path.realpath(path)]

    def would_block(self, op: str, fd: int, /) -> bool:
        """Would the next such call hang or wait?  Then inline calls are not made."""
        path = self._paths.get(fd, "")
        with self._lock:
            return any(
                (fault.hang and not self._released.is_set()) or fault.delay
                for fault in self.faults
                if fault.concerns(op, path, fault.start, 1) and fault.due(fault.seen + 1)
            )

    # The operating system.

    def open(self, path: str, flags: int, dir_fd: int | None) -> int:
        self._strike("open", path)
        fd = self._inner.open(path, flags, dir_fd)
        full = os.path.realpath(f"/proc/self/fd/{fd}")
        with self._lock:
            self._paths[fd] = full
            if self._record and flags & os.O_ACCMODE != os.O_RDONLY and full not in self._logs:
                with open(full, "rb") as file:
                    self._logs[full] = CrashLog(file.read())
        return fd

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0, /) -> int:
        flags &= ~os.RWF_NOWAIT  # one call, one strike: no attempt that the cache decides about
        short, _ = self._strike("read", self._path(fd), offset, _length(buffers))
        if short is not None:
            buffers = _first(buffers, short)
        return self._inner.preadv(fd, buffers, offset, flags)

    def pwritev(
        self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0, /
    ) -> int:
        flags &= ~os.RWF_NOWAIT
        path = self._path(fd)
        short, error = self._strike("write", path, offset, _length(buffers))
        if short is not None:
            buffers = _first(buffers, short)
        written = self._inner.pwritev(fd, buffers, offset, flags) if _length(buffers) else 0
        log = self._logs.get(path)
        if log is not None and written:
            log.wrote(offset, b"".join(bytes(buffer) for buffer in buffers)[:written])
        if error is not None:
            raise OSError(error, os.strerror(error), path)
        return written

    def fdatasync(self, fd: int, /) -> None:
        self._synced("fdatasync", fd, self._inner.fdatasync)

    def fsync(self, fd: int, /) -> None:
        self._synced("fsync", fd, self._inner.fsync)

    def _synced(self, op: str, fd: int, call: Callable[[int], None]) -> None:
        path = self._path(fd)
        log = self._logs.get(path)
        mark = 0 if log is None else log.sync_began()
        self._strike(op, path)
        call(fd)
        if log is not None:
            log.synced(mark)

    def fallocate(self, fd: int, mode: int, offset: int, length: int, /) -> None:
        path = self._path(fd)
        self._strike("fallocate", path)
        self._inner.fallocate(fd, mode, offset, length)
        log = self._logs.get(path)
        if log is None:
            return
        if mode:  # a hole: zeros within the file
            end = min(offset + length, self._inner.fstat(fd).st_size)
            log.wrote(offset, bytes(max(end - offset, 0)))
        else:
            log.grown(offset + length)

    def ftruncate(self, fd: int, length: int, /) -> None:
        path = self._path(fd)
        self._strike("truncate", path)
        self._inner.ftruncate(fd, length)
        log = self._logs.get(path)
        if log is not None:
            log.resized(length)

    def fstat(self, fd: int, /) -> os.stat_result:
        self._strike("fstat", self._path(fd))
        return self._inner.fstat(fd)

    def drop_cache(self, fd: int, /) -> None:
        self._inner.drop_cache(fd)

    def close(self, fd: int, /) -> None:
        path = self._path(fd)
        with self._lock:
            self._paths.pop(fd, None)
        try:
            self._strike("close", path)
        finally:
            self._inner.close(fd)

    # How a fault strikes.

    def _path(self, fd: int) -> str:
        return self._paths.get(fd, f"descriptor {fd}")

    def _strike(
        self, op: str, path: str, offset: int = 0, length: int = 0
    ) -> tuple[int | None, int | None]:
        """(bytes to transfer, errno to raise after that); raises at once if there is nothing to
        transfer."""
        fault = self._choose(op, path, offset, length)
        if fault is not None:
            if fault.delay:
                self._sleep(fault.delay)
            if fault.hang:
                self._released.wait()
        if self._cut is not None:
            raise OSError(self._cut, os.strerror(self._cut), path)
        if fault is None:
            return None, None
        if fault.torn is not None and op == "write":
            return fault.torn, fault.error
        if fault.error is not None:
            raise OSError(fault.error, os.strerror(fault.error), path)
        return fault.short, None

    def _choose(self, op: str, path: str, offset: int, length: int) -> Fault | None:
        """The first fault that is due; every one that the call concerns counts it."""
        chosen = None
        with self._lock:
            self.calls.append((op, path))
            for fault in self.faults:
                if not fault.concerns(op, path, offset, length):
                    continue
                fault.seen += 1
                if chosen is None and fault.due(fault.seen):
                    fault.hits += 1
                    chosen = fault
        return chosen


def _length(buffers: Sequence[memoryview]) -> int:
    return sum(len(buffer) for buffer in buffers)


def _first(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """The first `count` bytes of the buffers."""
    found = []
    for buffer in buffers:
        found.append(buffer[:count])
        count -= len(found[-1])
    return found
