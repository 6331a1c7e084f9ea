"""Building blocks of scripts: one device operation with its errors turned into sense.

All of them are to be used with `yield from`.  A range that is longer than `CHUNK` is worked on in
pieces, so that a command over the whole unit neither holds the event loop nor outlives its abort.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ploopd.errors import ParkTimeoutError, StorageError
from ploopd.scsi.cdb import BLOCK_SHIFT
from ploopd.scsi.execution import Script, Start
from ploopd.scsi.failures import Access, storage_sense
from ploopd.scsi.sense import CheckCondition

if TYPE_CHECKING:
    from ploopd.scsi.logical_unit import LogicalUnit

CHUNK = 1 << 20
"""Bytes moved at once."""
CLUSTERS_AT_ONCE = 64
"""Clusters discarded or zeroed at once."""


def pieces(offset: int, length: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of consecutive pieces, cut at multiples of `size`."""
    end = offset + length
    while offset < end:
        stop = min(end, (offset // size + 1) * size)
        yield offset, stop - offset
        offset = stop


def _operation(start: Start, access: Access, offset: int | None) -> Script:
    try:
        yield start
    except ParkTimeoutError:
        raise  # was never executed: BUSY, not an error
    except StorageError as error:
        lba = None if offset is None else offset >> BLOCK_SHIFT
        raise CheckCondition(storage_sense(error, access, lba)) from error


def read(unit: LogicalUnit, offset: int, view: memoryview) -> Script:
    return _operation(lambda done: unit.device.read(offset, view, done), Access.READ, offset)


def write(unit: LogicalUnit, offset: int, view: memoryview, *, fua: bool) -> Script:
    """Write `view`; it is on stable storage afterwards if `fua` or the write cache is off."""
    stable = fua or not unit.modes.write_cache
    return _operation(
        lambda done: unit.device.write(offset, view, done, fua=stable), Access.WRITE, offset
    )


def flush(unit: LogicalUnit) -> Script:
    return _operation(unit.device.flush, Access.WRITE, None)


def zero(unit: LogicalUnit, offset: int, length: int, *, unmap: bool) -> Script:
    """Make a range read as zeros, piece by piece."""
    stable = not unit.modes.write_cache
    for at, size in pieces(offset, length, unit.device.cluster_size * CLUSTERS_AT_ONCE):
        yield from _operation(_zero_piece(unit, at, size, unmap, stable), Access.WRITE, at)


def _zero_piece(unit: LogicalUnit, offset: int, length: int, unmap: bool, fua: bool) -> Start:
    return lambda done: unit.device.write_zeroes(offset, length, done, unmap=unmap, fua=fua)


def discard(unit: LogicalUnit, offset: int, length: int) -> Script:
    """Deallocate a range, piece by piece."""
    for at, size in pieces(offset, length, unit.device.cluster_size * CLUSTERS_AT_ONCE):
        yield from _operation(_discard_piece(unit, at, size), Access.WRITE, at)


def _discard_piece(unit: LogicalUnit, offset: int, length: int) -> Start:
    return lambda done: unit.device.discard(offset, length, done)
