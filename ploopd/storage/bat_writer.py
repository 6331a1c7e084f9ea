"""Writes BAT entries, and remembers those of which nobody knows whether they were written.

An entry is written by itself (4 bytes; a row of neighbours when a range is discarded), never the
table: entries are aligned, so that none is ever torn.  The map in memory changes only after the
write.

A write that failed may have happened all the same.  Its entry is *doubtful*: the cluster it would
have named is not used for anything else until the entry has been written again and synced;
`settle`, before a flush or a write with FUA ends, writes what the map says.

Entries that were written and not yet synced are remembered as well: after a sync that has failed
nobody knows of them either (`distrust`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Protocol

from image_format import PvdHeader
from image_format.bat import entry_offset
from ploopd.errors import StorageError
from ploopd.storage.allocator import Allocator
from ploopd.storage.cluster_locks import ClusterLocks
from ploopd.storage.mapping import TOP, ClusterMap

_ENTRY = struct.Struct("<I")


class EntryFile(Protocol):
    """What is used of `fileio.file.File`."""

    def try_write(self, buffer: memoryview, offset: int) -> bool: ...

    async def awrite(self, buffer: memoryview, offset: int) -> None: ...


class BatWriter:
    """The BAT of the top delta `file`; keeps `cluster_map` and `allocator` in step with it."""

    __slots__ = (
        "_allocator",
        "_doubtful",
        "_file",
        "_in_flight",
        "_map",
        "_scale",
        "_syncing",
        "_unsynced",
    )

    def __init__(
        self, file: EntryFile, header: PvdHeader, cluster_map: ClusterMap, allocator: Allocator
    ) -> None:
        self._file = file
        self._scale = header.entry_scale
        self._map = cluster_map
        self._allocator = allocator
        self._doubtful: dict[int, set[int]] = {}
        self._in_flight: dict[int, int] = {}
        self._unsynced: list[range] = []
        self._syncing: list[range] = []

    def sync_begins(self) -> None:
        """What has been written is on stable storage if the sync that begins now succeeds."""
        self._syncing, self._unsynced = self._unsynced, []

    def sync_ended(self, *, success: bool) -> None:
        """The sync announced by `sync_begins` has ended."""
        if not success:
            self._unsynced = self._syncing + self._unsynced
        self._syncing = []

    def distrust(self) -> None:
        """A sync has failed: what was written since the last good one is doubtful."""
        unsynced, self._unsynced = self._unsynced, []
        for clusters in unsynced:
            for cluster in clusters:
                self._doubtful.setdefault(cluster, set())

    @property
    def doubtful(self) -> bool:
        """True if `settle` has something to do."""
        return bool(self._doubtful)

    def referenced_by_late_writes(self) -> set[int]:
        """Host clusters that an entry may come to name without this map's knowledge."""
        hosts = set(self._in_flight.values())
        hosts.update(*self._doubtful.values())
        hosts.discard(0)
        return hosts

    def put_now(self, cluster: int, host: int) -> bool:
        """`put` by a plain call: False if that is not possible.

        The entry is doubtful then, and as well when StorageError is raised.
        """
        entry = memoryview(_ENTRY.pack(host * self._scale))
        try:
            if not self._file.try_write(entry, entry_offset(cluster)):
                self._doubt(cluster, host)
                return False
        except StorageError:
            self._doubt(cluster, host)
            raise
        self._unsynced.append(range(cluster, cluster + 1))
        self._written(cluster, host)
        return True

    async def put(self, cluster: int, host: int) -> None:
        """Write the entry of `cluster`, which the caller has locked, and change the map.

        Raises StorageError: the map is unchanged then, and `host` must not be given to anybody
        else.
        """
        await self._write(cluster, (host,))
        self._written(cluster, host)

    async def clear(self, first: int, count: int) -> None:
        """Write zeros as the entries of `count` clusters, which the caller has locked.

        Their host clusters are still the caller's, to be punched and freed.  Raises StorageError:
        the map is unchanged then.
        """
        await self._write(first, (0,) * count)
        for cluster in range(first, first + count):
            self._map.clear(cluster)
            self._settled(cluster, 0)

    async def settle(self, locks: ClusterLocks) -> None:
        """Write the doubtful entries as the map has them; raises StorageError."""
        for cluster in sorted(self._doubtful):
            await locks.acquire(cluster)
            try:
                if cluster in self._doubtful:
                    host = self._in_core(cluster)
                    await self._write(cluster, (host,))
                    self._settled(cluster, host)
            finally:
                locks.unlock(cluster)

    async def _write(self, first: int, hosts: tuple[int, ...]) -> None:
        scale = self._scale
        entries = bytearray(b"".join(_ENTRY.pack(host * scale) for host in hosts))
        for cluster, host in enumerate(hosts, first):
            self._in_flight[cluster] = host
        # If this is cancelled the volume is being abandoned and the write may still happen: what is
        # in flight stays recorded, for whoever opens the file next.
        try:
            await self._file.awrite(memoryview(entries), entry_offset(first))
        except StorageError:
            for cluster, host in enumerate(hosts, first):
                del self._in_flight[cluster]
                self._doubt(cluster, host)
            raise
        for cluster in range(first, first + len(hosts)):
            del self._in_flight[cluster]
        self._unsynced.append(range(first, first + len(hosts)))

    def _written(self, cluster: int, host: int) -> None:
        self._map.set(cluster, host)
        if self._doubtful:
            self._settled(cluster, host)

    def _doubt(self, cluster: int, host: int) -> None:
        self._doubtful.setdefault(cluster, set()).add(host)

    def _settled(self, cluster: int, host: int) -> None:
        """The entry is `host` for certain: what else it might have named is free after a sync."""
        self._release(self._doubtful.pop(cluster, ()), keep=host)

    def _release(self, hosts: Iterable[int], keep: int) -> None:
        for host in hosts:
            if host not in (0, keep):
                self._allocator.free(host, zeroed=False)

    def _in_core(self, cluster: int) -> int:
        return self._map.view[cluster] if self._map.level_view[cluster] == TOP else 0
