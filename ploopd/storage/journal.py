"""Writes that were acknowledged and are not known to be on stable storage: a log in memory.

Whoever acknowledges a change records it here; a sync that succeeded drops what was recorded before
it began.  What is left, done again in its order, makes up for a storage that has lost it.

    mark = journal.mark()      # a sync begins
    journal.wrote(0, buffer)   # comes too late for it
    journal.drop(mark)         # it has succeeded: all but the last record are gone
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from ploopd.storage.journal_index import JournalIndex, Range

RECORD_OVERHEAD: Final = 448
"""Bytes of memory that a record takes beside its data, rounded up: key, object headers, its place
in a table that has just grown, and a bucket of the index that it shares with one other."""


class Zeroed(Enum):
    """What a record has in the place of data: the range reads as zeros."""

    ZEROES = "write zeroes"
    UNMAP = "unmap"


Content = bytearray | Zeroed


@dataclass(slots=True, eq=False)
class _Generation:
    """The records between two marks.

    `records` is in the order in which the changes took effect; a range that is changed again goes
    to the end, because what it was before does not matter any more.
    """

    number: int
    records: dict[Range, Content] = field(default_factory=dict)
    used: int = 0


class Journal:
    """See the module's first lines.

    `limit`: bytes that `used` should not exceed, which is up to the caller: `fits` tells, `reserve`
    keeps room for a change under way.  `used`: bytes of the records and the reservations, with
    RECORD_OVERHEAD for each record.  All offsets and lengths are bytes.

    The memory of dropped records is kept for the next ones of the same length, as far as the limit
    allows: fresh memory costs several times as much as the copy.
    """

    __slots__ = (
        "_current",
        "_index",
        "_records",
        "_sealed",
        "_spare",
        "_spare_bytes",
        "limit",
        "overlaps",
        "used",
    )

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._sealed: list[_Generation] = []
        self._current = _Generation(0)
        self._records = self._current.records
        self._index = JournalIndex()
        self.overlaps: Callable[[int, int], bool] = self._index.overlaps
        """Whether there is a record of any of the bytes: offset, length."""
        self._spare: dict[int, list[bytearray]] = {}
        self._spare_bytes = 0

    # -- what can be asked -----------------------------------------------------------------

    @property
    def held(self) -> int:
        """Bytes of the records alone."""
        return sum(each.used for each in self._sealed) + self._current.used

    @property
    def data_bytes(self) -> int:
        """Bytes of data that would be written by a replay."""
        return self.held - len(self) * RECORD_OVERHEAD

    def __len__(self) -> int:
        """The number of records."""
        return sum(len(each.records) for each in self._sealed) + len(self._records)

    def __bool__(self) -> bool:
        """Whether there is a record."""
        return bool(self._records) or any(each.records for each in self._sealed)

    def records(self) -> Iterator[tuple[Range, Content]]:
        """All records in the order in which the changes took effect; the journal must not be
        changed meanwhile."""
        for generation in (*self._sealed, self._current):
            yield from generation.records.items()

    def latest(self) -> list[tuple[Range, memoryview | Zeroed]]:
        """What the records come to: each byte once, as the last change has left it; no order."""
        covered = _Covered()
        found: list[tuple[Range, memoryview | Zeroed]] = []
        for (offset, length), content in reversed(list(self.records())):
            for start, end in covered.add(offset, offset + length):
                part: memoryview | Zeroed
                if isinstance(content, Zeroed):
                    part = content
                else:
                    part = memoryview(content)[start - offset : end - offset]
                found.append(((start, end - start), part))
        return found

    def overlay(self, offset: int, buffer: memoryview) -> None:
        """`buffer` was read at `offset`: put into it what the records have of these bytes."""
        newest_first = [self._records, *(each.records for each in reversed(self._sealed))]

        def apply(key: Range, start: int, end: int) -> None:
            content = next(records[key] for records in newest_first if key in records)
            if isinstance(content, Zeroed):
                buffer[start - offset : end - offset] = bytes(end - start)
            else:
                part = memoryview(content)[start - key[0] : end - key[0]]
                buffer[start - offset : end - offset] = part

        self._index.patch(offset, len(buffer), apply)

    # -- records ---------------------------------------------------------------------------

    def wrote(self, offset: int, buffer: memoryview) -> None:
        """A write took effect; its data is copied."""
        length = len(buffer)
        key = (offset, length)
        records = self._records
        content = records.pop(key, None)
        if not isinstance(content, bytearray):
            cost = length + RECORD_OVERHEAD
            if content is not None:
                cost -= RECORD_OVERHEAD
            self._current.used += cost
            self.used += cost
            content = self._memory(length)
        memoryview(content)[:] = buffer
        records[key] = content
        self._index.add(offset, length)

    def _memory(self, length: int) -> bytearray:
        """Room for data that is accounted for already."""
        spare = self._spare.get(length)
        if spare:
            self._spare_bytes -= length
            return spare.pop()
        if self.used + self._spare_bytes > self.limit:
            self._spare.clear()
            self._spare_bytes = 0
        return bytearray(length)

    def zeroed(self, offset: int, length: int, *, unmap: bool) -> None:
        """A range reads as zeros from now on."""
        content = self._records.pop((offset, length), None)
        if content is None:
            cost = RECORD_OVERHEAD
        else:  # it has been changed as a whole since
            cost = -length if isinstance(content, bytearray) else 0
        self._current.used += cost
        self.used += cost
        self._records[(offset, length)] = Zeroed.UNMAP if unmap else Zeroed.ZEROES
        self._index.add(offset, length)

    # -- syncs -----------------------------------------------------------------------------

    def mark(self) -> int:
        """A sync begins: what `drop` is to be given when it has succeeded."""
        if self._records:
            self._sealed.append(self._current)
            self._current = _Generation(self._current.number + 1)
            self._records = self._current.records
        return self._current.number

    def drop(self, mark: int) -> None:
        """Forget what was recorded before `mark`."""
        dropped = [each for each in self._sealed if each.number < mark]
        if not dropped:
            return
        self._sealed = [each for each in self._sealed if each.number >= mark]
        self._spare, self._spare_bytes = {}, 0
        for each in dropped:
            self.used -= each.used
            self._keep_spare(each)
        self._forget(dropped)

    def _forget(self, dropped: list[_Generation]) -> None:
        """Take what only they have out of the index; the rest has changed later."""
        if len(self) <= sum(len(each.records) for each in dropped):
            self._index.replace(key for key, _ in self.records())
            return
        left = [*(each.records for each in self._sealed), self._records]
        for each in dropped:
            for key in each.records:
                if not any(key in records for records in left):
                    self._index.remove(key)

    def _keep_spare(self, generation: _Generation) -> None:
        spare = self._spare
        for (_, length), content in generation.records.items():
            if isinstance(content, bytearray):
                spare.setdefault(length, []).append(content)
                self._spare_bytes += length

    def clear(self) -> None:
        """Forget everything, and all reservations.

        The memory is given up: a volume that was abandoned in a replay may still read it.
        """
        self._sealed = []
        self._spare, self._spare_bytes = {}, 0
        self._current = _Generation(self._current.number + 1)
        self._records = self._current.records
        self._index.replace(())
        self.used = 0

    # -- room ------------------------------------------------------------------------------

    def fits(self, cost: int) -> bool:
        """Whether there is room for `cost` bytes more, overhead included."""
        return self.used + cost <= self.limit

    def reserve(self, cost: int) -> None:
        """Keep room for a change that is under way."""
        self.used += cost

    def release(self, cost: int) -> None:
        """The change is recorded now, or has failed."""
        self.used -= cost


class _Covered:
    """A set of bytes, as sorted intervals that do not touch."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> list[Range]:
        """Add [start, end); returns the parts (start and end) that were not in it."""
        starts, ends = self._starts, self._ends
        first, last = bisect_left(ends, start), bisect_right(starts, end)
        gaps: list[Range] = []
        at = start
        for index in range(first, last):
            if at < starts[index]:
                gaps.append((at, starts[index]))
            at = max(at, ends[index])
        if at < end:
            gaps.append((at, end))
        if first < last:
            start, end = min(start, starts[first]), max(end, ends[last - 1])
        starts[first:last] = [start]
        ends[first:last] = [end]
        return gaps
