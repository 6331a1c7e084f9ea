"""Do again what a journal holds: many changes at once, those that overlap one after the other."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable
from typing import Final

import trio

from ploopd.errors import StorageError
from ploopd.storage.device import BlockDevice, Done
from ploopd.storage.journal import Content, Journal, Zeroed
from ploopd.storage.journal_index import Range

_MOST: Final = 64
"""Changes under way at once."""
_MOST_BYTES: Final = 8 << 20
"""Bytes that are written at once; one larger change goes alone."""


async def replay(journal: Journal, device: BlockDevice) -> int:
    """Do all changes of `journal` again on `device`, and flush it; returns the bytes written.

    The journal stays as it is, and must, until this returns.  Raises StorageError; some changes
    may have been done then, and doing all of them again later is right.
    """
    if not journal:
        await trio.lowlevel.checkpoint()
        return 0
    written = await _apply(journal.records(), device)
    await _flush(device)
    return written


async def rewrite(journal: Journal, device: BlockDevice) -> None:
    """Do what the changes of `journal` come to again on the device that has done them; no flush.

    Whoever reads meanwhile never sees what a later change has overwritten.  The journal must stay
    as it is until this returns, and nobody else may change the disk.  Raises StorageError.
    """
    await _apply(journal.latest(), device)


async def _apply(changes: Iterable[tuple[Range, Content | memoryview]], device: BlockDevice) -> int:
    """Do the changes, in their order where they overlap; returns the bytes written."""
    wave = _Wave(device)
    written = 0
    for (offset, length), content in changes:
        size = 0 if isinstance(content, Zeroed) else length
        if not wave.takes(offset, length, size):
            await wave.finish()
            wave = _Wave(device)
        if isinstance(content, Zeroed):
            unmap = content is Zeroed.UNMAP
            device.write_zeroes(offset, length, wave.begin(offset, length, 0), unmap=unmap)
        else:
            device.write(offset, memoryview(content), wave.begin(offset, length, size))
        written += size
    await wave.finish()
    return written


class _Wave:
    """Changes under way together: none overlaps another."""

    def __init__(self, device: BlockDevice) -> None:
        self._device = device
        self._ranges: list[tuple[int, int]] = []
        self._bytes = 0
        self._active = 1
        self._ended = trio.Event()
        self._error: StorageError | None = None

    def takes(self, offset: int, length: int, size: int) -> bool:
        """Whether a change of the range, which writes `size` bytes, may join."""
        ranges = self._ranges
        if len(ranges) >= _MOST or (ranges and self._bytes + size > _MOST_BYTES):
            return False
        after = bisect_right(ranges, (offset, offset))
        if after and ranges[after - 1][1] > offset:
            return False
        return after == len(ranges) or ranges[after][0] >= offset + length

    def begin(self, offset: int, length: int, size: int) -> Done:
        """It joins; returns its completion."""
        insort(self._ranges, (offset, offset + length))
        self._bytes += size
        self._active += 1
        return self.ended

    def ended(self, error: StorageError | None) -> None:
        """One of them has ended, or (the last) all have been begun."""
        if error is not None and self._error is None:
            self._error = error
        self._active -= 1
        if not self._active:
            self._ended.set()

    async def finish(self) -> None:
        """Wait for all of them; raises the first StorageError."""
        self.ended(None)
        self._device.kick()
        await self._ended.wait()
        if self._error is not None:
            raise self._error


async def _flush(device: BlockDevice) -> None:
    wave = _Wave(device)
    device.flush(wave.begin(0, 0, 0))
    await wave.finish()
