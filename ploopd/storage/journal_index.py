"""Which ranges of the disk the journal has records of, to be asked for every read.

Tables of buckets: each range is in the table in which it touches few of them, so that neither many
small ranges nor huge ones make anything slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

Range = tuple[int, int]
"""Offset and length in bytes."""

Bucket = Range | dict[Range, None]
"""The ranges that touch it, the last change last; nearly always it is one."""

_FINEST: Final = 16
"""Buckets of 64 KiB."""
_STEP: Final = 6
_WIDE: Final = 1 << _STEP
"""Ranges of more bytes than this many buckets go to the next table, whose buckets are as large."""
_COARSEST: Final = 64

Patch = Callable[[Range, int, int], None]
"""Told of a range, and from where to where (bytes of the disk) it is wanted."""


class JournalIndex:
    """The ranges that were added, in the order in which they were; adding one again moves it.

    What a later range covers altogether may be forgotten at once: ranges are removed in the order
    in which they were added, as far as they overlap, so it would never be seen again.
    """

    # A range that is in a coarser table comes before everything in the finer ones.  So it is put,
    # in its place, into the finer buckets at its ends, and the finer ones between are emptied.

    __slots__ = ("_coarse", "_fine", "_tables")

    def __init__(self) -> None:
        self._fine: dict[int, Bucket] = {}
        self._tables: list[tuple[int, dict[int, Bucket]]] = [
            (shift, {}) for shift in range(_FINEST + _STEP, _COARSEST, _STEP)
        ]
        self._tables.insert(0, (_FINEST, self._fine))
        self._coarse = 0
        """Not 0 if there may be something in the tables after the first."""

    def add(self, offset: int, length: int) -> None:
        """A range of one byte at least has changed."""
        first = offset >> _FINEST
        if first == (offset + length - 1) >> _FINEST:  # nearly always
            table = self._fine
            found = table.get(first)
            key = (offset, length)
            if found is None:
                table[first] = key
            else:
                _append(table, first, found, key)
            return
        for shift, table in self._tables:
            if length <= _WIDE << shift:
                self._coarse |= shift - _FINEST
                _fill(table, shift, (offset, length))
                return
            _bury(table, shift, (offset, length))

    def remove(self, key: Range) -> None:
        """There is no record of this range any more, nor of what had changed before it."""
        offset, length = key
        last = offset + length - 1
        for shift, table in self._tables:
            buckets = range(offset >> shift, (last >> shift) + 1)
            own = length <= _WIDE << shift
            for number in buckets if own else (buckets[0], buckets[-1]):
                _take_out(table, number, key)
            if own:
                return

    def replace(self, ranges: Iterable[Range]) -> None:
        """Forget all, and add these."""
        for _, table in self._tables:
            table.clear()
        self._coarse = 0
        for offset, length in ranges:
            self.add(offset, length)

    def overlaps(self, offset: int, length: int) -> bool:
        """Whether one of the ranges touches [offset, offset + length)."""
        fine = self._fine
        if not self._coarse:
            if not fine:
                return False
            first = offset >> _FINEST
            if first == (offset + length - 1) >> _FINEST:
                found = fine.get(first)
                return found is not None and _touches(found, offset, offset + length)
        end = offset + length
        for shift, table in self._tables:
            for number in _numbers(table, shift, offset, end):
                if _touches(table[number], offset, end):
                    return True
        return False

    def patch(self, offset: int, length: int, apply: Patch) -> None:
        """Call `apply` for the ranges that touch [offset, offset + length), in such an order that
        the last one that has a byte is the last that has changed it."""
        end = offset + length
        for shift, table in reversed(self._tables):
            for number in _numbers(table, shift, offset, end):
                bucket = table[number]
                start, stop = max(offset, number << shift), min(end, (number + 1) << shift)
                for key in bucket if isinstance(bucket, dict) else (bucket,):
                    low, high = max(start, key[0]), min(stop, key[0] + key[1])
                    if low < high:
                        apply(key, low, high)


def _numbers(table: dict[int, Bucket], shift: int, offset: int, end: int) -> list[int]:
    """The buckets of the table that [offset, end) touches."""
    if not table or offset >= end:
        return []
    numbers = range(offset >> shift, (end - 1 >> shift) + 1)
    if len(numbers) > len(table):
        return [number for number in table if number in numbers]
    return [number for number in numbers if number in table]


def _touches(bucket: Bucket, offset: int, end: int) -> bool:
    if not isinstance(bucket, dict):
        return bucket[0] < end and offset < bucket[0] + bucket[1]
    return any(at < end and offset < at + length for at, length in bucket)


def _fill(table: dict[int, Bucket], shift: int, key: Range) -> None:
    """Put `key` at the end of each of its buckets, alone where it covers a bucket."""
    offset, length = key
    end = offset + length
    for number in range(offset >> shift, (end - 1 >> shift) + 1):
        bucket = table.get(number)
        if bucket is None or (offset <= number << shift and end >= (number + 1) << shift):
            table[number] = key
        else:
            _append(table, number, bucket, key)


def _bury(table: dict[int, Bucket], shift: int, key: Range) -> None:
    """`key` is in a coarser table: it covers what is in these buckets, or comes after it."""
    offset, length = key
    end = offset + length
    for number in _numbers(table, shift, offset, end):
        if offset <= number << shift and end >= (number + 1) << shift:
            del table[number]
        else:
            _append(table, number, table[number], key)


def _append(table: dict[int, Bucket], number: int, bucket: Bucket, key: Range) -> None:
    if isinstance(bucket, dict):
        bucket.pop(key, None)
        bucket[key] = None
    elif bucket != key:
        table[number] = {bucket: None, key: None}


def _take_out(table: dict[int, Bucket], number: int, key: Range) -> None:
    bucket = table.get(number)
    if isinstance(bucket, dict):
        bucket.pop(key, None)
        if not bucket:
            del table[number]
    elif bucket == key:
        del table[number]
