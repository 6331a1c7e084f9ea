"""The process's io_uring as an engine: operations in, callbacks in the loop's thread out."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import trio

from ploopd.fileio.buffers import Buffer, BufferPool
from ploopd.fileio.completions import Callback, Completions
from ploopd.fileio.polling import WINDOW, AdaptivePoll
from ploopd.fileio.stall_watch import Operation, StallWatch, file_of
from ploopd.fileio.thread_engine import ThreadEngine
from ploopd.fileio.uring import ASYNC, CANCEL_ALL_OF_FD, FSYNC_DATASYNC, Entry, Opcode, Ring

if TYPE_CHECKING:
    from ploopd.fileio.lane import LaneOperation

WORKERS: Final = 512
"""Kernel workers for operations that block; they exist only while they are needed."""

_THREADS_PER_FILE: Final = 8
_EAGER: Final = 8
"""Queued operations that are submitted without waiting for the end of the batch: the disk works
while the rest of the batch is being prepared."""

_FEW: Final = 4
_MAX_ROUNDS: Final = 8
_RETRY: Final = 0.01

GROUP: Final = 10
"""Completions between two interludes."""

_MOST_COLLECTING: Final = 2e-3
"""Seconds after which the loop's other tasks get their turn."""


class RingEngine:
    """`IoEngine` by one io_uring, with worker threads for the calls that it does not have.

    Operations whose ring is full wait in a queue.  Buffers are referenced until their completion
    has come, whatever became of the file.
    """

    kind = "io_uring"

    def __init__(
        self, *, entries: int = 256, completions: int = 4096, buffers: BufferPool | None = None
    ) -> None:
        self.buffers = BufferPool() if buffers is None else buffers
        self._ring = Ring(entries, completions)
        self._results = Completions()
        self._ring.register_eventfd(self._results.fd)
        try:
            self._ring.limit_workers(WORKERS)
        except OSError as error:
            if error.errno != errno.EINVAL:  # before Linux 5.15: its default must do
                raise
        self._threads = ThreadEngine(
            per_file=_THREADS_PER_FILE, buffers=self.buffers, completions=self._results
        )
        self._operations: dict[int, Operation] = {}
        self._lane: dict[int, LaneOperation] = {}
        self._backlog: deque[Entry] = deque()
        self._stalling: set[int] = set()
        self._watch = StallWatch(
            self._operations, self._submit_control, self._threads, self._promote_writes
        )
        self._tag = 0
        self._patience = AdaptivePoll()
        self._pumping = False
        self._closed = False
        self.interlude: Callable[[], None] | None = None
        self.collecting = False

    @property
    def outstanding(self) -> int:
        """Operations of the ring that have not come back."""
        return len(self._operations) + len(self._lane) - self._watch.own_operations

    def may_stall(self, fd: int, stalls: bool) -> None:
        """Whether reads and writes of `fd` are for the kernel's workers from the start.

        io_uring tries every operation in the submitting thread first.  FUSE accepts that try and
        then sleeps in it while its queue of background requests (12 by default) is full.  Called by
        the thread that opens a file.
        """
        self._watch.opened(fd)
        if stalls:
            self._stalling.add(fd)
        else:
            self._stalling.discard(fd)

    # Operations: queued here, begun by the next kick.

    def read(self, fd: int, buffer: Buffer, start: int, offset: int, callback: Callback) -> None:
        """Fill `buffer` from its byte `start` on with what is at `offset + start`."""
        flags = ASYNC if fd in self._stalling else 0
        address, length = buffer.address + start, buffer.length - start
        self._tag = tag = self._tag + 1
        entry = (Opcode.READ, fd, address, length, offset + start, tag, 0, flags)
        self._operations[tag] = (entry, buffer, callback)
        self._push(entry)

    def write(self, fd: int, buffer: Buffer, start: int, offset: int, callback: Callback) -> None:
        """Write `buffer` from its byte `start` on to `offset + start`."""
        if self._watch.diverts(fd):
            self._threads.write(fd, buffer, start, offset, callback)
            return
        flags = ASYNC if fd in self._stalling else 0
        address, length = buffer.address + start, buffer.length - start
        self._tag = tag = self._tag + 1
        self._watch.newest = tag
        entry = (Opcode.WRITE, fd, address, length, offset + start, tag, 0, flags)
        self._operations[tag] = (entry, buffer, callback)
        self._push(entry)

    def begin(self, operation: LaneOperation, fd: int) -> bool:
        """Queue an operation of the lane; False if it must go the ordinary way."""
        writing, ring = operation.writing, self._ring
        if self._backlog or (writing and self._watch.diverts(fd)):
            return False
        if len(self._operations) + len(self._lane) >= ring.completions:
            return False
        tag = self._tag + 1
        if not ring.push(
            Opcode.WRITE if writing else Opcode.READ,
            fd,
            operation.buffer.address,
            operation.length,
            operation.host,
            tag,
            0,
            ASYNC if fd in self._stalling else 0,
        ):
            return False
        self._tag = operation.tag = tag
        self._lane[tag] = operation
        if writing:
            self._watch.newest = tag
        if ring.pending >= _EAGER:
            self._submit()
        return True

    def adopt(self, operation: LaneOperation, fd: int, callback: Callback) -> None:
        """What is in the lane, or has just failed in it, is an ordinary operation from now on."""
        tag, buffer = operation.tag, operation.buffer
        del self._lane[tag]
        opcode = Opcode.WRITE if operation.writing else Opcode.READ
        flags = ASYNC if fd in self._stalling else 0
        entry = (opcode, fd, buffer.address, operation.length, operation.host, tag, 0, flags)
        self._operations[tag] = (entry, buffer, callback)

    def lane_operations(self) -> list[LaneOperation]:
        """What is in the lane."""
        return list(self._lane.values())

    def _promote_writes(self, newest: int) -> bool:
        """Make ordinary operations of the lane's writes up to the tag `newest`; False: it has no
        others."""
        for operation in self.lane_operations():
            if operation.writing and operation.tag <= newest:
                operation.promote()
        return any(operation.writing for operation in self._lane.values())

    def fdatasync(self, fd: int, callback: Callback) -> None:
        """Bring what was written to `fd` to stable storage."""
        self._tag = tag = self._tag + 1
        entry = (Opcode.FSYNC, fd, 0, 0, 0, tag, FSYNC_DATASYNC, 0)
        self._operations[tag] = (entry, None, callback)
        self._push(entry)

    def fallocate(self, fd: int, mode: int, offset: int, length: int, callback: Callback) -> None:
        """fallocate(2); the entry has the length where others have the address."""
        if self._watch.diverts(fd):
            self._threads.fallocate(fd, mode, offset, length, callback)
            return
        self._tag = tag = self._tag + 1
        self._watch.newest = tag
        entry = (Opcode.FALLOCATE, fd, length, mode, offset, tag, 0, 0)
        self._operations[tag] = (entry, None, callback)
        self._push(entry)

    def call(
        self,
        fd: int,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        callback: Callback,
    ) -> None:
        """Call a blocking function in a worker thread; its int (or 0 for None) is the result."""
        self._threads.call(fd, function, arguments, callback)

    def disown(self, fd: int) -> None:
        """`fd` hangs: what has not begun ends with ECANCELED, the rest is asked to."""
        self._threads.disown(fd)
        self._watch.forget(fd)
        dropped = [entry for entry in self._backlog if file_of(entry) == fd]
        if dropped:
            self._backlog = deque([entry for entry in self._backlog if file_of(entry) != fd])
        for entry in dropped:
            _, _, callback = self._operations.pop(entry[5])
            self._results.post(callback, -errno.ECANCELED)
        if fd in [file_of(entry) for entry, _, _ in self._operations.values()]:
            self._submit_control(Opcode.ASYNC_CANCEL, fd, 0, 0, CANCEL_ALL_OF_FD, None, _ignore)

    def _submit_control(
        self,
        opcode: Opcode,
        fd: int,
        address: int,
        length: int,
        op_flags: int,
        buffer: Buffer | None,
        callback: Callback,
    ) -> None:
        """An operation about operations: a cancellation or a time-out."""
        self._tag = tag = self._tag + 1
        entry = (opcode, fd, address, length, 0, tag, op_flags, 0)
        self._operations[tag] = (entry, buffer, callback)
        self._push(entry)

    def _push(self, entry: Entry) -> None:
        if (
            self._backlog
            or len(self._operations) > self._ring.completions
            or not self._ring.push(*entry)
        ):
            self._backlog.append(entry)
        elif self._ring.pending >= _EAGER:
            self._submit()

    # The loop's side.

    def ready(self) -> int:
        """How many operations have completed and wait for `kick`."""
        return self._ring.completed() + len(self._results.queue)

    def kick(self) -> None:
        """Submit what was queued by one system call; call back what has completed by now.

        Callbacks may queue more and may kick; what they queue is submitted before this returns.
        Callbacks that never end do not keep the loop from its other work.
        """
        if self._pumping:
            return
        self._pumping = True
        try:
            delivered = False
            for _ in range(_MAX_ROUNDS):
                self._submit()
                if self._deliver_all():
                    delivered = True
                elif delivered or not self._poll():
                    break
            if self._watch.due:
                self._watch.begin()
            self._submit()
        finally:
            self._pumping = False

    def _collect(self, interlude: Callable[[], None]) -> None:
        """Call back what has completed, a group at a time and with an `interlude` after each.

        Storage that completes all it has been given at once, as virtual disks do, would get all its
        new work at once, too, when everything has been answered: it and we would take turns.
        """
        self._pumping = self.collecting = True
        try:
            end = time.perf_counter() + _MOST_COLLECTING
            while self._waits() and time.perf_counter() < end:
                self._deliver(GROUP)
                self._submit()
                interlude()
                self._submit()
        finally:
            self._pumping = self.collecting = False
        self._results.drain()  # what has been delivered need not wake the loop; `kick` looks again

    def _submit(self) -> None:
        ring, backlog = self._ring, self._backlog
        self._threads.hand_over()
        while True:
            while backlog and len(self._operations) - len(backlog) < ring.completions:
                if not ring.push(*backlog[0]):
                    break
                backlog.popleft()
            if not ring.pending:
                return
            try:
                ring.submit()
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EBUSY):
                    return  # `run` tries again
                raise

    def _poll(self) -> bool:
        """Look for a completion for a moment, where that pays; False: there is none.

        With many operations under way their completions come in groups, which are cheaper.
        """
        under_way = len(self._operations) + len(self._lane)
        if not 0 < under_way <= _FEW or self._closed or not self._patience.wanted():
            return False
        ready, now = self._ring.ready, time.perf_counter
        end = now() + WINDOW
        while not ready():
            if now() > end:
                self._patience.ended(False)
                return False
        self._patience.ended(True)
        return True

    def _waits(self) -> bool:
        """Is there something to deliver?"""
        return self._ring.ready() or bool(self._results.queue)

    def _deliver_all(self) -> bool:
        """Call back what has completed; False if there was nothing."""
        if not self._waits():
            return False
        self._results.drain()  # before looking: what completes from now on wakes the loop again
        self._deliver(1 << 31)
        return True

    def _deliver(self, most: int) -> None:
        """Call back what has completed, up to `most` operations of the ring."""
        results, ring = self._results, self._ring
        operations, lane, queue = self._operations, self._lane, results.queue
        for tag, result in ring.reap(most):
            quick = lane.get(tag)
            if quick is not None:
                if result == quick.length:
                    del lane[tag]
                    quick.file.left(quick)
                    quick.completed()
                    continue
                quick.promote()
            operation = operations.pop(tag)
            if result < 0 and self._watch.takes_over(operation, result):
                continue
            queue.append((operation[2], result))
        results.deliver()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Reap completions until cancelled."""
        task_status.started()
        while True:
            if self._ring.pending:  # the kernel had no room for it
                with trio.move_on_after(_RETRY):
                    await trio.lowlevel.wait_readable(self._results.fd)
            else:
                await trio.lowlevel.wait_readable(self._results.fd)
            self._results.drain()
            if self.interlude is not None:
                self._collect(self.interlude)
            self.kick()

    def close(self) -> None:
        """Give the ring back.  Operations that hang keep it, and their buffers, until they end."""
        if self._closed:
            return
        self._closed = True
        quiet = self._threads.close()
        if self.outstanding:
            threading.Thread(target=self._linger, name="ploopd-io-linger", daemon=True).start()
        else:
            self._ring.close()
            if quiet:
                self._results.close()

    def _linger(self) -> None:
        """Hold ring and buffers while the kernel may still write into them."""
        while self.outstanding > 0:
            try:
                self._ring.submit(wait=1)
            except OSError:
                time.sleep(1)  # out of memory for the moment; nothing else may free the buffers
            for tag, _ in self._ring.reap():
                self._operations.pop(tag, None)
                self._lane.pop(tag, None)
        os.close(self._ring.fd)


def _ignore(result: int) -> None:
    """What becomes of a cancellation is seen in the operations themselves."""
