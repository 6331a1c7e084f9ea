"""The lane through the gate: counted, in line, never beside a change that it overlaps.

While the gate is open, a request of the lane costs one call here.  It gets its sequence number, so
that whatever happens later it has its place in line; whoever wants to know what is in execution
empties the lane first, which makes ordinary requests of what is in it.
"""

from __future__ import annotations

from collections.abc import Callable

from ploopd.gate.parking import Op, Request
from ploopd.gate.queue import RequestQueue
from ploopd.storage.device import BlockDevice, Done
from ploopd.storage.lane import Lane, LaneRequest, lane_of


class GateLane:
    """`Lane` of a gate.  `reads`, `writes`: whether the gate lets them through now."""

    __slots__ = (
        "_below",
        "_busy",
        "_clock",
        "_now",
        "_queue",
        "first",
        "reads",
        "usable",
        "writes",
    )

    def __init__(
        self, queue: RequestQueue, device: BlockDevice, clock: Callable[[], float]
    ) -> None:
        self._queue = queue
        self._busy = queue.busy
        self._clock = clock
        self._now = -1.0
        self.reads = self.writes = False
        self._below: Lane
        self.put_on(device)
        queue.settle = self.empty

    def put_on(self, device: BlockDevice) -> None:
        """`device` is the one below from now on; nothing is in the lane."""
        self._below = lane_of(device)
        self.usable = self._below.usable
        self.first = self._below.first

    def begin(self, request: LaneRequest) -> bool:
        queue = self._queue
        if not request.writing:
            if not self.reads or not self._below.begin(request):
                return False
        else:
            busy = self._busy
            if not self.writes:
                return False
            if busy.count and busy.overlaps(request.offset, request.length):
                return False
            if not self._below.begin(request):
                return False
            busy.add(request)
        queue.sequence = request.sequence = queue.sequence + 1
        now = self._now
        if now < 0:
            self._now = now = self._clock()
        request.admitted_at = now
        return True

    def kicked(self) -> None:
        """A batch has ended: what begins from now on was admitted later."""
        self._now = -1.0

    def ended(self, request: LaneRequest) -> None:
        if request.writing:
            self._busy.remove(request)
        self._below.ended(request)

    def adopt(self, request: LaneRequest, buffer: memoryview, done: Done) -> Request:
        """See `Lane.adopt`: it keeps its place in line."""
        ordinary = Request(
            self._queue,
            request.sequence,
            Op.WRITE if request.writing else Op.READ,
            request.offset,
            request.length,
            buffer,
            done,
            False,
            False,
            request.admitted_at,
        )
        if request.writing:
            self._busy.remove(request)
        attempt = self._queue.adopt(ordinary)
        attempt.pending = self._below.adopt(request, buffer, attempt.finished)
        return ordinary

    def empty(self) -> None:
        self._below.empty()

    def __len__(self) -> int:
        return len(self._below)
