"""The gate in the data path: admit, count, park, judge.

Every operation of the block device goes through here.  While the gate is open, `try_read` and
`try_write` are the device's own methods behind one call; slow operations are remembered so that one
that fails with a standby errno can be parked in its original place and executed again after
the device has been recovered.  docs/standby.md says what is promised.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Iterator

from ploopd.errors import HARMLESS_ERRNOS, NO_ROOM, StorageError, UsageError
from ploopd.fileio.view import no_view
from ploopd.gate.errnos import STANDBY_ERRNOS, checked_errnos
from ploopd.gate.events import Event, EventKind, Subscriber
from ploopd.gate.lane import GateLane
from ploopd.gate.limits import ParkLimits
from ploopd.gate.parking import Op, Request
from ploopd.gate.queue import RequestQueue
from ploopd.gate.room import Room
from ploopd.gate.state import GateEvent, GateState, advance
from ploopd.storage.device import BlockDevice, Done, Extent, views_of, write_views_of
from scst_shim import QueueFlags, StandbyState

TryNow = Callable[[int, memoryview], bool]


def _not_now(offset: int, buffer: memoryview) -> bool:
    """A closed inline path: the caller takes the slow one, which parks."""
    return False


class Gate:
    """A block device that survives its storage; see the module's first lines.

    `fuses` are the device's standby flags; `clock` gives seconds; `on_event` gets every event.
    `standby_errnos` must not contain any of HARMLESS_ERRNOS (`UsageError`).  All methods
    must be called from the event loop's thread.
    """

    __slots__ = (
        "_began_active",
        "_busy",
        "_cause",
        "_clock",
        "_device",
        "_errnos",
        "_faulted",
        "_latch",
        "_on_event",
        "_queue",
        "_read_now",
        "_room",
        "_state",
        "_touched",
        "_users",
        "_view_now",
        "_write_now",
        "_write_view_now",
        "flags",
        "lane",
        "name",
    )

    def __init__(
        self,
        device: BlockDevice,
        *,
        name: str,
        fuses: QueueFlags,
        clock: Callable[[], float],
        on_event: Subscriber,
        limits: ParkLimits | None = None,
        standby_errnos: Collection[int] = STANDBY_ERRNOS,
    ) -> None:
        self.name = name
        self.flags = fuses
        self._device = device
        self._clock = clock
        self._on_event = on_event
        self._errnos = checked_errnos(standby_errnos)
        self._queue = RequestQueue(device, limits or ParkLimits(), self)
        self._busy = self._queue.busy
        self._state = GateState.ACTIVE
        self._latch: StorageError | None = None
        self._room = Room(self.report, self._rewire)
        self._cause = ""
        self._faulted = False
        self._began_active = False
        self._touched = False
        self._users = 0
        self.lane = GateLane(self._queue, device, clock)
        self._rewire()
        fuses.watcher.subscribe(self._fuse_changed)

    # -- what can be asked -----------------------------------------------------------------

    @property
    def state(self) -> GateState:
        return self._state

    @property
    def standby_text(self) -> str:
        """What `queue/standby` reads: "not supported", "on" or "off"."""
        return self.flags.state.value

    @property
    def cause(self) -> str:
        """Why the device is in standby; empty while it is active."""
        return self._cause

    @property
    def faulted(self) -> bool:
        """Whether the storage has failed since the device was active last."""
        return self._faulted

    @property
    def limits(self) -> ParkLimits:
        return self._queue.limits

    def set_limits(self, limits: ParkLimits) -> None:
        """An operator's order: from now on these hold, for what is parked already as well."""
        self._queue.set_limits(limits)

    def set_standby_errnos(self, errnos: Collection[int]) -> None:
        """From now on these put the device into standby; see the constructor."""
        self._errnos = checked_errnos(errnos)

    @property
    def standby_errnos(self) -> frozenset[int]:
        """The errnos that put the device into standby."""
        return self._errnos

    @property
    def parked_count(self) -> int:
        return self._queue.parked_count

    @property
    def parked_bytes(self) -> int:
        return self._queue.parked_bytes

    @property
    def executing_count(self) -> int:
        """Slow operations that the device has and has not answered."""
        return self._queue.executing_count + len(self.lane)

    @property
    def latched(self) -> StorageError | None:
        """The failure that made the device read-only, if one did."""
        return self._latch

    @property
    def full(self) -> StorageError | None:
        """The failure of a storage that has no room, until it has some again."""
        return self._room.failure

    @property
    def size(self) -> int:
        return self._device.size

    @property
    def cluster_size(self) -> int:
        return self._device.cluster_size

    @property
    def read_only(self) -> bool:
        return self._latch is not None or self._device.read_only

    # -- the block device ------------------------------------------------------------------

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        try:
            return self._read_now(offset, buffer)
        except StorageError as error:
            if self.judge(error):
                return False
            raise

    def try_view(self, offset: int, length: int) -> memoryview | None:
        return self._view_now(offset, length)

    def try_write_view(self, offset: int, length: int) -> memoryview | None:
        busy = self._busy
        if busy.count and busy.overlaps(offset, length):
            return None
        return self._write_view_now(offset, length)

    def try_write(self, offset: int, buffer: memoryview) -> bool:
        try:
            busy = self._busy
            if busy.count and busy.overlaps(offset, len(buffer)):
                return False
            return self._write_now(offset, buffer)
        except StorageError as error:
            if self.judge(error):
                return False
            raise

    def read(self, offset: int, buffer: memoryview, done: Done) -> Request:
        return self._admit(Op.READ, offset, len(buffer), buffer, done)

    def write(self, offset: int, buffer: memoryview, done: Done, *, fua: bool = False) -> Request:
        return self._admit(Op.WRITE, offset, len(buffer), buffer, done, fua=fua)

    def write_zeroes(
        self, offset: int, length: int, done: Done, *, unmap: bool = False, fua: bool = False
    ) -> Request:
        return self._admit(Op.WRITE_ZEROES, offset, length, None, done, fua=fua, unmap=unmap)

    def discard(self, offset: int, length: int, done: Done) -> Request:
        return self._admit(Op.DISCARD, offset, length, None, done)

    def flush(self, done: Done) -> Request:
        return self._admit(Op.FLUSH, 0, 0, None, done)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The map as it was last known: it is answered in every state."""
        return self._device.extents(offset, length)

    def kick(self) -> None:
        self.lane.kicked()
        self._device.kick()

    # -- front ends ------------------------------------------------------------------------

    def bind(self) -> None:
        """The device was added to a front end: sets its EN fuse."""
        self._users += 1
        if self._users == 1:
            self.flags.set_standby_en()

    def unbind(self) -> None:
        """It was removed from one; the last one clears EN.  Raises `ValueError` without `bind`."""
        if self._users == 0:
            raise ValueError(f"{self.name}: no front end to remove it from")
        self._users -= 1
        if self._users == 0:
            self.flags.clear_standby_en()

    # -- standby and recovery --------------------------------------------------------------

    def enter_standby(self, reason: str) -> None:
        """An operator's order; nothing changes in a device that is recovering or in standby.

        Raises `UsageError` with a fuse off.
        """
        if not self.flags.supported:
            raise UsageError(
                "standby is not supported on this device",
                field="standby",
                value=self.standby_text,
                hint="serve it by a front end that handles standby",
            )
        if self._state is GateState.ACTIVE:
            self._stop(GateEvent.ENTER, reason, {"reason": reason})

    def begin_recovery(self) -> None:
        """Stop admission.  Raises `BusyError` if the device is being recovered already."""
        before = self._state
        self._state = advance(before, GateEvent.BEGIN)
        self._began_active = before is GateState.ACTIVE
        self._touched = False
        self._queue.begin_episode()
        self._rewire()

    async def drain(self, deadline: float, *, disown: bool = True) -> bool:
        """Wait up to `deadline` seconds for requests in execution.

        False: some did not come back and were, unless `disown` is False, disowned: parked in their
        places for another execution, and what they still answer is void.  The caller must abandon
        the device before the next checkpoint: until then it may touch the buffers of such requests.
        """
        drained = await self._queue.drain(deadline)
        if not drained and disown:
            self.disown()
        return drained

    def disown(self) -> None:
        """Give up the requests in execution at once: `drain` with a deadline that has passed."""
        self._touched = True
        self._queue.disown()

    def swap(self, device: BlockDevice, standby_errnos: Collection[int] | None = None) -> None:
        """Put `device` in the place of the old one; only while recovering.

        `standby_errnos`: those of its storage, None if they are the same.  Raises `ValueError` if
        it is smaller or its cluster size differs: the caller has to check.
        """
        if self._state is not GateState.RECOVERING:
            raise ValueError(f"{self.name}: swap while {self._state.value}")
        if device.size < self.size or device.cluster_size != self.cluster_size:
            raise ValueError(f"{self.name}: swap to a device of another geometry")
        self._device = self._queue.device = device
        self.lane.put_on(device)
        if standby_errnos is not None:
            self.set_standby_errnos(standby_errnos)
        self._touched = True

    def leave_standby(self) -> None:
        """Clear standby and release the parked requests in their original order.

        The last step of a replace, or an operator's order for a device in standby.  Raises
        `BusyError` if the device is active.
        """
        recovering = self._state is GateState.RECOVERING
        event = GateEvent.RECOVER if recovering else GateEvent.LEAVE
        if recovering:
            self._room.returned()  # while the gate is closed: it must not open before the release
        self._state = advance(self._state, event)
        self._cause = ""
        self._faulted = False
        if recovering:
            self._latch = None
        self.flags.clear_standby()
        kind = EventKind.RECOVERED if recovering else EventKind.STANDBY_LEFT
        self.report(kind, parked=self.parked_count)
        self._open()

    def fail_recovery(self, error: BaseException, *, untouched: bool = False) -> None:
        """The replace failed.

        The device goes (back) to standby, except when it was active before, `untouched` says that
        its storage is as it was, and nothing failed or hung meanwhile: then it goes on.
        """
        resume = untouched and self._began_active and not self._touched and not self._faulted
        self._state = advance(self._state, GateEvent.RESUME if resume else GateEvent.FAIL)
        text = str(error) or type(error).__name__
        self.report(EventKind.REPLACE_FAILED, error=text, state=self._state.value)
        if resume:
            self._open()
            return
        self._cause = self._cause or text
        if not self.flags.set_standby() and not self.flags.supported:
            self._queue.fail_parked(self._no_storage)

    def clear_latch(self) -> bool:
        """An operator says that the storage may be written again; True if it was latched."""
        if self._latch is None:
            return False
        self._latch = None
        self._rewire()
        self.report(EventKind.LATCH_CLEARED)
        return True

    # -- time and events -------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When `expire` has something to do next, on the gate's clock."""
        return self._queue.next_deadline()

    def expire(self, now: float) -> int:
        """Answer BUSY to requests that have waited for `park_max`; returns how many."""
        return self._queue.expire(now)

    def notify_parked(self, callback: Callable[[], None] | None) -> None:
        """Call `callback()` whenever `next_deadline` may be earlier than it was."""
        self._queue.notify_parked(callback)

    def report(self, kind: EventKind, **details: str | int | float) -> None:
        """Publish an event of this device."""
        self._on_event(Event(kind=kind, device=self.name, time=self._clock(), details=details))

    # -- admission -------------------------------------------------------------------------

    def _rewire(self) -> None:
        """Point the inline paths at the device or away from it."""
        through = self._state is GateState.ACTIVE and not self._queue.releasing
        writable = through and self._latch is None
        self._read_now: TryNow = self._device.try_read if through else _not_now
        self._view_now = views_of(self._device) if through and self._latch is None else no_view
        room = self._room
        watched = room.failure is not None
        write_now = room.try_write(self._device) if watched else self._device.try_write
        self._write_now: TryNow = write_now if writable else _not_now
        directly = writable and not watched
        self._write_view_now = write_views_of(self._device) if directly else no_view
        self.lane.reads, self.lane.writes = through, directly

    def _admit(
        self,
        op: Op,
        offset: int,
        length: int,
        buffer: memoryview | None,
        done: Done,
        *,
        fua: bool = False,
        unmap: bool = False,
    ) -> Request:
        queue = self._queue
        queue.sequence = sequence = queue.sequence + 1
        request = Request(
            queue, sequence, op, offset, length, buffer, done, fua, unmap, self._clock()
        )
        if self.lane.writes and not (self._busy.count and request.changes):
            queue.start(request)
        else:
            self._admit_slowly(request)
        return request

    def _admit_slowly(self, request: Request) -> None:
        """Admission while the gate is not simply open."""
        if self._room.failure is not None:
            self._room.watch(self._device, request)
        refusal = self.refusal(request)
        if refusal is not None:
            self._queue.end(request, refusal)
        elif self._state is not GateState.ACTIVE:
            self._queue.park(request)
        elif self._queue.releasing:
            self._queue.line_up(request)
        elif request.changes and self._busy.overlaps(request.offset, request.length):
            self._queue.serialise(request)
            self._rewire()
        else:
            self._queue.start(request)

    def refusal(self, request: Request) -> StorageError | None:
        """Why `request` can be neither executed nor parked, if there is a reason."""
        if self._latch is not None and request.changes:
            return self._read_only(request)
        if self._state is GateState.STANDBY and not self.flags.supported:
            return self._no_storage(request)
        return None

    def no_room(self, request: Request, error: StorageError) -> None:
        """See `Room`."""
        self._room.exhausted(request, error)

    def released(self, *, announce: bool) -> None:
        """The queue has started the last waiting request: the inline path opens again."""
        self._rewire()
        if announce:
            self.report(EventKind.RELEASED, executing=self.executing_count)

    def _open(self) -> None:
        self._queue.release()
        self._rewire()

    # -- judgement -------------------------------------------------------------------------

    def judge(self, error: StorageError) -> bool:
        """An operation failed.  True: the device is in standby, park the request.  False: its
        caller gets the error, and the device may have been latched read-only.

        What comes after a standby errno, from what was in execution, is the same failure: clients
        of network storage answer EBADFD or ESTALE then, a local file system that has shut down
        EROFS.
        """
        same = self._faulted and error.errno not in NO_ROOM
        if not (same or error.errno in self._errnos) or not self.flags.supported:
            self._consider_latch(error)
            return False
        details: dict[str, str | int | float] = {
            "errno": errno.errorcode.get(error.errno, str(error.errno)),
            "op": error.op,
        }
        if error.path is not None:
            details["path"] = error.path
        if error.offset is not None:
            details["offset"] = error.offset
        self._stop(GateEvent.FAULT, str(error), details)
        return True

    def _stop(self, event: GateEvent, cause: str, details: dict[str, str | int | float]) -> None:
        """Into standby; only the first of several faults is an event."""
        self._state = advance(self._state, event)
        self._faulted = self._faulted or event is GateEvent.FAULT
        if not self.flags.set_standby():
            return
        self._cause = cause
        self._queue.begin_episode()
        self._rewire()
        self.report(EventKind.STANDBY_ENTERED, **details, executing=self.executing_count)

    def _consider_latch(self, error: StorageError) -> None:
        """A failure that standby does not cover makes the device read-only (vz7's ABORT)."""
        if self._latch is None and error.errno not in HARMLESS_ERRNOS:
            self._latch = error
            self._rewire()
            self.report(EventKind.LATCHED, error=str(error))

    def _read_only(self, request: Request) -> StorageError:
        why = f"{self.name} is read-only after a storage failure ({self._latch})"
        return StorageError(errno.EROFS, request.op.value, offset=request.offset, message=why)

    def _no_storage(self, request: Request) -> StorageError:
        why = f"{self.name} has no working storage ({self._cause})"
        return StorageError(errno.EIO, request.op.value, offset=request.offset, message=why)

    def _fuse_changed(self, state: StandbyState) -> None:
        """A fuse was put in or taken out."""
        if self._state is not GateState.STANDBY:
            return
        if state is StandbyState.NOT_SUPPORTED:
            self._queue.fail_parked(self._no_storage)
        else:
            self.flags.set_standby()
