"""What the paths of one open volume share: map, locks, files, free space, syncs, tasks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVarTuple

import trio

from ploopd.errors import StorageError
from ploopd.fileio.buffers import BufferPool
from ploopd.fileio.file import File
from ploopd.storage.allocator import Allocator
from ploopd.storage.bat_writer import BatWriter
from ploopd.storage.cluster_locks import ClusterLocks
from ploopd.storage.device import Done
from ploopd.storage.mapping import ClusterMap
from ploopd.storage.request import RequestCount
from ploopd.storage.space import Space
from ploopd.storage.sync_group import SyncGroup

Args = TypeVarTuple("Args")


class Source(Protocol):
    """Where the clusters of a level are read: a `fileio.file.File`, or one with a padded tail."""

    def try_read(self, buffer: memoryview, offset: int) -> bool: ...

    def read(self, buffer: memoryview, offset: int, done: Done) -> None: ...

    async def aread(self, buffer: memoryview, offset: int) -> None: ...


@dataclass(slots=True, kw_only=True, eq=False)
class Core:
    """`sources`: by level; the first stands for "nowhere" and is never used.

    `bat` and `space` are None where there is nothing to allocate: a raw image, or one opened
    read-only.  `single`: no lower delta, so that a BAT entry may be cleared.  `copies` bounds the
    copy-on-writes under way, each of which holds a cluster in memory.
    """

    map: ClusterMap
    sources: tuple[Source, ...]
    top: File
    single: bool
    sync: SyncGroup
    buffers: BufferPool
    zeros: memoryview
    copies: trio.Semaphore
    allocator: Allocator
    kick: Callable[[], None]
    bat: BatWriter | None = None
    space: Space | None = None
    locks: ClusterLocks = field(default_factory=ClusterLocks)
    requests: RequestCount = field(default_factory=RequestCount)
    nursery: trio.Nursery | None = None

    def used_end(self) -> int | None:
        """The cluster after which the top file holds nothing; None if it is not to be cut."""
        return None if self.bat is None else self.allocator.used_end()

    def make_durable(self, done: Done) -> None:
        """Call `done` when all that has ended before now is on stable storage, which includes what
        the entries in doubt are to be."""
        if self.bat is not None and self.bat.doubtful:
            self.spawn(self._settle, self.bat, done)
        else:
            self.sync.request(done)

    async def _settle(self, bat: BatWriter, done: Done) -> None:
        try:
            await bat.settle(self.locks)
        except StorageError as error:
            done(error)
        else:
            self.sync.request(done)
        self.kick()

    async def sync_again(self) -> None:
        """Sync although a sync has failed, for a caller who has written all data again that was
        written since the last good one.  Raises StorageError."""
        if self.bat is not None:
            self.bat.distrust()
            await self.bat.settle(self.locks)
        self.sync.forgive()
        await self.sync.wait()

    def spawn(self, task: Callable[[*Args], Awaitable[object]], *args: *Args) -> None:
        """Run a slow operation in the volume's nursery."""
        if self.nursery is None:
            raise RuntimeError("the volume is not running")
        self.nursery.start_soon(task, *args)
