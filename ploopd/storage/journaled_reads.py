"""Reads of a device with a journal: what the volume answers, and over it what the journal holds.

A storage that is about to fail may answer reads with what was there before the writes that it has
lost, and no error; that of the write comes later.  What such writes were is in the journal.

A read sees every change that was acknowledged before it began, and of those that are acknowledged
while it is executed either state.  So the records that count are those that are there when it has
ended; a record that was dropped meanwhile is on stable storage, where the read has found it.
"""

from __future__ import annotations

from ploopd.errors import StorageError
from ploopd.fileio.view import TryView
from ploopd.storage.device import BlockDevice, Done, Pending, views_of
from ploopd.storage.journal import Journal
from ploopd.storage.lane import Lane, LaneRequest


class ReadingLane:
    """The `Lane` of a device below, for reads of what the journal has nothing of.

    Writes must be recorded, which needs room.
    """

    __slots__ = ("_begin", "_lane", "_overlaps", "adopt", "empty", "ended", "first", "usable")

    def __init__(self, lane: Lane, journal: Journal) -> None:
        self._lane = lane
        self._begin = lane.begin
        self._overlaps = journal.overlaps
        self.usable = lane.usable
        self.first = lane.first
        self.adopt = lane.adopt
        self.ended = lane.ended
        self.empty = lane.empty

    def begin(self, request: LaneRequest) -> bool:
        """See `Lane.begin`."""
        if request.writing or self._overlaps(request.offset, request.length):
            return False
        return self._begin(request)

    def __len__(self) -> int:
        return len(self._lane)


class JournaledReads:
    """The reads of `volume` with `journal` over them."""

    __slots__ = ("_journal", "_overlaps", "_read", "_read_now", "_view", "retired")

    def __init__(self, volume: BlockDevice, journal: Journal) -> None:
        self._journal = journal
        self._overlaps = journal.overlaps
        self._read_now = volume.try_read
        self._read = volume.read
        self._view: TryView = views_of(volume)
        self.retired = False
        """The journal is another volume's: what still ends is nobody's any more."""

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        """See `BlockDevice.try_read`."""
        if not self._read_now(offset, buffer):
            return False
        if self._overlaps(offset, len(buffer)):
            self._journal.overlay(offset, buffer)
        return True

    def try_view(self, offset: int, length: int) -> memoryview | None:
        """See `HasViews.try_view`; none of what the journal has something of."""
        return None if self._overlaps(offset, length) else self._view(offset, length)

    def read(self, offset: int, buffer: memoryview, done: Done) -> Pending:
        """See `BlockDevice.read`."""
        if not self._overlaps(offset, len(buffer)):
            return self._read(offset, buffer, done)

        def ended(error: StorageError | None) -> None:
            if error is None and not self.retired:
                self._journal.overlay(offset, buffer)
            done(error)

        return self._read(offset, buffer, ended)
