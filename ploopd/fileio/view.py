"""The page cache of a file in memory, for a system call that copies out of it.

`send` from such a view copies once what `pread` and `send` copy twice; unlike with sendfile(2) the
kernel keeps no reference to the pages, so that what is sent is what was there during the call.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable

from ploopd.fileio.oslayer import OsLayer

CHUNK = 2 << 20
"""Bytes of the file that are forgotten together: what one page of page tables maps."""

MOST_CHUNKS = 1024
"""Chunks in use at a time.  Their pages are the file's and take no other memory, but they count as
resident memory of this process, and each takes a page of page tables."""

TryView = Callable[[int, int], memoryview | None]


class FileView:
    """A mapping of the file behind `fd`, made when it is first needed and when the file has grown.

    Only for memory file systems: a page that has to be read first would stop the event loop.
    """

    __slots__ = ("_chunks", "_fd", "_layer", "_map", "_mapped", "_memory")

    def __init__(self, fd: int, layer: OsLayer) -> None:
        self._fd = fd
        self._layer = layer
        self._map: mmap.mmap | None = None
        self._memory = memoryview(b"")
        self._mapped = 0
        self._chunks: dict[int, None] = {}

    def try_view(self, offset: int, length: int) -> memoryview | None:
        """The `length` bytes at `offset`, or None: then read them.

        Only for a system call in this turn of the event loop, which answers EFAULT, or does less
        than all, if the bytes cannot be had.  This process itself must not touch them: it would get
        SIGBUS, should somebody have made the file shorter.  Nobody may keep the view: it holds the
        file open, with its locks.
        """
        end = offset + length
        if self._fd < 0:
            return None
        try:
            size = self._layer.fstat(self._fd).st_size
            if end > size:
                return None
            if end > self._mapped:
                self._remap(size)
        except (OSError, ValueError):  # no address space, no descriptor: `read` knows no such limit
            return None
        first, last = offset // CHUNK, (end - 1) // CHUNK
        chunks = self._chunks
        if first not in chunks:
            self._use(first)
        if last != first:
            for chunk in range(first + 1, last + 1):
                if chunk not in chunks:
                    self._use(chunk)
        return self._memory[offset:end]

    def close(self) -> None:
        """There are no views from now on."""
        self._fd = -1
        self._drop()

    def _remap(self, size: int) -> None:
        """Map all of the file.  An older mapping goes away with its last view."""
        self._drop()
        self._map = mmap.mmap(self._fd, size, access=mmap.ACCESS_READ)
        self._memory = memoryview(self._map)
        self._mapped = size

    def _drop(self) -> None:
        self._memory = memoryview(b"")
        self._map = None
        self._mapped = 0
        self._chunks = {}

    def _use(self, chunk: int) -> None:
        """A chunk of the mapping is used for the first time; the oldest one makes room for it."""
        chunks = self._chunks
        chunks[chunk] = None
        if len(chunks) <= MOST_CHUNKS:
            return
        oldest = next(iter(chunks))
        del chunks[oldest]
        assert self._map is not None
        with contextlib.suppress(OSError):
            start = oldest * CHUNK
            self._map.madvise(mmap.MADV_DONTNEED, start, min(CHUNK, self._mapped - start))


def no_view(offset: int, length: int) -> memoryview | None:
    """Of a file, or a device, that has no views."""
    return None
