"""The lane at the block device seam: plain reads and writes that are one object in every layer.

`BlockDevice` has the ordinary way; a device with a `lane`, too, takes a READ or WRITE that is one
piece of one file without an object of its own (`ploopd.fileio.lane`).
"""

from __future__ import annotations

from typing import Protocol

from mypy_extensions import mypyc_attr

from ploopd.fileio.lane import LaneOperation
from ploopd.storage.device import BlockDevice, Done, Pending


@mypyc_attr(allow_interpreted_subclasses=True)
class LaneRequest(LaneOperation):
    """A read or write of `length` bytes at byte `offset` of the disk.

    Its maker sets `offset`; the volume sets `cluster`, the gate `sequence` and `admitted_at`.
    """

    __slots__ = ("admitted_at", "cluster", "offset", "sequence")

    offset: int
    cluster: int
    sequence: int
    admitted_at: float


class Lane(Protocol):
    """The lane of a block device; its length is the number of requests in it.

    `usable`: `begin` may say True.  `first`: there is no use in trying `try_read` or `try_write`
    before that.
    """

    @property
    def usable(self) -> bool: ...

    @property
    def first(self) -> bool: ...

    def begin(self, request: LaneRequest) -> bool:
        """Queue `request`, to be begun with the next `kick`, or say False: then use `read` or
        `write`.  It ends in one call of `request.completed()`, unless it is adopted."""
        ...

    def ended(self, request: LaneRequest) -> None:
        """`request` has succeeded; called by its `completed`."""
        ...

    def adopt(self, request: LaneRequest, buffer: memoryview, done: Done) -> Pending:
        """Make an ordinary read into, or write from, `buffer` of one that is in the lane; called by
        its `promote`."""
        ...

    def empty(self) -> None:
        """Promote everything in the lane."""
        ...

    def __len__(self) -> int: ...


class NoLane:
    """The lane of a device that has none."""

    __slots__ = ()

    usable = False
    first = False

    def begin(self, request: LaneRequest) -> bool:
        return False

    def ended(self, request: LaneRequest) -> None:
        raise AssertionError("nothing has begun")

    def adopt(self, request: LaneRequest, buffer: memoryview, done: Done) -> Pending:
        raise AssertionError("nothing has begun")

    def empty(self) -> None:
        """It is."""

    def __len__(self) -> int:
        return 0


def lane_of(device: BlockDevice) -> Lane:
    """The lane of a device, a closed one if it has none."""
    lane: Lane | None = getattr(device, "lane", None)
    return NoLane() if lane is None else lane
