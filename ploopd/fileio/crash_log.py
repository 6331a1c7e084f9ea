"""What reached a file and what a power cut may leave of it.

The model is a disk with a volatile cache: a write that completed before a sync *began* is durable
when that sync has completed; of the others any subset, in any order, torn at sector borders, may be
on the medium after the cut.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

SECTOR = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteRecord:
    """A completed change of a file's content: `data` at `offset`.  `number` is its order."""

    number: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ResizeRecord:
    """The file got `size` bytes long; what is new reads as zeros."""

    number: int
    size: int


Record = WriteRecord | ResizeRecord


class CrashLog:
    """The changes of one file since it was first opened, and what of them is durable."""

    def __init__(self, base: bytes) -> None:
        self._base = base
        self._records: list[Record] = []
        self._durable = 0
        self._size = len(base)
        self._lock = threading.Lock()

    def wrote(self, offset: int, data: bytes) -> None:
        """A write completed."""
        with self._lock:
            number = len(self._records)
            self._records.append(WriteRecord(number=number, offset=offset, data=data))
            self._size = max(self._size, offset + len(data))

    def resized(self, size: int) -> None:
        """The file was made shorter or longer."""
        with self._lock:
            self._records.append(ResizeRecord(number=len(self._records), size=size))
            self._size = size

    def grown(self, size: int) -> None:
        """The file is at least `size` bytes long now."""
        if size > self._size:
            self.resized(size)

    def sync_began(self) -> int:
        """A mark for `synced`: what has completed by now."""
        with self._lock:
            return len(self._records)

    def synced(self, mark: int) -> None:
        """The sync that began at `mark` has completed."""
        with self._lock:
            self._durable = max(self._durable, mark)

    @property
    def unsynced(self) -> list[Record]:
        """The changes that a power cut now may lose, in order."""
        with self._lock:
            return self._records[self._durable :]

    def durable(self) -> bytes:
        """The content if everything that is not durable is lost."""
        return self.state(keep=())

    def state(
        self,
        keep: Iterable[int] | Callable[[Record], bool],
        torn: dict[int, int] | None = None,
    ) -> bytes:
        """The content with all durable changes and those of the unsynced ones that `keep` names.

        `torn`: of record `number` only the first `n` bytes, rounded down to sectors of the file,
        arrived.
        """
        with self._lock:
            records, durable = list(self._records), self._durable
        wanted = keep if callable(keep) else _contains(set(keep))
        content = bytearray(self._base)
        for record in records:
            if record.number >= durable and not wanted(record):
                continue
            _apply(content, record, None if torn is None else torn.get(record.number))
        return bytes(content)


def _contains(numbers: set[int]) -> Callable[[Record], bool]:
    return lambda record: record.number in numbers


def _apply(content: bytearray, record: Record, length: int | None) -> None:
    if isinstance(record, ResizeRecord):
        missing = record.size - len(content)
        if missing < 0:
            del content[record.size :]
        else:
            content.extend(bytes(missing))
        return
    data = record.data
    if length is not None:
        end = (record.offset + length) // SECTOR * SECTOR
        data = data[: max(end - record.offset, 0)]
    if record.offset > len(content):
        content.extend(bytes(record.offset - len(content)))
    content[record.offset : record.offset + len(data)] = data
