"""A block device in memory with scripted faults and completions, for the tests of the layers above.

    device = MemoryDevice(1 << 20, completion=Completion.MANUAL)
    device.fail("write", errno.EIO, times=1)          # the next write fails
    device.read(0, view, done)                        # waits …
    device.complete()                                 # … until told

`device.log` lists what was executed, in order of execution, as `Executed` rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

from ploopd.errors import StorageError
from ploopd.storage.device import Done, Extent, ExtentKind


class Completion(Enum):
    """When a slow operation is executed and its `done` called."""

    AT_ONCE = auto()  # before the method returns
    ON_KICK = auto()  # inside kick()
    MANUAL = auto()  # by complete()


@dataclass(frozen=True, slots=True)
class Executed:
    """One operation that reached the device; `error` is its errno or 0; `inline` = a try_* call."""

    op: str
    offset: int
    length: int
    error: int = 0
    fua: bool = False
    unmap: bool = False
    inline: bool = False


@dataclass(slots=True)
class Fault:
    """Fails `op` (any when None) touching [start, end) with `errno`, `times` times (None: always).

    `applied`: the operation takes effect although it reports an error (a failed write may have
    happened).  `inline`: try_* calls fail as well; otherwise only the slow form does.
    """

    op: str | None
    errno: int
    start: int = 0
    end: int | None = None
    times: int | None = 1
    applied: bool = False
    inline: bool = True

    def matches(self, op: str, offset: int, length: int, inline: bool) -> bool:
        if self.op not in (None, op) or (inline and not self.inline) or self.times == 0:
            return False
        return op == "flush" or (
            offset + length > self.start and (self.end is None or offset < self.end)
        )


class Operation:
    """A slow operation under way; implements `Pending`."""

    __slots__ = ("buffer", "device", "done", "fua", "length", "offset", "op", "state", "unmap")

    def __init__(
        self,
        device: MemoryDevice,
        op: str,
        offset: int,
        length: int,
        buffer: memoryview | None,
        done: Done,
        fua: bool,
        unmap: bool,
    ) -> None:
        self.device = device
        self.op = op
        self.offset = offset
        self.length = length
        self.buffer = buffer
        self.done = done
        self.fua = fua
        self.unmap = unmap
        self.state = "queued"

    def cancel(self) -> bool:
        if self.state != "queued" or not self.device.cancellable:
            return False
        self.state = "cancelled"
        self.device.outstanding.remove(self)
        return True


@dataclass(eq=False)
class MemoryDevice:
    """A BlockDevice over a bytearray.

    `inline`: try_* succeed (False: they say False and do nothing).  `cancellable`: operations that
    wait for their completion may be cancelled.  `thin`: unwritten and discarded clusters are holes.
    """

    size: int
    cluster_size: int = 1 << 20
    read_only: bool = False
    completion: Completion = Completion.AT_ONCE
    inline: bool = True
    cancellable: bool = False
    thin: bool = True
    data: bytearray = field(default_factory=bytearray)
    faults: list[Fault] = field(default_factory=list)
    log: list[Executed] = field(default_factory=list)
    outstanding: list[Operation] = field(default_factory=list)
    allocated: set[int] = field(default_factory=set)
    kicks: int = 0
    on_execute: Callable[[Executed], None] | None = None

    def __post_init__(self) -> None:
        if not self.data:
            self.data = bytearray(self.size)
        elif self.data.strip(b"\0"):
            self.allocated.update(range(-(-self.size // self.cluster_size)))

    # -- scripting -------------------------------------------------------------------------

    def fail(
        self,
        op: str | None,
        errno: int,
        *,
        start: int = 0,
        end: int | None = None,
        times: int | None = 1,
        applied: bool = False,
        inline: bool = True,
    ) -> Fault:
        """Add a fault; the first that matches wins.  `op`: "read", "write", "write_zeroes",
        "discard", "flush" or None for all."""
        fault = Fault(op, errno, start, end, times, applied, inline)
        self.faults.append(fault)
        return fault

    def heal(self) -> None:
        """Forget all faults."""
        self.faults.clear()

    def complete(self, count: int | None = None, *, index: int = 0) -> int:
        """Execute `count` (all when None) outstanding operations, beginning with number `index`;
        returns how many were."""
        finished = 0
        while len(self.outstanding) > index and (count is None or finished < count):
            operation = self.outstanding.pop(index)
            operation.state = "ended"
            operation.done(self._execute_slow(operation))
            finished += 1
        return finished

    # -- the block device ------------------------------------------------------------------

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        if not self.inline:
            return False
        self._raise(self._run("read", offset, len(buffer), buffer, inline=True))
        return True

    def try_write(self, offset: int, buffer: memoryview) -> bool:
        if not self.inline or self.read_only:
            return False
        self._raise(self._run("write", offset, len(buffer), buffer, inline=True))
        return True

    def read(self, offset: int, buffer: memoryview, done: Done) -> Operation:
        return self._start("read", offset, len(buffer), buffer, done)

    def write(self, offset: int, buffer: memoryview, done: Done, *, fua: bool = False) -> Operation:
        return self._start("write", offset, len(buffer), buffer, done, fua=fua)

    def write_zeroes(
        self, offset: int, length: int, done: Done, *, unmap: bool = False, fua: bool = False
    ) -> Operation:
        return self._start("write_zeroes", offset, length, None, done, fua=fua, unmap=unmap)

    def discard(self, offset: int, length: int, done: Done) -> Operation:
        return self._start("discard", offset, length, None, done)

    def flush(self, done: Done) -> Operation:
        return self._start("flush", 0, 0, None, done)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        position, end = offset, offset + length
        while position < end:
            kind = self._kind(position)
            stop = position
            while stop < end and self._kind(stop) is kind:
                stop = min(end, (stop // self.cluster_size + 1) * self.cluster_size)
            depth = None if kind is ExtentKind.HOLE else 0
            yield Extent(offset=position, length=stop - position, kind=kind, depth=depth)
            position = stop

    def kick(self) -> None:
        self.kicks += 1
        if self.completion is Completion.ON_KICK:
            self.complete(len(self.outstanding))

    # -- inside ----------------------------------------------------------------------------

    def _kind(self, position: int) -> ExtentKind:
        known = not self.thin or position // self.cluster_size in self.allocated
        return ExtentKind.DATA if known else ExtentKind.HOLE

    def _start(
        self,
        op: str,
        offset: int,
        length: int,
        buffer: memoryview | None,
        done: Done,
        *,
        fua: bool = False,
        unmap: bool = False,
    ) -> Operation:
        assert 0 <= offset <= offset + length <= self.size, (op, offset, length)
        operation = Operation(self, op, offset, length, buffer, done, fua, unmap)
        self.outstanding.append(operation)
        if self.completion is Completion.AT_ONCE:
            self.complete(1, index=len(self.outstanding) - 1)
        return operation

    def _execute_slow(self, operation: Operation) -> StorageError | None:
        return self._run(
            operation.op,
            operation.offset,
            operation.length,
            operation.buffer,
            fua=operation.fua,
            unmap=operation.unmap,
        )

    @staticmethod
    def _raise(error: StorageError | None) -> None:
        if error is not None:
            raise error

    def _run(
        self,
        op: str,
        offset: int,
        length: int,
        buffer: memoryview | None,
        *,
        inline: bool = False,
        fua: bool = False,
        unmap: bool = False,
    ) -> StorageError | None:
        fault = next((f for f in self.faults if f.matches(op, offset, length, inline)), None)
        error = 0
        if fault is not None:
            error = fault.errno
            if fault.times is not None:
                fault.times -= 1
        if fault is None or fault.applied:
            self._apply(op, offset, length, buffer, unmap)
        row = Executed(op, offset, length, error, fua, unmap, inline)
        self.log.append(row)
        if self.on_execute is not None:
            self.on_execute(row)
        return StorageError(error, op, path="memory", offset=offset) if error else None

    def _apply(
        self, op: str, offset: int, length: int, buffer: memoryview | None, unmap: bool
    ) -> None:
        end = offset + length
        clusters = range(offset // self.cluster_size, -(-end // self.cluster_size))
        if op == "read":
            assert buffer is not None
            buffer[:] = self.data[offset:end]
        elif op == "write":
            assert buffer is not None
            self.data[offset:end] = buffer
            self.allocated.update(clusters)
        elif op in ("write_zeroes", "discard"):
            self.data[offset:end] = bytes(length)
            if op == "discard" or unmap:
                whole = range(-(-offset // self.cluster_size), end // self.cluster_size)
                self.allocated.difference_update(whole)
            else:
                self.allocated.update(clusters)


def pattern(length: int, seed: int) -> bytes:
    """Bytes that differ from sector to sector and from seed to seed."""
    sectors = -(-length // 512)
    block = b"".join(
        (seed.to_bytes(8, "little") + i.to_bytes(8, "little")) * 32 for i in range(sectors)
    )
    return block[:length]
