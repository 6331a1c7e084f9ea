"""An image file: open it, and read, write, sync and allocate under its I/O policy.

Three ways to use it: blocking calls (opening, checking, creating; not in the event loop),
`try_read`/`try_write` (the data path: now or not at all), and completions or coroutines for what
has to wait.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections import deque
from collections.abc import Callable

from ploopd.errors import PloopError, StorageError, open_error
from ploopd.fileio import libc
from ploopd.fileio.backends import (
    DIRECT_ALIGNMENT,
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
from ploopd.fileio.operations import Operation, SpaceChange, Sync, Transfer
from ploopd.fileio.oslayer import REAL, OsLayer
from ploopd.fileio.policy import CacheMode, Policy, answers_nowait, choose, filesystem_type
from ploopd.fileio.waiting import Waiter, wait_for

Done = Callable[[StorageError | None], None]

MOST_OPERATIONS = 64
"""Operations of one file that are under way at a time; the others wait their turn."""

MOST_BYTES = 16 << 20
"""Bytes of them: what a file that hangs can hold of memory."""


class File:
    """A regular file, open for reading or for reading and writing.

    `path`: what it was opened by.  `fd`: its descriptor (buffered; locks belong to it).  `policy`:
    how data operations are executed.  `notes`: what an operator should know of it, e.g. that
    O_DIRECT was not to be had.  Data operations are for the event loop's thread.

    Every operation started by `read`, `write`, `sync`, `allocate` or `punch` ends in one call of
    `done`, in the loop's thread, perhaps before the method returns; they begin with the next `kick`
    of the engine.  Only `abandon` changes that: then `done` is never called.
    """

    def __init__(
        self,
        *,
        path: str,
        fd: int,
        direct_fd: int | None,
        read_only: bool,
        cache: CacheMode,
        policy: Policy,
        filesystem: str,
        engine: IoEngine | None,
        layer: OsLayer,
        notes: list[str],
    ) -> None:
        self.path = path
        self.fd = fd
        self.read_only = read_only
        self.cache = cache
        self.policy = policy
        self.filesystem = filesystem
        self.notes = notes
        self.buffers = BufferPool() if engine is None else engine.buffers
        self.backend = _backend(engine, fd, direct_fd, layer, policy)
        self._direct_fd = direct_fd
        self._layer = layer
        self._inline = _inline(policy, fd, path, layer)
        self.try_read: Callable[[memoryview, int], bool] = self._inline.try_read
        """`try_read(buffer, offset)`: fill `buffer` now and return True, or return False and have
        done nothing; raises `StorageError` for what the storage answered."""
        self.try_write: Callable[[memoryview, int], bool] = self._inline.try_write
        """`try_write(buffer, offset)`: write all of `buffer` now and return True, or return False:
        then use `write`, with all of it."""
        self._running: set[Operation] = set()
        self._waiting: deque[Operation] = deque()
        self._bytes = 0
        self._closed = False
        self._abandoned = False

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
        name = os.fspath(path)
        flags = os.O_RDONLY if read_only else os.O_RDWR
        notes: list[str] = []
        try:
            fd = layer.open(name, flags, dir_fd)
        except OSError as error:
            raise open_error(error, name) from error
        direct_fd: int | None = None
        try:
            if cache is CacheMode.NONE and engine is not None:
                direct_fd = _open_direct(layer, name, flags, dir_fd, fd, notes)
            effective = CacheMode.WRITEBACK if direct_fd is None else CacheMode.NONE
            filesystem = filesystem_type(layer.fstat(fd).st_dev)
            policy = choose(io, effective, filesystem, None if engine is None else engine.kind)
            if policy is Policy.NOWAIT and engine is not None and not answers_nowait(fd):
                policy = choose("auto", effective, "unknown", engine.kind)
            return cls(
                path=name,
                fd=fd,
                direct_fd=direct_fd,
                read_only=read_only,
                cache=effective,
                policy=policy,
                filesystem=filesystem,
                engine=engine,
                layer=layer,
                notes=notes,
            )
        except OSError as error:
            _close_quietly(layer, fd, direct_fd)
            raise open_error(error, name) from error
        except PloopError:
            _close_quietly(layer, fd, direct_fd)
            raise

    # Blocking.

    def size(self) -> int:
        """The file's length in bytes."""
        try:
            return self._layer.fstat(self.fd).st_size
        except OSError as error:
            raise StorageError.from_os(error, "fstat", self.path) from error

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
        mode = libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE
        try:
            try:
                self._layer.fallocate(self.fd, mode, offset, length)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                write_zeroes(self._layer, self.fd, offset, length)
        except OSError as error:
            raise StorageError.from_os(error, "punch hole", self.path, offset) from error

    # Completions.

    def read(self, buffer: memoryview, offset: int, done: Done) -> None:
        """Fill `buffer`; fewer bytes than that in the file are a `StorageError` (EIO)."""
        self._start(Transfer(self, buffer, offset, done, reading=True))

    def write(self, buffer: memoryview, offset: int, done: Done) -> None:
        """Write all of `buffer`, which is free for reuse when its turn has come: at `done`."""
        self._start(Transfer(self, buffer, offset, done, reading=False))

    def sync(self, done: Done) -> None:
        """All writes completed before are on stable storage at `done` (fdatasync)."""
        self._start(Sync(self, done))

    def allocate(self, offset: int, length: int, done: Done) -> None:
        """Space for the range, zeros where nothing was written; the file grows to hold it.

        Where fallocate is unknown the file is only made longer.
        """
        self._start(SpaceChange(self, 0, offset, length, self.backend.extend, done))

    def punch(self, offset: int, length: int, done: Done) -> None:
        """Make the range, as far as it exists, read as zeros and give its space back.

        Where there are no holes zeros are written.
        """
        mode = libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE
        self._start(SpaceChange(self, mode, offset, length, self.backend.zero, done))

    # Coroutines.  A cancelled one disowns its operation, which may or may not have happened.

    async def aread(self, buffer: memoryview, offset: int) -> None:
        """`read`; raises `StorageError`."""
        await wait_for(self, Transfer(self, buffer, offset, None, reading=True))

    async def awrite(self, buffer: memoryview | bytes, offset: int) -> None:
        """`write`; raises `StorageError`."""
        view = memoryview(buffer).cast("B")
        await wait_for(self, Transfer(self, view, offset, None, reading=False))

    async def async_sync(self) -> None:
        """`sync`; raises `StorageError`."""
        await wait_for(self, Sync(self, None))

    async def async_allocate(self, offset: int, length: int) -> None:
        """`allocate`; raises `StorageError`."""
        extend = self.backend.extend
        await wait_for(self, SpaceChange(self, 0, offset, length, extend, None))

    async def async_punch(self, offset: int, length: int) -> None:
        """`punch`; raises `StorageError`."""
        mode = libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE
        zero = self.backend.zero
        await wait_for(self, SpaceChange(self, mode, offset, length, zero, None))

    # The life of operations.

    @property
    def in_flight(self) -> int:
        """Operations that have not ended."""
        return len(self._running) + len(self._waiting)

    def start(self, operation: Operation) -> None:
        """Begin an operation, or let it wait until others have ended."""
        self._start(operation)

    def _start(self, operation: Operation) -> None:
        if self._closed:
            if operation.done is not None:
                operation.done(StorageError(errno.EBADF, "use", path=self.path))
            return
        if self._waiting or not self._has_room(operation):
            self._waiting.append(operation)
            return
        self._running.add(operation)
        self._bytes += operation.length
        operation.begin()

    def _has_room(self, operation: Operation) -> bool:
        running = self._running
        if not running:
            return True
        return len(running) < MOST_OPERATIONS and self._bytes + operation.length <= MOST_BYTES

    def finish(self, operation: Operation, error: StorageError | None) -> None:
        """An operation has ended: begin the next one and tell whoever waits."""
        self._running.discard(operation)
        self._bytes -= operation.length
        while self._waiting and self._has_room(self._waiting[0]):
            following = self._waiting.popleft()
            if following.done is None:
                continue  # disowned before it began
            self._running.add(following)
            self._bytes += following.length
            following.begin()
        done = operation.done
        if done is not None:
            done(error)
        if self._abandoned and not self._running:
            self._close_in_thread()

    # The end.

    def close(self) -> None:
        """Close it, and with it release its locks; may block.

        Raises `StorageError` for what close(2) reports.  Operations still under way are disowned.
        """
        if self._closed:
            return
        if self._running or self._waiting:
            self.abandon()
            return
        self._closed = True
        self._inline.fd = -1
        try:
            if self._direct_fd is not None:
                self._layer.close(self._direct_fd)
            self._layer.close(self.fd)
        except OSError as error:
            raise StorageError.from_os(error, "close", self.path) from error

    def abandon(self) -> None:
        """Have nothing more to do with it, at once.

        No `done` is called any more; coroutines that wait get `StorageError` (ECANCELED).
        Operations that hang keep the descriptors and their own buffers until they come back; what
        they then say is void.
        """
        if self._closed:
            return
        self._closed = True
        self._abandoned = True
        self._inline.fd = -1
        waiting, self._waiting = self._waiting, deque()
        for operation in (*self._running, *waiting):
            done, operation.done = operation.done, None
            if isinstance(done, Waiter):
                done(StorageError(errno.ECANCELED, "use", path=self.path))
        self.backend.disown()
        self.backend.kick()
        if not self._running:
            self._close_in_thread()

    def _close_in_thread(self) -> None:
        self._abandoned = False
        arguments = (self._layer, self.fd, self._direct_fd)
        threading.Thread(target=_close_quietly, args=arguments, daemon=True).start()


def _backend(
    engine: IoEngine | None, fd: int, direct_fd: int | None, layer: OsLayer, policy: Policy
) -> Backend:
    if engine is None:
        return BlockingBackend(fd, layer)
    if layer is REAL and policy is not Policy.THREADS:
        return EngineBackend(engine, fd, layer, direct_fd)
    if layer is REAL and engine.kind == "threads":
        return EngineBackend(engine, fd, layer, direct_fd)
    return LayerBackend(engine, fd, layer, direct_fd)


def _inline(policy: Policy, fd: int, path: str, layer: OsLayer) -> InlineIo:
    inline: InlineIo
    match policy:
        case Policy.INLINE:
            inline = PlainInline(fd, path, layer)
        case Policy.NOWAIT:
            inline = NowaitInline(fd, path, layer)
        case Policy.RING | Policy.THREADS:
            return NoInline(fd)
    return inline if layer is REAL else LayeredInline(inline, layer)


def _open_direct(
    layer: OsLayer, path: str, flags: int, dir_fd: int | None, fd: int, notes: list[str]
) -> int | None:
    """A second descriptor with O_DIRECT, or None and a note why the page cache is used."""
    alignment = libc.direct_io_alignment(fd)
    if alignment is not None and alignment[1] > DIRECT_ALIGNMENT:
        notes.append(f"O_DIRECT needs {alignment[1]}-byte blocks here: the page cache is used")
        return None
    direct = layer.open(path, flags, dir_fd)
    try:
        ours, theirs = layer.fstat(fd), layer.fstat(direct)
        if (ours.st_dev, ours.st_ino) != (theirs.st_dev, theirs.st_ino):
            raise PloopError("was replaced while it was being opened", path=path, hint="try again")
        fcntl.fcntl(direct, fcntl.F_SETFL, flags | os.O_DIRECT)
        if alignment is None and not _reads_sectors(direct):
            raise OSError(errno.EINVAL, "no 512-byte O_DIRECT")
    except OSError as error:
        layer.close(direct)
        if error.errno != errno.EINVAL:
            raise
        notes.append("the file system has no O_DIRECT with 512-byte blocks: the page cache is used")
        return None
    except PloopError:
        layer.close(direct)
        raise
    return direct


def _reads_sectors(fd: int) -> bool:
    """Does O_DIRECT do one 512-byte block?  For kernels that do not tell (before 6.1)."""
    buffer = BufferPool().take(DIRECT_ALIGNMENT)
    try:
        os.preadv(fd, (buffer.view,), DIRECT_ALIGNMENT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def _close_quietly(layer: OsLayer, fd: int, direct_fd: int | None) -> None:
    for each in (direct_fd, fd):
        if each is None:
            continue
        try:
            layer.close(each)
        except OSError:
            continue  # nobody is left who could do something about it
