"""The system calls that image files see, as one object: tests can fail, delay or lose them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from ploopd.fileio import libc
from ploopd.fileio.paths import open_regular


class OsLayer(Protocol):
    """What `File` asks of an operating system.  Every call may raise `OSError`."""

    def open(self, path: str, flags: int, dir_fd: int | None) -> int:
        """A descriptor of a regular file; with `dir_fd`, one beneath that directory."""
        ...

    def preadv(
        self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0, /
    ) -> int: ...

    def pwritev(
        self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0, /
    ) -> int: ...

    def fdatasync(self, fd: int, /) -> None: ...

    def fsync(self, fd: int, /) -> None: ...

    def fallocate(self, fd: int, mode: int, offset: int, length: int, /) -> None: ...

    def ftruncate(self, fd: int, length: int, /) -> None: ...

    def fstat(self, fd: int, /) -> os.stat_result: ...

    def close(self, fd: int, /) -> None: ...

    def drop_cache(self, fd: int, /) -> None:
        """Forget what the page cache has of the file and has given to the storage."""
        ...

    def would_block(self, op: str, fd: int, /) -> bool:
        """Would `op` ("read" or "write") on `fd` not return at once?  Asked before inline calls of
        a layer other than `REAL`, whose storage says so itself (EAGAIN)."""
        ...


class RealOs:
    """The operating system itself."""

    preadv = staticmethod(os.preadv)
    pwritev = staticmethod(os.pwritev)
    fdatasync = staticmethod(os.fdatasync)
    fsync = staticmethod(os.fsync)
    fallocate = staticmethod(libc.fallocate)
    ftruncate = staticmethod(os.ftruncate)
    fstat = staticmethod(os.fstat)
    close = staticmethod(os.close)
    open = staticmethod(open_regular)

    def drop_cache(self, fd: int, /) -> None:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def would_block(self, op: str, fd: int, /) -> bool:
        return False


REAL: OsLayer = RealOs()
