"""One operation of a file from its start to its completion.

An operation owns the memory that the kernel sees (`buffers`), continues short transfers, repeats
what was interrupted, and ends in one call of `done` – unless it was disowned: then its late result
is void and only frees what it holds.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from ploopd.errors import StorageError
from ploopd.fileio.buffers import Buffer
from ploopd.fileio.completions import Callback

if TYPE_CHECKING:
    from ploopd.fileio.operation_queue import OperationQueue

_AGAIN: Final = (-errno.EINTR, -errno.EAGAIN)
_MOST_REPEATS: Final = 100

Done = Callable[[StorageError | None], None]
"""A completion: called once, from the loop's thread, with None for success.  Never raises."""

Fallback = Callable[[int, int, Callback], None]


class Operation(Protocol):
    """What an `OperationQueue` begins: `length` bytes long, `done` None once it is disowned."""

    done: Done | None
    length: int

    def begin(self) -> None: ...


class Transfer:
    """A read or a write."""

    __slots__ = (
        "_at",
        "_bounce",
        "_buffer",
        "_offset",
        "_queue",
        "_reading",
        "_repeats",
        "done",
        "length",
    )

    def __init__(
        self,
        queue: OperationQueue,
        buffer: memoryview,
        offset: int,
        done: Done | None,
        *,
        reading: bool,
    ) -> None:
        self._queue = queue
        self._buffer = buffer
        self._offset = offset
        self._reading = reading
        self._at = 0
        self._repeats = 0
        self._bounce: Buffer | None = None
        self.done = done
        self.length = len(buffer)

    def continue_with(self, bounce: Buffer) -> None:
        """It has begun already: the kernel works on `bounce`, `complete` will be called."""
        self._bounce = bounce

    def begin(self) -> None:
        if not self.length:
            self._queue.finish(self, None)
            return
        bounce = self._bounce = self._queue.buffers.take(self.length)
        if not self._reading:
            bounce.view[:] = self._buffer
        self._issue(bounce)

    def _issue(self, bounce: Buffer) -> None:
        backend = self._queue.backend
        if self._reading:
            backend.read(bounce, self._at, self._offset, self.complete)
        else:
            backend.write(bounce, self._at, self._offset, self.complete)

    def complete(self, result: int) -> None:
        """What the engine answers."""
        bounce = self._bounce
        assert bounce is not None
        if self._at + result == self.length:
            if self._reading and self.done is not None:
                self._buffer[:] = bounce.view
            self._end(None)
        elif self.done is None:
            self._end(None)
        elif result > 0:
            self._at += result
            self._issue(bounce)
        elif result in _AGAIN and self._repeats < _MOST_REPEATS:
            self._repeats += 1
            self._issue(bounce)
        else:
            self._end(self._error(result))

    def _error(self, result: int) -> StorageError:
        op = "read" if self._reading else "write"
        offset = self._offset + self._at
        if result == 0:
            missing = self.length - self._at
            text = f"short {op}: {missing} of {self.length} bytes are missing"
            return StorageError(errno.EIO, op, path=self._queue.path, offset=offset, message=text)
        return StorageError(-result, op, path=self._queue.path, offset=offset)

    def _end(self, error: StorageError | None) -> None:
        bounce, self._bounce = self._bounce, None
        if bounce is not None:
            bounce.release()
        self._queue.finish(self, error)


class Sync:
    """fdatasync."""

    __slots__ = ("_queue", "done", "length")

    def __init__(self, queue: OperationQueue, done: Done | None) -> None:
        self._queue = queue
        self.done = done
        self.length = 0

    def begin(self) -> None:
        self._queue.backend.fdatasync(self._complete)

    def _complete(self, result: int) -> None:
        if result == -errno.EINTR and self.done is not None:
            self.begin()
            return
        error = None if result >= 0 else StorageError(-result, "fdatasync", path=self._queue.path)
        self._queue.finish(self, error)


class SpaceChange:
    """fallocate in one of its two uses: space for a range, or a hole in it.

    `fallback(offset, length, callback)` does it another way where the file system answers
    EOPNOTSUPP.
    """

    __slots__ = ("_fallback", "_mode", "_offset", "_queue", "_size", "done", "length")

    def __init__(
        self,
        queue: OperationQueue,
        mode: int,
        offset: int,
        length: int,
        fallback: Fallback,
        done: Done | None,
    ) -> None:
        self._queue = queue
        self._mode = mode
        self._offset = offset
        self._size = length
        self._fallback = fallback
        self.done = done
        self.length = 0

    def begin(self) -> None:
        self._queue.backend.fallocate(self._mode, self._offset, self._size, self._complete)

    def _complete(self, result: int) -> None:
        if self.done is not None:
            if result == -errno.EINTR:
                self.begin()
                return
            if result == -errno.EOPNOTSUPP:
                self._fallback(self._offset, self._size, self._end)
                return
        self._end(result)

    def _end(self, result: int) -> None:
        error = None
        if result < 0:
            op = "punch hole" if self._mode else "fallocate"
            error = StorageError(-result, op, path=self._queue.path, offset=self._offset)
        self._queue.finish(self, error)
