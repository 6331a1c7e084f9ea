"""One file's stalled writes must not hold up another's: a watch over the kernel's write queues.

io_uring executes buffered writes and fallocate of a regular file one after the other, in one of 64
queues that the *hash of the inode* chooses.  A file that stalls therefore stalls whatever file
happens to share its queue – measured: 2 of 200.  So while such operations are under way a time-out
ticks in the ring.  What two or more files have had waiting for a whole tick is cancelled – an
operation that is only queued can be – and done by worker threads, where every file has a lane of
its own; these files' writes go there for a while.

Source: Linux io_uring/io-wq.c (IO_WQ_HASH_ORDER, io_wq_hash_work).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable
from typing import Final, Protocol

from ploopd.fileio.buffers import Buffer, BufferPool
from ploopd.fileio.completions import Callback
from ploopd.fileio.thread_engine import ThreadEngine
from ploopd.fileio.uring import Entry, Opcode

TICK: Final = 0.2
"""Seconds; a write that shares a queue with a stalled one waits for two of them at most."""

DIVERSION = 10.0
"""Seconds for which a file's writes avoid the queues after that."""

Operation = tuple[Entry, Buffer | None, Callback]

_TIMESPEC: Final = struct.Struct("=qq")
_QUEUED: Final = frozenset({Opcode.WRITE, Opcode.FALLOCATE})
_CONTROL: Final = frozenset({Opcode.ASYNC_CANCEL, Opcode.TIMEOUT})
_NOT_DONE: Final = frozenset({-errno.ECANCELED, -errno.EINTR})


class SubmitControl(Protocol):
    """`RingEngine._submit_control`."""

    def __call__(
        self,
        opcode: Opcode,
        fd: int,
        address: int,
        length: int,
        op_flags: int,
        buffer: Buffer | None,
        callback: Callback,
    ) -> None: ...


class StallWatch:
    """Looks after the writes among the ring's `operations`.

    They are known by their tag, which grows; the engine notes the `newest` write and calls `begin`
    when `due`.  `promote_writes(tag)` makes ordinary operations of the lane's writes up to `tag`
    and tells whether it has others.
    """

    def __init__(
        self,
        operations: dict[int, Operation],
        submit: SubmitControl,
        threads: ThreadEngine,
        promote_writes: Callable[[int], bool],
    ) -> None:
        self._operations = operations
        self._submit = submit
        self._threads = threads
        self._promote_writes = promote_writes
        self._ticking = False
        self.newest = 0
        self._seen = 0
        self._a_tick_ago = 0
        self._moving: set[int] = set()
        self._diverted: dict[int, float] = {}
        self.own_operations = 0
        self._timespec = BufferPool().take(_TIMESPEC.size)
        _TIMESPEC.pack_into(self._timespec.view, 0, 0, int(TICK * 1e9))

    @property
    def due(self) -> bool:
        """Were writes submitted that the clock does not know of?"""
        return self.newest != self._seen

    def begin(self) -> None:
        """Writes were submitted since the last time: see to it that the clock ticks."""
        self._seen = self.newest
        if not self._ticking:
            self._ticking = True
            self.own_operations += 1
            address = self._timespec.address
            self._submit(Opcode.TIMEOUT, -1, address, 1, 0, self._timespec, self._tick)

    def _tick(self, _: int) -> None:
        self._ticking = False
        self.own_operations -= 1
        self._moving &= self._operations.keys()
        before, self._a_tick_ago = self._a_tick_ago, self.newest
        others = self._promote_writes(before)
        waiting = [entry for entry, _, _ in self._operations.values() if entry[0] in _QUEUED]
        if waiting or others:
            self.begin()
        stale = [
            entry
            for entry in waiting
            if entry[5] <= before and entry[5] not in self._moving and not _is_direct(entry[1])
        ]
        if len({entry[1] for entry in stale}) < 2:
            return  # one file at most: nobody waits for another
        for entry in stale:
            self._moving.add(entry[5])
            self.own_operations += 1
            self._submit(Opcode.ASYNC_CANCEL, -1, entry[5], 0, 0, None, self._cancelled)

    def _cancelled(self, _: int) -> None:
        self.own_operations -= 1

    def takes_over(self, operation: Operation, result: int) -> bool:
        """Does a failed operation go to the threads instead of being called back?"""
        entry, buffer, callback = operation
        opcode, fd, address, length, offset, tag, _, _ = entry
        if tag not in self._moving:
            return False
        self._moving.discard(tag)
        if result not in _NOT_DONE:
            return False
        self._diverted[fd] = time.monotonic() + DIVERSION
        if opcode == Opcode.FALLOCATE:
            self._threads.fallocate(fd, length, offset, address, callback)
            return True
        assert buffer is not None
        start = address - buffer.address
        self._threads.write(fd, buffer, start, offset - start, callback)
        return True

    def diverts(self, fd: int) -> bool:
        """Are the writes of this file for the threads now?"""
        if not self._diverted:
            return False
        until = self._diverted.get(fd)
        if until is None:
            return False
        if time.monotonic() < until:
            return True
        self._diverted.pop(fd, None)
        return False

    def opened(self, fd: int) -> None:
        """`fd` is another file now, of which nothing is under way yet.  For any thread."""
        self._diverted.pop(fd, None)

    def forget(self, fd: int) -> None:
        """`fd` was disowned: nothing of it is moved."""
        self._diverted.pop(fd, None)
        self._moving = {
            tag
            for tag in self._moving
            if tag in self._operations and file_of(self._operations[tag][0]) != fd
        }


def _is_direct(fd: int) -> bool:
    """O_DIRECT writes are not queued by file; they may take as long as the disk likes."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
    except OSError:
        return True


def file_of(entry: Entry) -> int:
    """The descriptor that an operation works on; -1 for operations about operations."""
    return -1 if entry[0] in _CONTROL else entry[1]
