"""Worker threads, for where io_uring is refused and for calls that it does not have.

Operations wait in a *lane* per descriptor.  A lane gets at most `per_file` threads, so a file that
hangs does not take them all.  A thread stays with a lane while it has work: a batch costs one hop.
A lane whose operations are quick gets one thread (they share one interpreter), a slow one gets as
many as it may have.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

import trio

from ploopd.fileio import libc
from ploopd.fileio.buffers import Buffer, BufferPool
from ploopd.fileio.completions import Callback, Completions

QUICK = 50e-6
"""Seconds: operations below this are not worth a second thread."""

IDLE_LIMIT = 10.0
"""Seconds after which a thread without work ends."""

_SMOOTHING = 0.25
_SOON = 1e-3

_Job = tuple[Callable[..., Any], tuple[Any, ...], Callback]


class _Lane:
    """The operations of one descriptor."""

    __slots__ = ("claimed", "disowned", "jobs", "progress", "running", "seconds")

    def __init__(self) -> None:
        self.jobs: deque[_Job] = deque()
        self.claimed = 0  # threads promised to it
        self.running = 0  # threads at work in it
        self.seconds = QUICK  # smoothed time of one operation; unknown is slow
        self.progress = 0.0
        self.disowned = False

    def threads_wanted(self, now: float, per_file: int) -> int:
        waiting = len(self.jobs)
        moving = self.claimed == 0 or now - self.progress < _SOON
        limit = 1 if self.seconds < QUICK and moving else per_file
        return min(waiting, limit - self.claimed)


class ThreadEngine:
    """`IoEngine` by a bounded pool of daemon threads.

    `max_threads` and `per_file` bound it; threads stuck in a disowned file are not counted.
    """

    kind = "threads"

    def __init__(
        self,
        *,
        max_threads: int = 128,
        per_file: int = 32,
        buffers: BufferPool | None = None,
        completions: Completions | None = None,
    ) -> None:
        self.buffers = BufferPool() if buffers is None else buffers
        self._owns_completions = completions is None
        self._completions = Completions() if completions is None else completions
        self._max_threads = max_threads
        self._per_file = per_file
        self._lock = threading.Lock()
        self._lanes: dict[int, _Lane] = {}
        self._tokens: SimpleQueue[_Lane | None] = SimpleQueue()
        self._queued: list[tuple[int, _Job]] = []
        self._threads = 0
        self._claimed = 0
        self._stuck = 0
        self._pumping = False
        self.interlude: Callable[[], None] | None = None
        self.collecting = False
        self._closed = False

    # Operations: queued here, executed after the next kick.

    def may_stall(self, fd: int, stalls: bool) -> None:
        """Nothing to do: no operation begins in the loop's thread."""

    def read(self, fd: int, buffer: Buffer, start: int, offset: int, callback: Callback) -> None:
        """Fill `buffer` from its byte `start` on with what is at `offset + start`."""
        arguments = (fd, (buffer.view[start:],), offset + start)
        self._queued.append((fd, (os.preadv, arguments, callback)))

    def write(self, fd: int, buffer: Buffer, start: int, offset: int, callback: Callback) -> None:
        """Write `buffer` from its byte `start` on to `offset + start`."""
        arguments = (fd, (buffer.view[start:],), offset + start)
        self._queued.append((fd, (os.pwritev, arguments, callback)))

    def fdatasync(self, fd: int, callback: Callback) -> None:
        self.call(fd, os.fdatasync, (fd,), callback)

    def fallocate(self, fd: int, mode: int, offset: int, length: int, callback: Callback) -> None:
        self.call(fd, libc.fallocate, (fd, mode, offset, length), callback)

    def call(
        self,
        fd: int,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        callback: Callback,
    ) -> None:
        """Call a blocking function for the file `fd`; its int (or 0 for None) is the result.

        These have a lane of their own: reads and writes do not wait behind a sync.
        """
        self._queued.append((~fd, (function, arguments, callback)))

    def disown(self, fd: int) -> None:
        """`fd` hangs: what has not begun ends with ECANCELED, its threads are not counted."""
        self.hand_over()
        dropped: list[_Job] = []
        with self._lock:
            for lane in (self._lanes.pop(fd, None), self._lanes.pop(~fd, None)):
                if lane is None:
                    continue
                dropped.extend(lane.jobs)
                lane.jobs.clear()
                lane.disowned = True
                self._threads -= lane.running
                self._claimed -= lane.running
                self._stuck += lane.running
        for _, _, callback in dropped:
            self._completions.post(callback, -errno.ECANCELED)

    # The loop's side.

    def ready(self) -> int:
        """How many operations have completed and wait for `kick`."""
        return len(self._completions.queue)

    def kick(self) -> None:
        """Hand over what was queued and call back what has completed."""
        if self._pumping:
            return
        self._pumping = True
        try:
            self.hand_over()
            while self._completions.queue:
                self._completions.drain()
                self._completions.deliver()
                self.hand_over()
        finally:
            self._pumping = False

    def hand_over(self) -> None:
        """Give what was queued to the threads."""
        if not self._queued:
            return
        queued, self._queued = self._queued, []
        now = time.monotonic()
        with self._lock:
            touched: dict[_Lane, None] = {}
            for key, job in queued:
                lane = self._lanes.get(key)
                if lane is None:
                    lane = self._lanes[key] = _Lane()
                lane.jobs.append(job)
                touched[lane] = None
            for lane in touched:
                for _ in range(lane.threads_wanted(now, self._per_file)):
                    self._claim_thread(lane)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Reap completions until cancelled."""
        task_status.started()
        while True:
            await trio.lowlevel.wait_readable(self._completions.fd)
            self._completions.drain()
            self.kick()

    def close(self) -> bool:
        """End the idle threads; a stuck one ends when its call returns.  True: none is stuck."""
        if self._closed:
            return False
        self._closed = True
        with self._lock:
            for _ in range(self._threads):
                self._tokens.put(None)
            quiet = self._claimed == 0 and self._stuck == 0
        if self._owns_completions and quiet:
            self._completions.close()
        return quiet

    # The threads' side.

    def _claim_thread(self, lane: _Lane) -> None:
        lane.claimed += 1
        self._claimed += 1
        self._tokens.put(lane)
        if self._threads < min(self._claimed, self._max_threads):
            self._threads += 1
            threading.Thread(target=self._work, name="ploopd-io", daemon=True).start()

    def _work(self) -> None:
        while True:
            try:
                lane = self._tokens.get(timeout=IDLE_LIMIT)
            except Empty:
                with self._lock:
                    if self._claimed >= self._threads:
                        continue  # one of the claims may be for this thread
                    self._threads -= 1
                return
            if lane is None or not self._serve(lane):
                return

    def _enter(self, lane: _Lane) -> bool:
        """Begin to work on a lane; False if it was disowned before this thread came."""
        with self._lock:
            if lane.disowned:
                self._claimed -= 1
                return False
            lane.running += 1
            return True

    def _serve(self, lane: _Lane) -> bool:
        """Work on a lane until it is empty.  False: the lane was disowned meanwhile, end."""
        if not self._enter(lane):
            return True
        while True:
            with self._lock:
                if lane.disowned:
                    self._stuck -= 1
                    return False
                if not lane.jobs:
                    lane.claimed -= 1
                    lane.running -= 1
                    self._claimed -= 1
                    return True
                function, arguments, callback = lane.jobs.popleft()
            begun = time.monotonic()
            try:
                result = function(*arguments) or 0
            except OSError as error:
                result = -(error.errno or errno.EIO)
            now = time.monotonic()
            lane.progress = now
            lane.seconds += (now - begun - lane.seconds) * _SMOOTHING
            self._completions.post(callback, result)
