"""The block device seam: what the gate offers to SCSI and what storage offers to the gate.

The same interface above and below the gate, so that gate, statistics and fault injection are
interchangeable pieces.  There are two ways to do each data operation:

* `try_read` / `try_write` complete **now**, by plain calls, or say False and have done nothing that
  the slow form would not do again.  They are the data path: no task, no await, no thread.
* `read`, `write`, `write_zeroes`, `discard`, `flush` always end in one call of `done`.

Offsets and lengths are bytes and multiples of 512; they lie inside the device (SCSI has checked).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, runtime_checkable

from ploopd.errors import StorageError
from ploopd.fileio.view import TryView, no_view

Done = Callable[[StorageError | None], None]
"""A completion: called exactly once, from the event loop's thread, with None for success.

It may be called before the method that took it returns.  It never raises.
"""


class Pending(Protocol):
    """A request under way."""

    def cancel(self) -> bool:
        """Drop the request if it has not begun: True means that `done` is never called for it and
        that nothing of it reaches the image from now on.  False means that it is being executed
        (or has ended) and that `done` has been or will be called."""
        ...


class ExtentKind(Enum):
    """What is known of a range without reading it."""

    DATA = "data"
    ZERO_ALLOCATED = "zero"
    HOLE = "hole"


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A run of bytes of the virtual disk.

    `offset`, `length`: bytes of the virtual disk.  `depth`: 0 for the top delta, 1 for the one
    below, … ; None for a hole.  `path`, `host_offset`: where the bytes are, None for a hole.
    """

    offset: int
    length: int
    kind: ExtentKind
    depth: int | None = None
    path: str | None = None
    host_offset: int | None = None


class BlockDevice(Protocol):
    """A virtual disk.  Every operation is named here: a layer that forgets one does not compile."""

    @property
    def size(self) -> int:
        """Bytes, a multiple of 512."""
        ...

    @property
    def cluster_size(self) -> int:
        """Bytes: the unit of allocation and the best granularity of discards."""
        ...

    @property
    def read_only(self) -> bool: ...

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` now and return True, or return False: then use `read`.

        Raises `StorageError` when the storage answered with an error that the command must report.
        """
        ...

    def try_write(self, offset: int, buffer: memoryview) -> bool:
        """Write all of `buffer` now (no FUA) and return True, or return False: then use `write`."""
        ...

    def read(self, offset: int, buffer: memoryview, done: Done) -> Pending:
        """Fill `buffer`, which belongs to the device until `done` or a successful cancel."""
        ...

    def write(self, offset: int, buffer: memoryview, done: Done, *, fua: bool = False) -> Pending:
        """Write `buffer`; with `fua` it is on stable storage, with its BAT entry, before `done`."""
        ...

    def write_zeroes(
        self, offset: int, length: int, done: Done, *, unmap: bool = False, fua: bool = False
    ) -> Pending:
        """Make the range read as zeros; `unmap` allows to give its clusters back."""
        ...

    def discard(self, offset: int, length: int, done: Done) -> Pending:
        """The range is not needed any more; it reads as zeros afterwards (LBPRZ = 1)."""
        ...

    def flush(self, done: Done) -> Pending:
        """All writes completed before this call are on stable storage before `done`.

        After a sync of the storage has failed no flush succeeds any more: the kernel may have
        marked pages clean that were never written, and would call the next sync a success.
        (`JournaledDevice` has them, and writes them again when it was only room that was missing.)
        """
        ...

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The map of a range, from memory: ascending, without gaps, neighbours merged."""
        ...

    def kick(self) -> None:
        """Hand everything started since the last kick to the kernel; called once per batch."""
        ...


@runtime_checkable
class HasViews(Protocol):
    """A block device that may have some of its bytes in memory."""

    def try_view(self, offset: int, length: int) -> memoryview | None:
        """The bytes as they are now, for one system call in this turn of the event loop, or None:
        then use `try_read`.  See `FileView.try_view` for what must not be done with them."""
        ...


@runtime_checkable
class HasWriteViews(Protocol):
    """A block device that may have some of its bytes in memory to be written to."""

    def try_write_view(self, offset: int, length: int) -> memoryview | None:
        """Where the bytes are, for one system call in this turn of the event loop that writes
        them, or None: then use `try_write`.  See `FileView.try_view`."""
        ...


def views_of(device: BlockDevice) -> TryView:
    """The `try_view` of a device, one that says None if it has none."""
    return device.try_view if isinstance(device, HasViews) else no_view


def write_views_of(device: BlockDevice) -> TryView:
    """The `try_write_view` of a device, one that says None if it has none."""
    return device.try_write_view if isinstance(device, HasWriteViews) else no_view
