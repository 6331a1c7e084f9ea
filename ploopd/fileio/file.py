"""An image file: open it, and read, write, sync and allocate under its I/O policy.

Three ways to use it: blocking calls (opening, checking, creating; not in the event loop),
`try_read`/`try_write` (the data path: now or not at all), and completions or coroutines for what
has to wait.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from typing import Final

from ploopd.errors import StorageError
from ploopd.fileio import libc
from ploopd.fileio.backends import (
    Backend,
    BlockingBackend,
    EngineBackend,
    LayerBackend,
    extend_file,
    write_zeroes,
)
from ploopd.fileio.buffers import BufferPool
from ploopd.fileio.engine import IoEngine
from ploopd.fileio.inline import InlineIo, LayeredInline, NoInline, NowaitInline, PlainInline
from ploopd.fileio.lane import Begin, FileLane, LaneOperation, no_lane
from ploopd.fileio.opening import Opened, close_quietly, open_file
from ploopd.fileio.operation_queue import OperationQueue
from ploopd.fileio.operations import Done, SpaceChange, Sync, Transfer
from ploopd.fileio.oslayer import REAL, OsLayer
from ploopd.fileio.policy import CacheMode, Policy, in_memory, may_stall
from ploopd.fileio.ring_engine import RingEngine
from ploopd.fileio.view import FileView, TryView, no_view
from ploopd.fileio.waiting import wait_for

__all__ = ["CacheMode", "Done", "File", "Policy"]

_PUNCH: Final = libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE


class File:
    """A regular file, open for reading or for reading and writing.

    `path`: what it was opened by.  `fd`: its descriptor (buffered; locks belong to it).  `policy`:
    how data operations are executed; `cache`, `filesystem`: what that follows from.  `notes`: what
    an operator should know of it, e.g. that O_DIRECT was not to be had.

    Data operations are for the event loop's thread.  Every one started by `read`, `write`, `sync`,
    `allocate` or `punch` ends in one call of `done`, in that thread, perhaps before the method
    returns; they begin with the next `kick` of the engine.  Only `abandon` changes that: then
    `done` is never called.  With CacheMode.NONE, clusters must be whole pages: what is not aligned
    to 512 goes through the page cache and must share no page with what is (`keep_cached`).
    """

    def __init__(self, opened: Opened, engine: IoEngine | None) -> None:
        self.path = opened.path
        self.fd = opened.fd
        self.read_only = opened.read_only
        self.cache = opened.cache
        self.policy = opened.policy
        self.filesystem = opened.filesystem
        self.notes = list(opened.notes)
        self._direct_fd = opened.direct_fd
        self._layer = opened.layer
        self._backend = _backend(opened, engine)
        buffers = BufferPool() if engine is None else engine.buffers
        self._queue = OperationQueue(self.path, self._backend, buffers)
        self._inline_io = _inline_io(opened)
        self._lane = _lane(opened, engine, self._backend)
        self._view = _view(opened)
        self._closed = False
        self.try_read: Callable[[memoryview, int], bool] = self._inline_io.try_read
        """`try_read(buffer, offset)`: fill `buffer` now and return True, or return False: then use
        `read`.  Raises `StorageError` for what the storage answered."""
        self.try_write: Callable[[memoryview, int], bool] = self._inline_io.try_write
        """`try_write(buffer, offset)`: write all of `buffer` now and return True, or return False:
        then use `write`, with all of it."""
        self.try_view: TryView = no_view if self._view is None else self._view.try_view
        """`try_view(offset, length)`: see `FileView.try_view`."""
        self.try_write_view: TryView = no_view if self._view is None else self._view.try_write_view
        """`try_write_view(offset, length)`: see `FileView.try_write_view`."""
        self.begin: Begin = no_lane if self._lane is None else self._lane.begin
        """`begin(operation, host)`: see `FileLane.begin`."""

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        read_only: bool,
        engine: IoEngine | None,
        cache: CacheMode = CacheMode.WRITEBACK,
        dir_fd: int | None = None,
        layer: OsLayer = REAL,
        io: str = "auto",
    ) -> File:
        """Open an existing regular file; may block, so not in the event loop.

        With `dir_fd` the path must lead beneath that directory.  `engine` None makes a file whose
        operations all happen at once.  Raises what `errors.open_error` says, `UnsupportedError` for
        anything but a regular file, `DescriptorError` for a path that leads out of `dir_fd`,
        `UsageError` for an `io` that cannot be had.
        """
        opened = open_file(
            os.fspath(path),
            read_only=read_only,
            cache=cache,
            dir_fd=dir_fd,
            layer=layer,
            io=io,
            engine_kind=None if engine is None else engine.kind,
        )
        return cls(opened, engine)

    def keep_cached(self, end: int) -> None:
        """Do what begins before byte `end` through the page cache, whatever the cache mode is."""
        self._backend.cached_end = end

    # Blocking.

    def size(self) -> int:
        """The file's length in bytes."""
        try:
            return self._layer.fstat(self.fd).st_size
        except OSError as error:
            raise StorageError.from_os(error, "fstat", self.path) from error

    def drop_cache(self) -> None:
        """Let the page cache forget what it has of the file, if the file system has one to drop.

        After a failed write or sync it may have what the storage has not: FUSE keeps pages that its
        server acknowledged and lost, ext4 marks those clean that could not be written.
        """
        with contextlib.suppress(OSError):
            self._layer.drop_cache(self.fd)

    def pread(self, length: int, offset: int) -> bytes:
        """The `length` bytes at `offset`; `StorageError` (EIO, "short read") if there are fewer."""
        buffer = bytearray(length)
        found = self.pread_into(memoryview(buffer), offset)
        if found != length:
            raise StorageError(
                errno.EIO,
                "read",
                path=self.path,
                offset=offset + found,
                message=f"short read: {length - found} of {length} bytes are missing",
            )
        return bytes(buffer)

    def pread_into(self, view: memoryview, offset: int) -> int:
        """Fill `view`; returns how many bytes there were, less than its length only at EOF."""
        found = 0
        try:
            while found < len(view):
                count = self._layer.preadv(self.fd, (view[found:],), offset + found)
                if count == 0:
                    break
                found += count
        except OSError as error:
            raise StorageError.from_os(error, "read", self.path, offset + found) from error
        return found

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        view = memoryview(data).cast("B")
        written = 0
        try:
            while written < len(view):
                count = self._layer.pwritev(self.fd, (view[written:],), offset + written)
                if count == 0:
                    raise OSError(errno.EIO, "nothing was written")
                written += count
        except OSError as error:
            raise StorageError.from_os(error, "write", self.path, offset + written) from error

    def fsync(self) -> None:
        """Bring data and metadata to stable storage."""
        try:
            self._layer.fsync(self.fd)
        except OSError as error:
            raise StorageError.from_os(error, "fsync", self.path) from error

    def truncate(self, length: int) -> None:
        """Make the file exactly `length` bytes long."""
        try:
            self._layer.ftruncate(self.fd, length)
        except OSError as error:
            raise StorageError.from_os(error, "truncate", self.path, length) from error

    def allocate_now(self, offset: int, length: int) -> None:
        """As `allocate`, blocking."""
        try:
            try:
                self._layer.fallocate(self.fd, 0, offset, length)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                extend_file(self._layer, self.fd, offset + length)
        except OSError as error:
            raise StorageError.from_os(error, "fallocate", self.path, offset) from error

    def punch_now(self, offset: int, length: int) -> None:
        """As `punch`, blocking."""
        self._forget_view(offset, length)
        try:
            try:
                self._layer.fallocate(self.fd, _PUNCH, offset, length)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                write_zeroes(self._layer, self.fd, offset, length)
        except OSError as error:
            raise StorageError.from_os(error, "punch hole", self.path, offset) from error

    # Completions.

    def read(self, buffer: memoryview, offset: int, done: Done) -> None:
        """Fill `buffer`; fewer bytes than that in the file are a `StorageError` (EIO)."""
        self._queue.start(Transfer(self._queue, buffer, offset, done, reading=True))

    def write(self, buffer: memoryview, offset: int, done: Done) -> None:
        """Write all of `buffer`, which is free for reuse when its turn has come: at `done`."""
        self._queue.start(Transfer(self._queue, buffer, offset, done, reading=False))

    def sync(self, done: Done) -> None:
        """All writes completed before are on stable storage at `done` (fdatasync)."""
        self._queue.start(Sync(self._queue, done))

    def allocate(self, offset: int, length: int, done: Done) -> None:
        """Space for the range, zeros where nothing was written; the file grows to hold it.

        Where fallocate is unknown the file is only made longer.
        """
        queue = self._queue
        queue.start(SpaceChange(queue, 0, offset, length, self._backend.extend, done))

    def punch(self, offset: int, length: int, done: Done) -> None:
        """Make the range, as far as it exists, read as zeros and give its space back.

        Where there are no holes zeros are written.
        """

        def ended(error: StorageError | None) -> None:
            self._forget_view(offset, length)
            done(error)

        self._forget_view(offset, length)
        queue = self._queue
        queue.start(SpaceChange(queue, _PUNCH, offset, length, self._backend.zero, ended))

    def _forget_view(self, offset: int, length: int) -> None:
        if self._view is not None:
            self._view.forget(offset, length)

    # The lane.

    def adopt(self, operation: LaneOperation, buffer: memoryview, done: Done) -> None:
        """Make an ordinary read or write, as by `read` and `write`, of one that is in the lane."""
        assert self._lane is not None
        reading = not operation.writing
        transfer = Transfer(self._queue, buffer, operation.host, done, reading=reading)
        transfer.continue_with(operation.buffer)
        self._lane.adopt(operation, self._queue, transfer)

    def in_lane(self) -> list[LaneOperation]:
        """The operations in the lane."""
        return [] if self._lane is None else list(self._lane.operations())

    # Coroutines.  A cancelled one disowns its operation, which may or may not have happened.

    async def aread(self, buffer: memoryview, offset: int) -> None:
        """`read`; raises `StorageError`."""
        await wait_for(self._queue, Transfer(self._queue, buffer, offset, None, reading=True))

    async def awrite(self, buffer: memoryview | bytes, offset: int) -> None:
        """`write`; raises `StorageError`."""
        view = memoryview(buffer).cast("B")
        await wait_for(self._queue, Transfer(self._queue, view, offset, None, reading=False))

    async def async_sync(self) -> None:
        """`sync`; raises `StorageError`."""
        await wait_for(self._queue, Sync(self._queue, None))

    async def async_allocate(self, offset: int, length: int) -> None:
        """`allocate`; raises `StorageError`."""
        queue, extend = self._queue, self._backend.extend
        await wait_for(queue, SpaceChange(queue, 0, offset, length, extend, None))

    async def async_punch(self, offset: int, length: int) -> None:
        """`punch`; raises `StorageError`."""
        queue, zero = self._queue, self._backend.zero
        self._forget_view(offset, length)
        try:
            await wait_for(queue, SpaceChange(queue, _PUNCH, offset, length, zero, None))
        finally:  # a neighbour in the same piece may have been looked at meanwhile
            self._forget_view(offset, length)

    # The end.

    @property
    def in_flight(self) -> int:
        """Operations that have not ended."""
        return len(self._queue) + (0 if self._lane is None else self._lane.running)

    def close(self) -> None:
        """Close it, and with it release its locks; may block.

        Raises `StorageError` for what close(2) reports.  Operations still under way are disowned.
        """
        if self._closed:
            return
        if self.in_flight:
            self.abandon()
            return
        descriptors = self._end()
        self._queue.abandon(_nothing)
        failure = None
        for fd in descriptors:
            try:
                self._layer.close(fd)
            except OSError as error:
                failure = error
        if failure is not None:
            raise StorageError.from_os(failure, "close", self.path) from failure

    def abandon(self) -> None:
        """Have nothing more to do with it, at once.

        No `done` is called any more; coroutines that wait get `StorageError` (ECANCELED).
        Operations that hang keep the descriptors and their own buffers until they come back; what
        they then say is void.
        """
        if self._closed:
            return
        if self._lane is not None:
            self._lane.close()
        descriptors = self._end()
        layer = self._layer

        def close_in_thread() -> None:  # close(2) may hang, too
            arguments = (layer, *descriptors)
            threading.Thread(target=close_quietly, args=arguments, daemon=True).start()

        self._queue.abandon(close_in_thread)

    def _end(self) -> list[int]:
        """No call reaches the descriptors from now on; returns them."""
        descriptors = [self.fd] if self._direct_fd is None else [self._direct_fd, self.fd]
        self._closed = True
        if self._view is not None:
            self._view.close()
        self.begin = no_lane
        self._direct_fd = None
        self.fd = self._inline_io.fd = -1
        return descriptors


def _backend(opened: Opened, engine: IoEngine | None) -> Backend:
    if engine is None:
        return BlockingBackend(opened.fd, opened.layer)
    if opened.layer is REAL and (opened.policy is not Policy.THREADS or engine.kind == "threads"):
        stalls = may_stall(opened.filesystem)
        return EngineBackend(engine, opened.fd, opened.layer, opened.direct_fd, may_stall=stalls)
    return LayerBackend(engine, opened.fd, opened.layer, opened.direct_fd)


def _inline_io(opened: Opened) -> InlineIo:
    inline: InlineIo
    match opened.policy:
        case Policy.INLINE:
            inline = PlainInline(opened.fd, opened.path, opened.layer)
        case Policy.NOWAIT:
            inline = NowaitInline(opened.fd, opened.path, opened.layer)
        case Policy.RING | Policy.THREADS:
            return NoInline(opened.fd)
    return inline if opened.layer is REAL else LayeredInline(inline, opened.layer)


def _lane(opened: Opened, engine: IoEngine | None, backend: Backend) -> FileLane | None:
    if opened.policy is Policy.INLINE or not isinstance(engine, RingEngine):
        return None
    return FileLane(engine, backend) if isinstance(backend, EngineBackend) else None


def _view(opened: Opened) -> FileView | None:
    if opened.policy is not Policy.INLINE or opened.layer is not REAL:
        return None
    if not in_memory(opened.filesystem):
        return None
    return FileView(opened.fd, read_only=opened.read_only)


def _nothing() -> None:
    """Nothing was under way."""
