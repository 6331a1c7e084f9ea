"""Page-aligned memory for I/O, reused.

The kernel only ever reads and writes memory that belongs to the operation, never the caller's: a
request that hangs is disowned *with* its buffer, so that a result that comes an hour later lands in
memory that nobody uses for anything else.  Copying 4 KiB costs 0.1 µs, 1 MiB 37 µs.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Final

PAGE: Final = 4096


class Buffer:
    """A piece of page-aligned memory, `length` bytes of it in use.

    `view` is writable and exactly `length` long, `address` is where it is.  It returns to the pool
    by `release()`; its content is undefined when it is taken.
    """

    __slots__ = ("_capacity", "_memory", "_pool", "address", "length", "view")

    def __init__(self, pool: BufferPool, memory: memoryview, address: int) -> None:
        self._pool: BufferPool | None = pool
        self._memory = memory
        self._capacity = len(memory)
        self.address = address
        self.length = self._capacity
        self.view = memory

    def release(self) -> None:
        """Give the memory back to its pool.  Once: the second call does nothing."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool._put(self._memory, self.address)


class BufferPool:
    """Buffers in size classes of powers of two, at least a page; for one thread.

    `cache_limit`: bytes kept for reuse at most; what comes back beyond that is unmapped.
    """

    __slots__ = ("_cache_limit", "_cached", "_free", "outstanding")

    def __init__(self, cache_limit: int = 32 << 20) -> None:
        self._free: dict[int, list[tuple[memoryview, int]]] = {}
        self._cached = 0
        self._cache_limit = cache_limit
        self.outstanding = 0

    @property
    def cached(self) -> int:
        """Bytes that wait for reuse."""
        return self._cached

    def take(self, length: int) -> Buffer:
        """A buffer of `length` (≥ 1) bytes."""
        if length <= 0:
            raise ValueError(f"a buffer of {length} bytes")
        capacity = PAGE if length <= PAGE else 1 << (length - 1).bit_length()
        free = self._free.get(capacity)
        if free:
            memory, address = free.pop()
            self._cached -= capacity
        else:
            memory, address = _map(capacity)
        buffer = Buffer(self, memory, address)
        if length != capacity:
            buffer.length = length
            buffer.view = memory[:length]
        self.outstanding += 1
        return buffer

    def _put(self, memory: memoryview, address: int) -> None:
        self.outstanding -= 1
        capacity = len(memory)
        if self._cached + capacity > self._cache_limit:
            return  # the mapping goes away with its last view
        self._cached += capacity
        self._free.setdefault(capacity, []).append((memory, address))


def _map(capacity: int) -> tuple[memoryview, int]:
    memory = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memoryview(memory), ctypes.addressof(ctypes.c_char.from_buffer(memory))
