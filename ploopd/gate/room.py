"""Whether the storage has room: said once when it has none, and once when it has some again.

A storage without room is no standby and no latch: writes that need room fail with it, all others go
on.  What shows that there is room again is the success of what had failed: a write to the same
range, a write that needs a new cluster, or a flush if it was a flush that had failed.  Nothing is
looked at while there is room.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ploopd.errors import StorageError
from ploopd.gate.events import EventKind
from ploopd.gate.parking import Op, Request
from ploopd.storage.device import BlockDevice


class Report(Protocol):
    """Publishes an event."""

    def __call__(self, kind: EventKind, **details: str | int | float) -> None: ...


class Room:
    """The room of one device; `changed()` is called when `failure` has become something or None.

    `failure`: the last error of a storage that has no room; None while it has some.
    """

    __slots__ = ("_changed", "_failed", "_report", "failure")

    def __init__(self, report: Report, changed: Callable[[], None]) -> None:
        self.failure: StorageError | None = None
        self._failed: tuple[Op, int, int] = (Op.WRITE, 0, 0)
        self._report = report
        self._changed = changed

    def exhausted(self, request: Request, error: StorageError) -> None:
        """`request` has failed for want of room."""
        first = self.failure is None
        self.failure = error
        self._failed = (request.op, request.offset, request.length)
        if first:
            self._report(EventKind.SPACE_EXHAUSTED, op=request.op.value, error=str(error))
            self._changed()

    def returned(self) -> None:
        """There is room again, or another storage."""
        if self.failure is not None:
            self.failure = None
            self._report(EventKind.SPACE_RETURNED)
            self._changed()

    def watch(self, device: BlockDevice, request: Request) -> None:
        """Look at how `request` ends, if that says anything."""
        if not self._proves(device, request.op, request.offset, request.length, fua=request.fua):
            return
        done = request.done

        def ended(error: StorageError | None) -> None:
            if error is None:
                self.returned()
            done(error)

        request.done = ended

    def try_write(self, device: BlockDevice) -> Callable[[int, memoryview], bool]:
        """The device's own, watched."""

        def attempt(offset: int, buffer: memoryview) -> bool:
            proof = self._proves(device, Op.WRITE, offset, len(buffer))
            written = device.try_write(offset, buffer)
            if written and proof:
                self.returned()
            return written

        return attempt

    def _proves(
        self, device: BlockDevice, op: Op, offset: int, length: int, *, fua: bool = False
    ) -> bool:
        """Whether this success would show that there is room."""
        failed, start, size = self._failed
        if failed is Op.FLUSH:
            return op is Op.FLUSH or fua
        if op is failed and offset < start + size and start < offset + length:
            return True
        return op is Op.WRITE and any(each.depth != 0 for each in device.extents(offset, length))
