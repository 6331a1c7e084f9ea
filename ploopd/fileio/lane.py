"""The lane: reads and writes that are one object from the front end to the ring.

A `LaneOperation` is an ordinary operation whose objects have not been made: while all goes well it
goes into the ring and comes back with one call for each layer.  Whenever somebody wants to see it
(it failed, the storage is drained, a task is aborted, the file is given up) it is *adopted*: each
layer makes what it would have had, had the operation gone the ordinary way from the start, and
`File.adopt` puts a `Transfer` in its place in the ring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from mypy_extensions import mypyc_attr

from ploopd.fileio.backends import EngineBackend
from ploopd.fileio.buffers import Buffer
from ploopd.fileio.ring_engine import RingEngine

if TYPE_CHECKING:
    from ploopd.fileio.operation_queue import OperationQueue
    from ploopd.fileio.operations import Transfer

MOST_OPERATIONS: Final = 64
"""Operations of one file in the lane at a time; what comes beyond goes the ordinary way."""

MOST_BYTES: Final = 8 << 20
"""Bytes of them."""


@mypyc_attr(allow_interpreted_subclasses=True)
class LaneOperation:
    """A read into, or a write from, all of `buffer`, whose memory the kernel uses directly.

    Whoever makes it sets `buffer`, `length` (of the buffer) and `writing`; `host`, `tag` and `file`
    are set when it has begun.
    """

    __slots__ = ("buffer", "file", "host", "length", "tag", "writing")

    buffer: Buffer
    length: int
    writing: bool
    host: int
    tag: int
    file: FileLane

    def completed(self) -> None:
        """It has succeeded, with all its bytes.  Called once, unless it was adopted."""
        raise NotImplementedError

    def promote(self) -> None:
        """Have it adopted by every layer, from the top; its `buffer` is not the lane's any more."""
        raise NotImplementedError


class FileLane:
    """The lane of one file that the engine executes by io_uring.

    `running` operations with `size` bytes are in it.
    """

    __slots__ = ("_backend", "_begin", "_engine", "closed", "running", "size")

    def __init__(self, engine: RingEngine, backend: EngineBackend) -> None:
        self._engine = engine
        self._begin = engine.begin
        self._backend = backend
        self.running = 0
        self.size = 0
        self.closed = False

    def begin(self, operation: LaneOperation, host: int) -> bool:
        """Queue `operation` at byte `host` of the file; False: it must go the ordinary way."""
        length = operation.length
        if self.running >= MOST_OPERATIONS or self.size + length > MOST_BYTES or self.closed:
            return False
        operation.host = host
        operation.file = self
        if not self._begin(operation, self._backend.descriptor(host, length)):
            return False
        self.running += 1
        self.size += length
        return True

    def left(self, operation: LaneOperation) -> None:
        """`operation` is not in the lane any more."""
        self.running -= 1
        self.size -= operation.length

    def adopt(self, operation: LaneOperation, queue: OperationQueue, transfer: Transfer) -> None:
        """Put `transfer` in the place of `operation`."""
        self.left(operation)
        queue.adopt(transfer)
        fd = self._backend.descriptor(operation.host, operation.length)
        self._engine.adopt(operation, fd, transfer.complete)

    def operations(self) -> Iterator[LaneOperation]:
        """Those in the lane; they may be promoted meanwhile."""
        for each in self._engine.lane_operations():
            if each.file is self:
                yield each

    def close(self) -> None:
        """Have everything adopted, take nothing more."""
        self.closed = True
        for operation in self.operations():
            operation.promote()


Begin = Callable[[LaneOperation, int], bool]


def no_lane(operation: LaneOperation, host: int) -> bool:
    """The lane of a file that has none."""
    return False
