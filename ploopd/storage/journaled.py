"""A block device that remembers the changes it has acknowledged since the last successful flush.

It stands between the gate and a volume.  The gate never has changes in execution together that
overlap, so the order of completions is the order in which changes took effect.

The journal is bounded: half full it has the volume flushed, and full it makes changes wait for that
flush.  The one exception is a change that is larger than the whole journal: it is written through.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol, runtime_checkable

from ploopd.errors import HARMLESS_ERRNOS, NO_ROOM, StorageError
from ploopd.storage.device import BlockDevice, Done, Pending
from ploopd.storage.journal import RECORD_OVERHEAD, Journal
from ploopd.storage.journaled_reads import JournaledReads, ReadingLane
from ploopd.storage.lane import lane_of
from ploopd.storage.replay import rewrite
from ploopd.storage.request import FINISHED

OnFailure = Callable[[StorageError], object]
"""Told of a flush that failed and that nobody above has asked for."""

Doubt = Callable[[], StorageError | None]
"""Why the success of a sync means nothing now, as far as somebody above knows."""


def no_doubt() -> StorageError | None:
    """Nobody above knows of any failure."""
    return None


@runtime_checkable
class SyncsAgain(Protocol):
    """A volume whose failed syncs can be made up for; see `Volume`."""

    @property
    def sync_failed(self) -> StorageError | None: ...

    def sync_again(self, rewrite: Callable[[], Awaitable[None]], done: Done) -> Pending: ...


class JournaledDevice:
    """See `BlockDevice` and the module's first lines.

    A flush that succeeds drops the records of what was acknowledged before it was started.  It is
    up to `volume` that none succeeds after a sync has failed (`BlockDevice.flush`).  Nor does one
    succeed here after a change has failed: a network file system may have written behind, and told
    of an older write's loss by failing a newer one; its next sync knows nothing of that.  Failed
    reads are known to whoever judges them: `doubt`.

    The exception is a sync that has failed for want of room, which is nobody's failure: the next
    flush writes everything in the journal again, while changes wait, and has that synced.
    """

    __slots__ = (
        "_again",
        "_ceiling",
        "_doubt",
        "_early",
        "_failure",
        "_flush_at",
        "_flushes",
        "_forcing",
        "_on_failure",
        "_reads",
        "_retired",
        "_rewriting",
        "_running",
        "_volume",
        "_waiting",
        "_write_now",
        "cluster_size",
        "extents",
        "journal",
        "kick",
        "lane",
        "read",
        "read_only",
        "size",
        "try_read",
        "try_view",
    )

    def __init__(
        self,
        volume: BlockDevice,
        journal: Journal,
        on_failure: OnFailure,
        doubt: Doubt = no_doubt,
    ) -> None:
        self.size = volume.size
        self.cluster_size = volume.cluster_size
        self.read_only = volume.read_only
        self._reads = JournaledReads(volume, journal)
        self.try_read = self._reads.try_read
        self.try_view = self._reads.try_view
        self.read = self._reads.read
        self.extents = volume.extents
        self.kick = volume.kick
        self.lane = ReadingLane(lane_of(volume), journal)
        self._write_now = volume.try_write
        self._volume = volume
        self.journal = journal
        self._on_failure = on_failure
        self._doubt = doubt
        self._waiting: deque[_Change] = deque()
        self._forcing = False
        self._failure: StorageError | None = None
        self._retired = False
        self._again = volume if isinstance(volume, SyncsAgain) else None
        self._flushes: list[Done] = []
        self._rewriting = False
        self._running = 0
        self._early = journal.limit // 2
        self._flush_at: float = self._early
        self._ceiling = journal.limit - RECORD_OVERHEAD

    # -- the block device ------------------------------------------------------------------

    def try_write(self, offset: int, buffer: memoryview) -> bool:
        """See `BlockDevice.try_write`; never when that would need a flush first."""
        journal = self.journal
        if journal.used + len(buffer) > self._ceiling:
            return False
        try:
            if not self._write_now(offset, buffer):
                return False
        except StorageError as error:
            self.failed(error)
            raise
        journal.wrote(offset, buffer)
        if journal.used > self._flush_at:
            self._force_flush()
        return True

    def write(self, offset: int, buffer: memoryview, done: Done, *, fua: bool = False) -> Pending:
        """See `BlockDevice.write`."""
        volume = self._volume
        cost = len(buffer) + RECORD_OVERHEAD

        def start(ended: Done) -> Pending:
            return volume.write(offset, buffer, ended, fua=fua)

        def record() -> None:
            self.journal.wrote(offset, buffer)

        return self._admit(_Change(self, start, record, cost, done, durable=fua))

    def write_zeroes(
        self, offset: int, length: int, done: Done, *, unmap: bool = False, fua: bool = False
    ) -> Pending:
        """See `BlockDevice.write_zeroes`."""
        volume = self._volume

        def start(ended: Done) -> Pending:
            return volume.write_zeroes(offset, length, ended, unmap=unmap, fua=fua)

        def record() -> None:
            if length:
                self.journal.zeroed(offset, length, unmap=unmap)

        return self._admit(_Change(self, start, record, RECORD_OVERHEAD, done, durable=fua))

    def discard(self, offset: int, length: int, done: Done) -> Pending:
        """See `BlockDevice.discard`."""
        volume = self._volume

        def start(ended: Done) -> Pending:
            return volume.discard(offset, length, ended)

        def record() -> None:
            if length:
                self.journal.zeroed(offset, length, unmap=True)

        return self._admit(_Change(self, start, record, RECORD_OVERHEAD, done, durable=False))

    def flush(self, done: Done) -> Pending:
        """See `BlockDevice.flush`."""
        if self._flushes or self.behind:
            self._ceiling = -1  # nothing changes from now on until it has ended
            self._flushes.append(done)
            self._make_up()
            return FINISHED
        mark = self.journal.mark()

        def ended(error: StorageError | None) -> None:
            done(self._flushed(mark, error))
            self._pump()

        return self._volume.flush(ended)

    def _flushed(self, mark: int, error: StorageError | None) -> StorageError | None:
        """A flush of what was recorded before `mark` has ended; returns what it is worth."""
        if error is not None:
            self.failed(error)
        elif not self.trusted:
            failure = self._failure or self._doubt()
            return None if failure is None else failure.again()
        elif not self._retired:
            self.journal.drop(mark)
            if self._flush_at == math.inf and not self._forcing:
                self._flush_at = self._early
        return error

    @property
    def behind(self) -> bool:
        """A sync has failed for want of room: the journal must be written again before the next."""
        return self._shortage is not None

    @property
    def _shortage(self) -> StorageError | None:
        failure = None if self._again is None else self._again.sync_failed
        if failure is None or failure.errno not in NO_ROOM or not self.trusted:
            return None
        return failure

    def _make_up(self) -> None:
        """Write the journal again when no change is in execution, and sync."""
        if self._running or self._rewriting or self._again is None:
            return
        self._rewriting = True
        mark = self.journal.mark()

        def ended(error: StorageError | None) -> None:
            self._rewriting = False
            flushes, self._flushes = self._flushes, []
            self._reopen()
            error = self._flushed(mark, error)
            for done in flushes:
                done(error)
            self._pump()

        self._again.sync_again(partial(rewrite, self.journal, self._volume), ended)
        self.kick()

    # -- trust, and the end ----------------------------------------------------------------

    def failed(self, error: StorageError) -> None:
        """Something failed: what was acknowledged before may be lost, whatever a sync says."""
        if self._failure is None and error.errno not in HARMLESS_ERRNOS:
            self._failure = error

    @property
    def trusted(self) -> bool:
        """Nothing has failed that makes the success of a sync worthless."""
        return self._failure is None and self._doubt() is None

    def trust(self) -> None:
        """An operator goes on with this storage."""
        self._failure = None

    def retire(self) -> None:
        """The volume has been let go: what still comes from it changes the journal no more."""
        self._retired = True
        self._reads.retired = True
        self._waiting.clear()
        self._flushes.clear()

    # -- room ------------------------------------------------------------------------------

    def _admit(self, change: _Change) -> Pending:
        if self._flushes:
            self._waiting.append(change)
        elif self._goes_through(change):
            change.start_through()
        elif self._waiting or not self.journal.fits(change.cost):
            self._ceiling = -1  # inline writes must not overtake those that wait
            self._waiting.append(change)
            self._force_flush()
        else:
            change.start()
        return change

    def _goes_through(self, change: _Change) -> bool:
        """Whether it is to be executed without a record, now: one that is larger than the journal.

        Not while the journal must be written again, which would overwrite it.
        """
        return change.cost > self.journal.limit and not self.behind

    def _force_flush(self) -> None:
        """Flush for the journal's sake, one at a time."""
        if self._forcing or not (self.journal or self.behind):
            return  # without a record the room is reserved: whoever has it pumps when it ends
        self._forcing = True
        self._flush_at = math.inf
        self.flush(self._forced)
        self.kick()

    def _forced(self, error: StorageError | None) -> None:
        self._forcing = False
        if error is None:
            self._flush_at = self._early
            return
        if self._retired:
            return
        # It is not tried again before a change must wait for it, or somebody's flush has succeeded.
        waiting = list(self._waiting)
        self._waiting.clear()  # in place: `_pump` may be at work on it
        self._reopen()
        self._on_failure(error)
        for change in waiting:
            change.done(error.again())

    def _pump(self) -> None:
        """Room may have become free: start those that wait, as many as fit."""
        waiting = self._waiting
        if self._flushes:
            self._make_up()
            return
        if not waiting:
            return
        while waiting and not self._flushes:
            if self._goes_through(waiting[0]):  # it came while others were held
                waiting.popleft().start_through()
            elif self.journal.fits(waiting[0].cost):
                waiting.popleft().start()
            else:
                break
        if waiting:
            self._force_flush()
        else:
            self._reopen()
            self.kick()

    def _reopen(self) -> None:
        """The inline path, as far as no change waits that it would overtake."""
        if not self._waiting and not self._flushes:
            self._ceiling = self.journal.limit - RECORD_OVERHEAD

    def ended(self, change: _Change, error: StorageError | None) -> None:
        """A change that had room reserved has ended."""
        if self._retired:
            return
        self._running -= 1
        self.journal.release(change.cost)
        if error is not None:
            self.failed(error)
        # What is durable and covers nothing that is recorded need not be remembered.
        if error is None and (self.journal or not change.durable):
            change.record()
            if self.journal.used > self._flush_at:
                self._force_flush()
        change.done(error)
        self._pump()

    def withdrawn(self, change: _Change, *, waiting: bool) -> None:
        """A change was cancelled."""
        if waiting:
            self._waiting.remove(change)
        else:
            self._running -= 1
            if change.cost <= self.journal.limit and not self._retired:
                self.journal.release(change.cost)
        self._pump()

    def started(self) -> None:
        """The volume is about to get a change."""
        self._running += 1

    def written(self, change: _Change, error: StorageError | None) -> None:
        """A change that has no room in the journal has ended, and is to be flushed."""
        self._running -= 1
        shortage = self._shortage
        if error is None and shortage is not None:
            error = shortage.again()  # it may be lost, and nobody else would write it again
        if error is None:
            self.flush(change.done)
            self.kick()
        else:
            self.failed(error)
            change.done(error)
            self._pump()


class _Change:
    """A slow change from its arrival to its completion; implements `Pending`.

    `start_it` gives it to the volume, `record` puts it into the journal, `cost` is what it takes
    there; `durable`: it is on stable storage when it ends.
    """

    __slots__ = ("_device", "_pending", "_start_it", "cost", "done", "durable", "record")

    def __init__(
        self,
        device: JournaledDevice,
        start_it: Callable[[Done], Pending],
        record: Callable[[], None],
        cost: int,
        done: Done,
        *,
        durable: bool,
    ) -> None:
        self._device = device
        self._start_it = start_it
        self._pending: Pending | None = None
        self.record = record
        self.cost = cost
        self.done = done
        self.durable = durable

    def start(self) -> None:
        """Execute it with room reserved for its record."""
        self._device.journal.reserve(self.cost)
        self._device.started()
        self._pending = FINISHED
        self._pending = self._start_it(self._ended)

    def start_through(self) -> None:
        """Execute it and have it flushed, with everything that it may overlap, before it ends."""
        self._device.started()
        self._pending = FINISHED
        self._pending = self._start_it(self._written_through)

    def cancel(self) -> bool:
        """See `Pending.cancel`."""
        if self._pending is None:
            self._device.withdrawn(self, waiting=True)
            self._pending = FINISHED
            return True
        if not self._pending.cancel():
            return False
        self._device.withdrawn(self, waiting=False)
        return True

    def _ended(self, error: StorageError | None) -> None:
        self._device.ended(self, error)

    def _written_through(self, error: StorageError | None) -> None:
        self._device.written(self, error)
