"""Clusters that may be written to at once: the file is extended and holes are cleaned ahead of
need.

A cluster is handed out only when it reads as zeros on stable storage, so that a request may write
its 4 KiB into it, and the BAT entry after that, without a sync in between.
"""

from __future__ import annotations

import errno

import trio

from ploopd.errors import NO_ROOM, StorageError
from ploopd.fileio.file import File
from ploopd.storage.allocator import Allocator
from ploopd.storage.sync_group import SyncGroup


class Space:
    """The free space of the top delta.

    `entries`: BAT entries, the most clusters that can ever be needed.  `step`: bytes by which the
    file is extended (less for small disks).  `max_end`: clusters a file can have for its entries
    to fit.  `unnamed`: clusters that were taken and have no entry, also when they were given back:
    what was written into them may land late.
    """

    __slots__ = (
        "_allocator",
        "_cluster",
        "_entries",
        "_file",
        "_max_end",
        "_refilling",
        "_step",
        "_sync",
        "_wanted_step",
        "unnamed",
    )

    def __init__(
        self,
        file: File,
        allocator: Allocator,
        sync: SyncGroup,
        *,
        cluster_size: int,
        entries: int,
        step: int,
        max_end: int,
    ) -> None:
        self._file = file
        self._allocator = allocator
        self._sync = sync
        self._cluster = cluster_size
        self._entries = entries
        self._max_end = max_end
        self._wanted_step = max(1, step // cluster_size)
        self._step = self._wanted_step
        self._refilling = trio.Lock()
        self.unnamed: set[int] = set()

    async def take(self) -> int:
        """A cluster that reads as zeros on stable storage and that nothing names.

        Raises StorageError; with one of NO_ROOM nothing has been changed.
        """
        while True:
            host = self.take_now()
            if host:
                return host
            async with self._refilling:
                if not self._allocator.free_zero:
                    await self._refill()

    def give_back(self, host: int) -> None:
        """`host` was taken and not used; what is in it is unknown now."""
        self._allocator.add_unknown(host, 1)

    def free(self, host: int, *, zeroed: bool) -> None:
        """`host` has lost its BAT entry; `zeroed`: and a hole was punched."""
        self._allocator.free(host, zeroed=zeroed)

    def take_now(self) -> int:
        """Like `take`, by a plain call; 0 if there is none without I/O."""
        host = self._allocator.take()
        if host:
            self.unnamed.add(host)
        return host

    def named(self, host: int) -> None:
        """`host` was taken, and has its BAT entry now."""
        self.unnamed.discard(host)

    async def _refill(self) -> None:
        """Make at least one cluster usable, the cheapest way first."""
        if self._allocator.has_unknown:
            await self._clean_holes()
        elif self._allocator.has_pending:
            await self._sync.wait()
        else:
            await self._extend()

    async def _clean_holes(self) -> None:
        holes = self._allocator.claim_unknown(self._wanted_step)
        cleaned = False
        try:
            for start, count in holes:
                await self._file.async_punch(start * self._cluster, count * self._cluster)
            await self._sync.wait()
            cleaned = True
        finally:
            give_back = self._allocator.add_zero if cleaned else self._allocator.add_unknown
            for start, count in holes:
                give_back(start, count)

    async def _extend(self) -> None:
        start = self._allocator.end
        room = min(self._entries - self._allocator.used, self._max_end - start)
        count = min(self._step, max(1, room))
        if start >= self._max_end:
            raise StorageError(errno.EFBIG, "extend", path=self._file.path)
        try:
            await self._allocate(start, count)
        except StorageError as error:
            if error.errno not in NO_ROOM or count == 1:
                raise
            # Almost full: go on cluster by cluster, and in growing steps when there is room again.
            count = self._step = 1
            await self._allocate(start, count)
        else:
            self._step = min(self._wanted_step, self._step * 2)
        await self._sync.wait()
        self._allocator.extended(count)

    async def _allocate(self, start: int, count: int) -> None:
        await self._file.async_allocate(start * self._cluster, count * self._cluster)
