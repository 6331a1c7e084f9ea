"""Where the operations of a file go: the engine, its threads through a layer, or straight on.

A backend is an engine bound to the descriptors of one file.  `read` and `write` transfer
`buffer[start:]` from or to `offset + start`; every call ends in one `callback(result)`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, Final, Protocol

from ploopd.fileio.buffers import Buffer
from ploopd.fileio.completions import Callback
from ploopd.fileio.engine import IoEngine
from ploopd.fileio.oslayer import OsLayer

DIRECT_ALIGNMENT: Final = 512
"""SCSI's block: O_DIRECT is used where offsets and lengths of 512 are enough for it."""

_ZEROES: Final = 1 << 20


class Backend(Protocol):
    """An engine, bound to a file.

    `cached_end`: what begins before this byte of the file always goes through the page cache.
    """

    cached_end: int

    def read(self, buffer: Buffer, start: int, offset: int, callback: Callback) -> None: ...

    def write(self, buffer: Buffer, start: int, offset: int, callback: Callback) -> None: ...

    def fdatasync(self, callback: Callback) -> None: ...

    def fallocate(self, mode: int, offset: int, length: int, callback: Callback) -> None: ...

    def extend(self, offset: int, length: int, callback: Callback) -> None:
        """Make the file at least `offset + length` bytes long, by a hole."""
        ...

    def zero(self, offset: int, length: int, callback: Callback) -> None:
        """Write zeros into the part of the range that exists."""
        ...

    def kick(self) -> None: ...

    def disown(self) -> None: ...


class EngineBackend:
    """The engine itself.  With `direct_fd`, what is aligned for O_DIRECT goes there.

    The rest goes through the page cache by `fd`, and so does everything before `cached_end`: the
    header and the BAT, whose entries are smaller than that, but may be aligned in a row.  The two
    never share a page as long as clusters are whole pages.
    """

    def __init__(
        self,
        engine: IoEngine,
        fd: int,
        layer: OsLayer,
        direct_fd: int | None = None,
        *,
        may_stall: bool = False,
    ) -> None:
        self._engine = engine
        self._fd = fd
        self._layer = layer
        self._direct_fd = fd if direct_fd is None else direct_fd
        self._mask = 0 if direct_fd is None else DIRECT_ALIGNMENT - 1
        self.cached_end = 0
        self.kick = engine.kick
        engine.may_stall(self._fd, may_stall)
        engine.may_stall(self._direct_fd, may_stall)

    def descriptor(self, offset: int, length: int) -> int:
        """Which of the two a transfer uses."""
        if (offset | length) & self._mask or offset < self.cached_end:
            return self._fd
        return self._direct_fd

    def read(self, buffer: Buffer, start: int, offset: int, callback: Callback) -> None:
        aligned = not (offset | start | buffer.length) & self._mask
        fd = self._direct_fd if aligned and offset >= self.cached_end else self._fd
        self._engine.read(fd, buffer, start, offset, callback)

    def write(self, buffer: Buffer, start: int, offset: int, callback: Callback) -> None:
        aligned = not (offset | start | buffer.length) & self._mask
        fd = self._direct_fd if aligned and offset >= self.cached_end else self._fd
        self._engine.write(fd, buffer, start, offset, callback)

    def fdatasync(self, callback: Callback) -> None:
        self._engine.fdatasync(self._fd, callback)

    def fallocate(self, mode: int, offset: int, length: int, callback: Callback) -> None:
        self._engine.fallocate(self._fd, mode, offset, length, callback)

    def extend(self, offset: int, length: int, callback: Callback) -> None:
        arguments = (self._layer, self._fd, offset + length)
        self._engine.call(self._fd, extend_file, arguments, callback)

    def zero(self, offset: int, length: int, callback: Callback) -> None:
        arguments = (self._layer, self._fd, offset, length)
        self._engine.call(self._fd, write_zeroes, arguments, callback)

    def disown(self) -> None:
        self._engine.disown(self._fd)
        if self._direct_fd != self._fd:
            self._engine.disown(self._direct_fd)


class LayerBackend:
    """Everything through the layer in the engine's worker threads."""

    def __init__(
        self, engine: IoEngine, fd: int, layer: OsLayer, direct_fd: int | None = None
    ) -> None:
        self._engine = engine
        self._fd = fd
        self._layer = layer
        self._direct_fd = fd if direct_fd is None else direct_fd
        self._mask = 0 if direct_fd is None else DIRECT_ALIGNMENT - 1
        self.cached_end = 0
        self.kick = engine.kick

    def _call(self, function: Callable[..., Any], callback: Callback, *arguments: Any) -> None:
        self._engine.call(self._fd, function, arguments, callback)

    def read(self, buffer: Buffer, start: int, offset: int, callback: Callback) -> None:
        aligned = not (offset | start | buffer.length) & self._mask
        fd = self._direct_fd if aligned and offset >= self.cached_end else self._fd
        view = buffer.view[start:]
        self._call(self._layer.preadv, callback, fd, (view,), offset + start)

    def write(self, buffer: Buffer, start: int, offset: int, callback: Callback) -> None:
        aligned = not (offset | start | buffer.length) & self._mask
        fd = self._direct_fd if aligned and offset >= self.cached_end else self._fd
        view = buffer.view[start:]
        self._call(self._layer.pwritev, callback, fd, (view,), offset + start)

    def fdatasync(self, callback: Callback) -> None:
        self._call(self._layer.fdatasync, callback, self._fd)

    def fallocate(self, mode: int, offset: int, length: int, callback: Callback) -> None:
        self._call(self._layer.fallocate, callback, self._fd, mode, offset, length)

    def extend(self, offset: int, length: int, callback: Callback) -> None:
        self._call(extend_file, callback, self._layer, self._fd, offset + length)

    def zero(self, offset: int, length: int, callback: Callback) -> None:
        self._call(write_zeroes, callback, self._layer, self._fd, offset, length)

    def disown(self) -> None:
        self._engine.disown(self._fd)


class BlockingBackend:
    """No engine: each call is made at once.  For command lines and checks."""

    def __init__(self, fd: int, layer: OsLayer) -> None:
        self._fd = fd
        self._layer = layer
        self.cached_end = 0

    def _call(self, function: Callable[..., Any], callback: Callback, *arguments: Any) -> None:
        try:
            result = function(*arguments) or 0
        except OSError as error:
            result = -(error.errno or errno.EIO)
        callback(result)

    def read(self, buffer: Buffer, start: int, offset: int, callback: Callback) -> None:
        view = buffer.view[start:]
        self._call(self._layer.preadv, callback, self._fd, (view,), offset + start)

    def write(self, buffer: Buffer, start: int, offset: int, callback: Callback) -> None:
        view = buffer.view[start:]
        self._call(self._layer.pwritev, callback, self._fd, (view,), offset + start)

    def fdatasync(self, callback: Callback) -> None:
        self._call(self._layer.fdatasync, callback, self._fd)

    def fallocate(self, mode: int, offset: int, length: int, callback: Callback) -> None:
        self._call(self._layer.fallocate, callback, self._fd, mode, offset, length)

    def extend(self, offset: int, length: int, callback: Callback) -> None:
        self._call(extend_file, callback, self._layer, self._fd, offset + length)

    def zero(self, offset: int, length: int, callback: Callback) -> None:
        self._call(write_zeroes, callback, self._layer, self._fd, offset, length)

    def kick(self) -> None:
        """Nothing waits."""

    def disown(self) -> None:
        """Nothing is under way."""


def extend_file(layer: OsLayer, fd: int, size: int) -> None:
    """Make the file `size` bytes long if it is shorter; `OSError` as ftruncate(2)."""
    if layer.fstat(fd).st_size < size:
        layer.ftruncate(fd, size)


def write_zeroes(layer: OsLayer, fd: int, offset: int, length: int) -> None:
    """Write zeros into the part of the range that exists; `OSError` as pwrite(2)."""
    end = min(offset + length, layer.fstat(fd).st_size)
    zeroes = memoryview(bytes(min(_ZEROES, max(end - offset, 0))))
    while offset < end:
        written = layer.pwritev(fd, (zeroes[: end - offset],), offset)
        if written == 0:
            raise OSError(errno.EIO, "nothing was written")
        offset += written
