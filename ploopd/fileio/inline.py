"""What a file does in the event loop itself: plain calls that complete now or say False.

A `File` binds `try_read` and `try_write` of one of these when it is opened, so the data path has no
branches by policy.  `fd` is -1 once the file is closed: calls bound earlier fail with EBADF and
never reach a descriptor that was given out again.
"""

from __future__ import annotations

import errno
import os
from typing import Final, Protocol

from ploopd.errors import StorageError
from ploopd.fileio.oslayer import OsLayer

PATIENCE: Final = 4
"""Misses in a row before NOWAIT reads are left out for a while: a miss costs more than a hit."""

SKIP_FIRST: Final = 16
SKIP_MOST: Final = 1024
"""How many reads go straight to the engine then; doubled while the next try misses again."""

_FOR_EVER: Final = 1 << 62


class InlineIo(Protocol):
    """The inline half of a file."""

    fd: int

    def try_read(self, buffer: memoryview, offset: int) -> bool:
        """Fill `buffer` now, or return False.  Raises `StorageError` for what storage answered."""
        ...

    def try_write(self, buffer: memoryview, offset: int) -> bool:
        """Write all of `buffer` now, or return False; then part of it may have been written."""
        ...


class PlainInline:
    """Memory file systems: nothing there waits for a disk."""

    __slots__ = ("_path", "_preadv", "_pwritev", "fd")

    def __init__(self, fd: int, path: str, layer: OsLayer) -> None:
        self.fd = fd
        self._path = path
        self._preadv = layer.preadv
        self._pwritev = layer.pwritev

    def try_read(self, buffer: memoryview, offset: int) -> bool:
        try:
            return self._preadv(self.fd, (buffer,), offset) == len(buffer)
        except OSError as error:
            raise StorageError.from_os(error, "read", self._path, offset) from error

    def try_write(self, buffer: memoryview, offset: int) -> bool:
        try:
            return self._pwritev(self.fd, (buffer,), offset) == len(buffer)
        except OSError as error:
            raise StorageError.from_os(error, "write", self._path, offset) from error


class NowaitInline:
    """Local file systems: reads that the kernel answers without waiting (preadv2(2), RWF_NOWAIT).

    Reads that miss the page cache several times in a row are not tried for a while, in which the
    engine serves hits, too.  Writes are the engine's: ext4 has none without waiting, XFS declines
    the first one of each clock tick, and all of them sleep while the file system is frozen.
    """

    __slots__ = ("_misses", "_path", "_preadv", "_skip", "fd")

    def __init__(self, fd: int, path: str, layer: OsLayer) -> None:
        self.fd = fd
        self._path = path
        self._preadv = layer.preadv
        self._misses = 0
        self._skip = 0

    def try_read(self, buffer: memoryview, offset: int) -> bool:
        if self._skip:
            self._skip -= 1
            return False
        try:
            if self._preadv(self.fd, (buffer,), offset, os.RWF_NOWAIT) == len(buffer):
                self._misses = 0
                return True
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise StorageError.from_os(error, "read", self._path, offset) from error
            self._skip = _FOR_EVER
            return False
        self._misses += 1
        self._skip = _pause(self._misses)
        return False

    def try_write(self, buffer: memoryview, offset: int) -> bool:
        return False


def _pause(misses: int) -> int:
    """How many reads are left out after so many misses in a row."""
    if misses < PATIENCE:
        return 0
    return min(SKIP_FIRST << min(misses - PATIENCE, 16), SKIP_MOST)


class NoInline:
    """Everything else: all operations are the engine's."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def try_read(self, buffer: memoryview, offset: int) -> bool:
        return False

    def try_write(self, buffer: memoryview, offset: int) -> bool:
        return False


class LayeredInline:
    """A layer other than the real one in front: it is asked whether the call would wait."""

    __slots__ = ("_inner", "_layer")

    def __init__(self, inner: InlineIo, layer: OsLayer) -> None:
        self._inner = inner
        self._layer = layer

    @property
    def fd(self) -> int:
        return self._inner.fd

    @fd.setter
    def fd(self, value: int) -> None:
        self._inner.fd = value

    def try_read(self, buffer: memoryview, offset: int) -> bool:
        if self._layer.would_block("read", self._inner.fd):
            return False
        return self._inner.try_read(buffer, offset)

    def try_write(self, buffer: memoryview, offset: int) -> bool:
        if self._layer.would_block("write", self._inner.fd):
            return False
        return self._inner.try_write(buffer, offset)
