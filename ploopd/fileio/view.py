"""The page cache of a file in memory, for a system call that copies out of it or into it.

`send` from such a view copies once what `pread` and `send` copy twice, and so does `recv` into one;
unlike with sendfile(2) and splice(2) the kernel keeps no reference to the pages, so that what is
sent is what was there during the call.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable
from typing import Final

import numpy as np

from ploopd.fileio import libc

CHUNK: Final = 2 << 20
"""Bytes of the file that are forgotten together: what one page of page tables maps."""

MOST_CHUNKS = 1024
"""Chunks in use at a time.  Their pages are the file's and take no other memory, but they count as
resident memory of this process, and each takes a page of page tables."""

PIECE: Final = 64 << 10
"""Bytes of a chunk that are mapped together when they are first used."""

_MADV_POPULATE_READ: Final = 22

TryView = Callable[[int, int], memoryview | None]


class FileView:
    """A mapping of the file behind `fd`, made when it is first needed and when the file has grown.

    Only for memory file systems: a page that has to be read first would stop the event loop.
    """

    __slots__ = (
        "_address",
        "_chunks",
        "_fd",
        "_map",
        "_mapped",
        "_memory",
        "_read_only",
        "_writable",
    )

    def __init__(self, fd: int, *, read_only: bool) -> None:
        self._fd = fd
        self._read_only = read_only
        self._map: mmap.mmap | None = None
        self._address = 0
        self._memory = self._writable = memoryview(b"")
        self._mapped = 0
        self._chunks: dict[int, int] = {}

    def try_view(self, offset: int, length: int) -> memoryview | None:
        """The `length` bytes at `offset`, or None: then read them.

        Only for a system call in this turn of the event loop, which answers EFAULT, or does less
        than all, if the bytes cannot be had.  This process itself must not touch them: it would get
        SIGBUS, should somebody have made the file shorter.  Nobody may keep the view: it holds the
        file open, with its locks.

        There is none of a hole, which the file system would fill with pages of zeros.
        """
        end = offset + length
        return self._memory[offset:end] if self._is_there(offset, end) else None

    def try_write_view(self, offset: int, length: int) -> memoryview | None:
        """As `try_view`, to be written to; None for a file that is open read-only."""
        end = offset + length
        if self._read_only or not self._is_there(offset, end):
            return None
        return self._writable[offset:end]

    def forget(self, offset: int, length: int) -> None:
        """The pages of the range are about to be given back: ask again before showing it."""
        chunks = self._chunks
        for chunk in range(offset // CHUNK, (offset + length - 1) // CHUNK + 1):
            if chunk in chunks:
                chunks[chunk] = 0

    def close(self) -> None:
        """There are no views from now on."""
        self._fd = -1
        self._drop()

    def _is_there(self, offset: int, end: int) -> bool:
        """Whether the file has the range in memory; it is mapped afterwards."""
        if self._fd < 0:
            return False
        try:
            size = os.lseek(self._fd, 0, os.SEEK_END)  # a third of what fstat(2) costs here
            if end > size:
                return False
            if end > self._mapped:
                self._remap(size)
        except (OSError, ValueError):  # no address space, no descriptor: `read` knows no such limit
            return False
        chunks = self._chunks
        at = offset
        while at < end:
            chunk = at // CHUNK
            start = chunk * CHUNK
            stop = min(end, start + CHUNK)
            pieces = (2 << (stop - 1 - start) // PIECE) - (1 << (at - start) // PIECE)
            if chunks.get(chunk, 0) & pieces != pieces and not self._use(chunk, at, stop, pieces):
                return False
            at = stop
        return True

    def _remap(self, size: int) -> None:
        """Map all of the file.  An older mapping goes away with its last view."""
        access = mmap.ACCESS_READ if self._read_only else mmap.ACCESS_WRITE
        new = mmap.mmap(self._fd, size, access=access)
        self._drop()
        self._map = new
        self._address = np.frombuffer(self._map, np.uint8).ctypes.data
        self._writable = memoryview(self._map)
        self._memory = self._writable.toreadonly()
        self._mapped = size

    def _drop(self) -> None:
        self._memory = self._writable = memoryview(b"")
        self._map = None
        self._mapped = 0
        self._chunks = {}

    def _use(self, chunk: int, start: int, stop: int, pieces: int) -> bool:
        """Map the pieces of a chunk that have these bytes, if none of their pages is missing.

        Together, because a page takes a fault of its own where it is written to first; the pages of
        a memory file system are mapped writable by being read.
        """
        assert self._map is not None
        start -= start % PIECE
        stop = min(stop + -stop % PIECE, self._mapped)
        try:
            if not libc.resident(self._address + start, stop - start):
                return False
        except OSError:
            return False
        with contextlib.suppress(OSError):  # Linux 5.14; they are mapped by faults otherwise
            self._map.madvise(_MADV_POPULATE_READ, start, stop - start)
        chunks = self._chunks
        used = chunks.get(chunk)
        chunks[chunk] = pieces | (used or 0)
        if used is None and len(chunks) > MOST_CHUNKS:
            self._forget_oldest()
        return True

    def _forget_oldest(self) -> None:
        """The chunk that was mapped first makes room."""
        oldest = next(iter(self._chunks))
        del self._chunks[oldest]
        assert self._map is not None
        with contextlib.suppress(OSError):
            start = oldest * CHUNK
            self._map.madvise(mmap.MADV_DONTNEED, start, min(CHUNK, self._mapped - start))


def no_view(offset: int, length: int) -> memoryview | None:
    """Of a file, or a device, that has no views."""
    return None
