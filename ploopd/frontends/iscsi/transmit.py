"""What goes out on one connection: the output arena, the queue behind it, and the numbering.

Most answers are built in one *arena* and leave with one `send`.  Data that already lies in a buffer
of its own is queued as a view between pieces of the arena and given back when it has been sent.
The arena starts over whenever everything is sent, so it stays in the processor's cache.

What lies in the page cache is queued where it is (`put_view`).  It must be sent before anything
else is executed, or copied (`keep_views`): nobody else may wait between the two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Final

from ploopd.fileio.buffers import BufferPool
from ploopd.frontends.iscsi.digest import data_digest, digest
from ploopd.frontends.iscsi.pdu import (
    BHS_LENGTH,
    RESPONSE,
    SERIAL_MASK,
    Opcode,
    padded,
)

COPY_LIMIT: Final = 16 * 1024
"""Data up to this length is copied into the arena: cheaper than another entry of an I/O vector."""
MAX_SEGMENTS: Final = 64
_PADDING: Final = (b"", b"\0\0\0", b"\0\0", b"\0")

BLOCK: Final = 512

Release = Callable[[], None]
Read = Callable[[int, memoryview], bool]
"""`read(offset, buffer)`: fill `buffer` from byte `offset` of the disk; False if that cannot be."""
Origin = tuple[Read, int]
"""Where a view can be read again: up to that byte of the disk."""


class Transmitter:
    """See the module's docstring.

    `arena[start:op]` is what was written and not yet cut off into the queue.  The fast path writes
    there itself; everybody else uses `emit` and `emit_data`.  `exp_cmd_sn` and `max_cmd_sn` are the
    command window (of the session, which has one connection), `stat_sn` the next StatSN.  `viewed`
    is about how many bytes of views wait to be sent, `congested` whether the kernel took less than
    all of the output: then there must be no more of them.
    """

    __slots__ = (
        "_queue",
        "_queued",
        "arena",
        "congested",
        "data_digest",
        "exp_cmd_sn",
        "header_digest",
        "max_cmd_sn",
        "op",
        "progress",
        "size",
        "start",
        "stat_sn",
        "viewed",
    )

    def __init__(self, arena_size: int) -> None:
        self.arena = memoryview(bytearray(arena_size))
        self.size = arena_size
        self.start = 0
        self.op = 0
        self.stat_sn = 1
        self.exp_cmd_sn = 0
        self.max_cmd_sn = 0
        self.header_digest = False
        self.data_digest = False
        self.progress = 0
        self.viewed = 0
        self.congested = False
        self._queue: deque[tuple[memoryview, Release | None, Origin | None]] = deque()
        self._queued = 0

    @property
    def pending(self) -> int:
        """Bytes that wait to be sent."""
        return self._queued + self.op - self.start

    def grow(self, arena_size: int) -> None:
        """A larger arena from now on; what waits in the old one is sent first."""
        self._cut()
        self.arena = memoryview(bytearray(arena_size))
        self.size = arena_size
        self.start = self.op = 0

    # -- what the socket does

    def data_to_send(self) -> list[memoryview]:
        """The next pieces, in order; empty when there is nothing."""
        if not self._queue:
            return [self.arena[self.start : self.op]] if self.op > self.start else []
        pieces = [view for view, _, _ in islice(self._queue, MAX_SEGMENTS)]
        if self.op > self.start and len(pieces) == len(self._queue):
            pieces.append(self.arena[self.start : self.op])
        return pieces

    def sent(self, count: int) -> bool:
        """`count` bytes of `data_to_send()` are in the kernel; True if that was everything."""
        self.progress += count
        queue = self._queue
        if count == self.pending:
            return self._all_sent()
        while count and queue:
            view, release, origin = queue[0]
            length = len(view)
            if count < length:
                queue[0] = (view[count:], release, origin)
                self._queued -= count
                return False
            count -= length
            self._queued -= length
            queue.popleft()
            if release is not None:
                release()
        self.start += count
        return False

    def _all_sent(self) -> bool:
        """Begin again with an empty arena; False if a release has brought more output."""
        done = self._queue
        self._queued = self.start = self.op = self.viewed = 0
        self.congested = False
        if done:
            self._queue = deque()
            for _, release, _ in done:
                if release is not None:
                    release()
        return self.pending == 0

    def keep_views(self, buffers: BufferPool) -> bool:
        """The kernel does not take the rest now: copy what is left of the views into memory that
        nobody changes.  False if some of it cannot be read."""
        self.congested = True
        self.viewed = 0
        queue = self._queue
        for index, (view, _, origin) in enumerate(queue):
            if origin is None:
                continue
            read, end = origin
            start = end - len(view)
            first = start - start % BLOCK
            buffer = buffers.take(end - first)
            queue[index] = (buffer.view[start - first :], buffer.release, None)
            if not read(first, buffer.view):
                return False
        return True

    def discard(self) -> None:
        """The connection is gone: give every queued buffer back."""
        while self._queue:
            _, release, _ = self._queue.popleft()
            if release is not None:
                release()
        self._queued = self.viewed = 0
        self.start = self.op = 0

    # -- PDUs

    def next_stat_sn(self) -> int:
        """Consume a StatSN."""
        number = self.stat_sn
        self.stat_sn = (number + 1) & SERIAL_MASK
        return number

    def emit(
        self,
        opcode: int,
        flags: int,
        *,
        byte2: int = 0,
        byte3: int = 0,
        lun: int = 0,
        tag: int,
        word20: int = 0xFFFFFFFF,
        word36: int = 0,
        word40: int = 0,
        word44: int = 0,
        data: bytes | memoryview = b"",
        status: bool = True,
    ) -> None:
        """Queue one PDU.  `status`: it consumes a StatSN."""
        length = len(data)
        header = RESPONSE.pack(
            opcode,
            flags,
            byte2,
            byte3,
            length,
            lun,
            tag,
            word20,
            self.next_stat_sn() if status else self.stat_sn,
            self.exp_cmd_sn,
            self.max_cmd_sn,
            word36,
            word40,
            word44,
        )
        self._append_header(header)
        if length:
            self._append(data)
            self._append_tail(data)

    def emit_data_in(
        self,
        *,
        flags: int,
        status: int,
        tag: int,
        data_sn: int,
        offset: int,
        residual: int,
        data: memoryview,
        release: Release | None,
    ) -> None:
        """Queue one SCSI Data-In.  `release` is called when `data` has been sent or copied."""
        has_status = bool(flags & 1)
        header = RESPONSE.pack(
            Opcode.DATA_IN,
            flags,
            0,
            status,
            len(data),
            0,
            tag,
            0xFFFFFFFF,
            self.next_stat_sn() if has_status else 0,
            self.exp_cmd_sn,
            self.max_cmd_sn,
            data_sn,
            offset,
            residual,
        )
        self._append_header(header)
        if not data:
            if release is not None:
                release()
            return
        if len(data) <= COPY_LIMIT and self.op + len(data) <= self.size:
            self._append(data)
            self._append_tail(data)
            if release is not None:
                release()
            return
        tail = self._tail_of(data)
        self._cut()
        self._queue.append((data, release, None))
        self._queued += len(data)
        if tail:
            self._append(tail)

    def put_view(self, view: memoryview, read: Read, end: int) -> None:
        """Queue `view`, bytes of the page cache up to byte `end` of the disk that `read` reads."""
        self._cut()
        self._queue.append((view, None, (read, end)))
        self._queued += len(view)
        self.viewed += len(view)

    def put_data_in(
        self, flags: int, status: int, tag: int, residual: int, data: memoryview
    ) -> bool:
        """Copy a whole answer, one Data-In with its status, into the arena.

        False, and nothing done, if it is not as simple as that.  This is what most commands that
        had to wait for the storage end with.
        """
        length, op = len(data), self.op
        end = op + BHS_LENGTH + length
        if length & 3 or length > COPY_LIMIT or end > self.size:
            return False
        if self.header_digest or self.data_digest:
            return False
        stat_sn = self.stat_sn
        RESPONSE.pack_into(
            self.arena,
            op,
            Opcode.DATA_IN,
            flags,
            0,
            status,
            length,
            0,
            tag,
            0xFFFFFFFF,
            stat_sn,
            self.exp_cmd_sn,
            self.max_cmd_sn,
            0,
            0,
            residual,
        )
        self.arena[op + BHS_LENGTH : end] = data
        self.stat_sn = (stat_sn + 1) & SERIAL_MASK
        self.op = end
        return True

    def _append_header(self, header: bytes) -> None:
        self._append(header)
        if self.header_digest:
            self._append(digest(header))

    def _append(self, data: bytes | memoryview) -> None:
        op = self.op
        end = op + len(data)
        if end <= self.size:
            self.arena[op:end] = data
            self.op = end
            return
        self._cut()
        self._queue.append((memoryview(bytes(data)), None, None))
        self._queued += len(data)

    def _append_tail(self, data: bytes | memoryview) -> None:
        tail = self._tail_of(data)
        if tail:
            self._append(tail)

    def _tail_of(self, data: bytes | memoryview) -> bytes:
        padding = _PADDING[len(data) & 3]
        return padding + data_digest(data) if self.data_digest else padding

    def _cut(self) -> None:
        """Put what the arena holds behind the queue, so that something else can follow it."""
        if self.op > self.start:
            self._queue.append((self.arena[self.start : self.op], None, None))
            self._queued += self.op - self.start
            self.start = self.op


def data_in_space(length: int, segment: int) -> int:
    """Arena bytes that a read of `length` takes as Data-In PDUs of at most `segment` bytes."""
    count = -(-length // segment)
    return count * BHS_LENGTH + padded(length)
