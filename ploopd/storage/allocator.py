"""Which clusters of the top delta's file are free, and what is known of their content.

A free cluster is in one of these states, and moves only downwards:

* *unknown*: nobody knows what is in it (a hole found at open, a cluster whose write failed).  It
  must be zeroed, and that synced, before it is used;
* *pending*: its BAT entry was cleared, but that is not yet on stable storage.  Using it now could
  give one cluster to two entries after a crash;
* *zero*: it reads as zeros on stable storage and nothing refers to it.  It may be used at once.

Free space is kept as runs, so that the cost is that of the fragments and not of the file.  Pure:
the reading, punching and syncing is done by `ploopd.storage.space`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

Extent = tuple[int, int]
"""First cluster and count."""


class Allocator:
    """Free clusters of a file whose data area begins at cluster `first` and ends at `end`.

    `holes`: the runs that no BAT entry names; they are of unknown content.
    """

    __slots__ = (
        "_cursor",
        "_limit",
        "_pending",
        "_syncing",
        "_unknown",
        "_withdrawn",
        "_zero",
        "end",
        "first",
        "free_zero",
    )

    def __init__(self, *, first: int, end: int, holes: Iterable[Extent] = ()) -> None:
        self.first = first
        self.end = max(first, end)
        self.free_zero = 0
        self._zero: list[Extent] = []
        self._cursor = self._limit = 0
        self._unknown: list[Extent] = [(start, count) for start, count in holes if count]
        heapq.heapify(self._unknown)
        self._pending: list[tuple[int, bool]] = []
        self._syncing: list[tuple[int, bool]] | None = None
        self._withdrawn: set[int] = set()

    @property
    def used(self) -> int:
        """Clusters of the data area that are not free."""
        free = self.free_zero + sum(count for _, count in self._unknown)
        free += len(self._pending) + len(self._syncing or ())
        return self.end - self.first - free

    @property
    def has_unknown(self) -> bool:
        """True if clusters could be made usable by zeroing them."""
        return bool(self._unknown)

    @property
    def has_pending(self) -> bool:
        """True if clusters could be made usable by a sync."""
        return bool(self._pending) or bool(self._syncing)

    def take(self) -> int:
        """A cluster that reads as zeros, the lowest there is; 0 if there is none now."""
        if self._cursor == self._limit:
            if not self._zero:
                return 0
            start, count = heapq.heappop(self._zero)
            self._cursor, self._limit = start, start + count
        host = self._cursor
        self._cursor += 1
        self.free_zero -= 1
        return host

    def add_zero(self, start: int, count: int) -> None:
        """These clusters read as zeros on stable storage, and nothing names them."""
        if self._cursor != self._limit:
            heapq.heappush(self._zero, (self._cursor, self._limit - self._cursor))
        heapq.heappush(self._zero, (start, count))
        self._cursor = self._limit = 0
        self.free_zero += count

    def add_unknown(self, start: int, count: int) -> None:
        """These clusters are free, with unknown content."""
        heapq.heappush(self._unknown, (start, count))

    def claim_unknown(self, limit: int) -> list[Extent]:
        """At most `limit` (≥ 1) clusters of unknown content, lowest first.

        They are the caller's, who zeroes them and gives them back with `add_zero`, or with
        `add_unknown` when that fails.
        """
        claimed: list[Extent] = []
        while limit and self._unknown:
            start, count = heapq.heappop(self._unknown)
            part = min(count, limit)
            if part < count:
                heapq.heappush(self._unknown, (start + part, count - part))
            if claimed and sum(claimed[-1]) == start:
                claimed[-1] = (claimed[-1][0], claimed[-1][1] + part)
            else:
                claimed.append((start, part))
            limit -= part
        return claimed

    def extended(self, count: int) -> None:
        """The file has been extended by `count` clusters that read as zeros on stable storage."""
        start = self.end
        self.end += count
        runs = [(start, count)]
        for host in self._withdrawn:
            runs = _without(runs, host)
        for run in runs:
            self.add_zero(*run)

    def free(self, host: int, *, zeroed: bool) -> None:
        """`host` lost its BAT entry; it is free after the next sync that begins later.

        `zeroed`: a hole was punched, so that it reads as zeros then.
        """
        self._pending.append((host, zeroed))

    def sync_begins(self) -> None:
        """What is pending now becomes free if the sync that begins now succeeds."""
        if self._syncing is not None:
            raise ValueError("one sync at a time")
        self._syncing = self._pending
        self._pending = []

    def sync_ended(self, *, success: bool) -> None:
        """The sync announced by `sync_begins` has ended."""
        freed, self._syncing = self._syncing or [], None
        if not success:
            self._pending = freed + self._pending
            return
        for zeroed in (True, False):
            hosts = sorted(host for host, is_zero in freed if is_zero is zeroed)
            for start, count in _runs(hosts):
                if zeroed:
                    self.add_zero(start, count)
                else:
                    self.add_unknown(start, count)

    def withdraw(self, hosts: Iterable[int]) -> None:
        """Never use these clusters, whether they are holes now or the file is extended by them:
        somebody else's late write may still come to refer to them, or to change them."""
        for host in hosts:
            self._withdrawn.add(host)
            self._unknown = _without(self._unknown, host)
            heapq.heapify(self._unknown)

    def used_end(self) -> int:
        """One after the last cluster in use: the file may be cut here when it is closed."""
        end = self.end
        free = list(self._zero) + list(self._unknown)
        free += [(host, 1) for host, _ in (*self._pending, *(self._syncing or ()))]
        if self._cursor != self._limit:
            free.append((self._cursor, self._limit - self._cursor))
        free.sort(reverse=True)
        for start, count in free:
            if start + count != end:
                break
            end = start
        return end


def _runs(hosts: list[int]) -> list[Extent]:
    runs: list[Extent] = []
    for host in hosts:
        if runs and sum(runs[-1]) == host:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((host, 1))
    return runs


def _without(runs: list[Extent], host: int) -> list[Extent]:
    kept: list[Extent] = []
    for start, count in runs:
        if start <= host < start + count:
            kept += [(start, host - start), (host + 1, start + count - host - 1)]
        else:
            kept.append((start, count))
    return [(start, count) for start, count in kept if count]
