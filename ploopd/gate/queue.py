"""The requests of one device: in execution, parked, released, and how they move between these.

Knows nothing of fuses and states: the gate tells it when to park and when to release, and judges
errors for it.  Every request's `done` is called exactly once, or never after a successful cancel.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Protocol

import trio

from ploopd.errors import NO_ROOM, ParkTimeoutError, StorageError
from ploopd.gate.events import EventKind
from ploopd.gate.limits import ParkLimits
from ploopd.gate.parking import Attempt, Op, ParkedRequests, Request, RequestState
from ploopd.gate.ranges import BusyRanges
from ploopd.gate.release import ReleaseOrder
from ploopd.storage.device import BlockDevice


class Supervisor(Protocol):
    """The gate, as the queue sees it."""

    def judge(self, error: StorageError) -> bool:
        """A request failed; True: park it, False: its caller gets the error."""
        ...

    def refusal(self, request: Request) -> StorageError | None:
        """Why a request must not be executed now, if there is a reason."""
        ...

    def no_room(self, request: Request, error: StorageError) -> None:
        """A request ends with an error that means a full storage."""
        ...

    def released(self, *, announce: bool) -> None:
        """No request waits for its turn any more; `announce`: after an episode of standby."""
        ...

    def report(self, kind: EventKind, **details: str | int | float) -> None:
        """Publish an event."""
        ...


class RequestQueue:
    """See the module's first lines.

    `device` executes; `limits` bound what is parked; `busy` are the changes in execution;
    `sequence` is the number of the latest request.  `settle` is called before it matters what is in
    execution, so that the lane's owner can have it adopted.
    """

    __slots__ = (
        "_announce",
        "_attention",
        "_executing",
        "_idle",
        "_limit_reported",
        "_park_reported",
        "_parked",
        "_release",
        "_supervisor",
        "busy",
        "device",
        "limits",
        "sequence",
        "settle",
    )

    def __init__(self, device: BlockDevice, limits: ParkLimits, supervisor: Supervisor) -> None:
        self.device = device
        self.limits = limits
        self.busy = BusyRanges()
        self.sequence = 0
        self.settle: Callable[[], None] = _nothing_to_settle
        self._supervisor = supervisor
        self._executing: dict[int, Request] = {}
        self._parked = ParkedRequests()
        self._release: ReleaseOrder | None = None
        self._announce = False
        self._idle: trio.Event | None = None
        self._attention: Callable[[], None] | None = None
        self._park_reported = False
        self._limit_reported = False

    # -- what can be asked -----------------------------------------------------------------

    @property
    def executing_count(self) -> int:
        return len(self._executing)

    @property
    def parked_count(self) -> int:
        return len(self._parked)

    @property
    def parked_bytes(self) -> int:
        return self._parked.size

    @property
    def releasing(self) -> bool:
        """Whether released requests are still waiting for their turn."""
        return self._release is not None

    def notify_parked(self, callback: Callable[[], None] | None) -> None:
        """Call `callback()` whenever `next_deadline` may be earlier than it was."""
        self._attention = callback

    def set_limits(self, limits: ParkLimits) -> None:
        """Other bounds from now on; what is parked beyond them stays until its time is up."""
        self.limits = limits
        if self._attention is not None:
            self._attention()

    # -- execution -------------------------------------------------------------------------

    def start(self, request: Request) -> None:
        """Hand `request` to the device."""
        request.state = RequestState.EXECUTING
        request.attempt = attempt = Attempt(request)
        self._executing[request.sequence] = request
        if request.changes:
            self.busy.add(request)
        device, offset, buffer = self.device, request.offset, request.buffer
        if request.op is Op.READ and buffer is not None:
            attempt.pending = device.read(offset, buffer, attempt.finished)
        elif request.op is Op.WRITE and buffer is not None:
            attempt.pending = device.write(offset, buffer, attempt.finished, fua=request.fua)
        elif request.op is Op.WRITE_ZEROES:
            attempt.pending = device.write_zeroes(
                offset, request.length, attempt.finished, unmap=request.unmap, fua=request.fua
            )
        elif request.op is Op.DISCARD:
            attempt.pending = device.discard(offset, request.length, attempt.finished)
        else:
            attempt.pending = device.flush(attempt.finished)

    def adopt(self, request: Request) -> Attempt:
        """`request` is in execution already; the attempt that stands for that."""
        request.state = RequestState.EXECUTING
        request.attempt = attempt = Attempt(request)
        self._executing[request.sequence] = request
        if request.changes:
            self.busy.add(request)
        return attempt

    def finished(self, attempt: Attempt, error: StorageError | None) -> None:
        """The device's answer to an attempt (called by the attempt)."""
        if attempt.void:
            return
        request = attempt.request
        self._leave(request)
        if error is None or not self._supervisor.judge(error):
            self.end(request, error)
        elif request.abandoned:
            self.end(request, _aborted(request))
        else:
            self.park(request)
        self._went_away(request)

    def end(self, request: Request, error: StorageError | None) -> None:
        """Tell the caller, once."""
        request.state = RequestState.ENDED
        request.buffer = None
        if error is not None and error.errno in NO_ROOM:
            self._supervisor.no_room(request, error)
        request.done(error)

    def cancel(self, request: Request) -> bool:
        """See `Request.cancel`."""
        if request.state is RequestState.PARKED:
            self._drop(request)
            return True
        attempt = request.attempt
        if request.state is not RequestState.EXECUTING:
            return False
        if attempt is None:  # disowned a moment ago, and not parked yet
            request.state = RequestState.ENDED
            return True
        if attempt.pending is not None and attempt.pending.cancel():
            request.state = RequestState.ENDED
            self._leave(request)
            self._went_away(request)
            return True
        request.abandoned = True
        return False

    def _leave(self, request: Request) -> None:
        request.attempt = None
        del self._executing[request.sequence]
        if request.changes:
            self.busy.remove(request)

    def _went_away(self, request: Request) -> None:
        """`request` is not in execution any more."""
        if self._release is not None:
            self._release.ended(request)
            self._pump(self._release)
        if self._idle is not None and not self._executing:
            self._idle.set()
            self._idle = None

    # -- parking ---------------------------------------------------------------------------

    def begin_episode(self) -> None:
        """The device has stopped: what is parked stays so, and is reported once more."""
        self._release = None
        self._park_reported = self._limit_reported = False

    def park(self, request: Request) -> bool:
        """Park it in its place, or answer BUSY at once (False) where the limits say so."""
        parked = self._parked
        if not self.limits.allows(len(parked) + 1, parked.size + request.held_bytes):
            if not self._limit_reported:
                self._limit_reported = True
                self._supervisor.report(EventKind.PARK_LIMIT, parked=len(parked), bytes=parked.size)
            self.end(request, ParkTimeoutError(request.op.value))
            return False
        if parked.add(request) and self._attention is not None:
            self._attention()
        if not self._park_reported and self._release is None:
            self._park_reported = True
            self._supervisor.report(EventKind.PARKED, op=request.op.value, offset=request.offset)
        return True

    def serialise(self, request: Request) -> None:
        """Admit `request` behind changes in execution that it overlaps: begins a line."""
        self._release = self._new_order()
        self._announce = False
        self.line_up(request)

    def line_up(self, request: Request) -> None:
        """Admit `request` behind those that wait for their turn."""
        order = self._release
        if self.park(request) and order is not None:
            order.add(request)
            self._pump(order)

    def next_deadline(self) -> float | None:
        """When `expire` has something to do next, on the clock of `admitted_at`."""
        oldest = self._parked.first()
        if oldest is None or self.limits.park_max is None:
            return None
        return oldest.admitted_at + self.limits.park_max

    def expire(self, now: float) -> int:
        """Answer BUSY to requests that have waited for `park_max`; returns how many."""
        park_max = self.limits.park_max
        if park_max is None:
            return 0
        count = 0
        for request in self._parked.in_order():
            if request.admitted_at + park_max > now:
                break
            if request.state is RequestState.PARKED:
                count += 1
                self._drop(request, ParkTimeoutError(request.op.value))
        if count:
            self._supervisor.report(EventKind.PARK_EXPIRED, count=count, parked=len(self._parked))
        return count

    def fail_parked(self, error: Callable[[Request], StorageError]) -> None:
        """End every parked request with the error that `error(request)` makes."""
        for request in self._parked.in_order():
            if request.state is RequestState.PARKED:
                self._drop(request, error(request))

    def _drop(self, request: Request, error: StorageError | None = None) -> None:
        """Take a request out of the parked ones, answer it if there is an `error`, and let those
        behind it go."""
        self._parked.remove(request)
        request.state = RequestState.ENDED
        if error is not None:
            self.end(request, error)
        if self._release is not None:
            self._release.withdraw(request)
            self._pump(self._release)

    # -- draining --------------------------------------------------------------------------

    async def drain(self, deadline: float) -> bool:
        """Wait for requests in execution; False if some are left after `deadline` seconds."""
        self.settle()
        self.device.kick()
        with trio.move_on_after(deadline):
            while self._executing:
                self._idle = trio.Event()
                await self._idle.wait()
        if not self._executing:
            await trio.lowlevel.checkpoint()
            return True
        return False

    def disown(self) -> None:
        """See `Gate.disown`."""
        self.settle()
        hung = [self._executing[sequence] for sequence in sorted(self._executing)]
        self._supervisor.report(EventKind.DISOWNED, count=len(hung))
        for request in hung:  # all of them before the first answer: it may cancel another
            attempt = request.attempt
            assert attempt is not None
            attempt.void = True
            self._leave(request)
        for request in hung:
            if request.state is RequestState.ENDED:
                continue
            if request.abandoned:
                self.end(request, _aborted(request))
            else:
                self.park(request)

    # -- release ---------------------------------------------------------------------------

    def release(self) -> None:
        """Execute what is parked, in the original order where requests overlap."""
        parked = self._parked.in_order()
        if not parked:
            return
        self._release = order = self._new_order()
        self._announce = True
        for request in parked:
            order.add(request)
        self._pump(order)

    def _new_order(self) -> ReleaseOrder:
        self.settle()
        order = ReleaseOrder()
        for sequence in sorted(self._executing):
            request = self._executing[sequence]
            if request.changes:
                order.add_running(request)
        return order

    def _pump(self, order: ReleaseOrder) -> None:
        """Start what may run; the release is over when nothing is left to start.

        The device may complete a request before its method returns: the flag keeps that from
        recursing, and the loop stops when such a completion has put the device into standby again.
        """
        if order.pumping:
            return
        order.pumping = True
        while order.ready and self._release is order:
            request = order.ready.popleft()
            if request.state is not RequestState.PARKED:
                continue
            refusal = self._supervisor.refusal(request)
            if refusal is None:
                self._parked.remove(request)
                self.start(request)
            else:
                self._drop(request, refusal)
        order.pumping = False
        if self._release is not order:
            return
        if not self._parked:
            self._release = None
            self._supervisor.released(announce=self._announce)
        self.device.kick()


def _nothing_to_settle() -> None:
    """Nothing is executed without being in the queue."""


def _aborted(request: Request) -> StorageError:
    op = request.op.value
    return StorageError(errno.ECANCELED, op, message=f"{op} was aborted")
