"""An open disk: the `BlockDevice` over a chain of deltas.

`try_read` and `try_write` are the hot path: look the cluster up, call the file, return.
Everything that may have to wait is in `read_path`, `write_path` and `zero_path`, on the shared
`Core`; opening and closing are in `opener`, `stack` and `closing`.
"""

from __future__ import annotations

import errno
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Protocol

import trio

from ploopd.errors import StorageError
from ploopd.fileio.file import File
from ploopd.fileio.policy import Policy, may_lose_written
from ploopd.fileio.view import no_view
from ploopd.storage import closing, read_path, write_path, zero_path
from ploopd.storage.core import Core
from ploopd.storage.device import Done, Extent, ExtentKind, Pending
from ploopd.storage.mapping import TOP, UNMAPPED, Run
from ploopd.storage.request import FINISHED, Request
from ploopd.storage.stack import LayerInfo, Stack
from ploopd.storage.volume_lane import VolumeLane


class Kicker(Protocol):
    """What is used of `fileio.engine.IoEngine`."""

    def kick(self) -> None: ...


class Volume:
    """See `BlockDevice`; made by `ploopd.storage.opener.open_volume`.

    `run` must be running while requests are made, and the engine as well.  `path` is what was
    opened, `format_version` 0 for raw, `notes` what was found at open, for the log.
    """

    __slots__ = (
        "_core",
        "_exclusive",
        "_hosts",
        "_inline_allocation",
        "_kick",
        "_levels",
        "_open",
        "_readers",
        "_stack",
        "_stop",
        "_top_view",
        "_top_write",
        "_viewers",
        "_zeros",
        "cluster_size",
        "format_version",
        "identity",
        "lane",
        "layers",
        "notes",
        "path",
        "read_only",
        "size",
    )

    def __init__(
        self,
        core: Core,
        stack: Stack,
        engine: Kicker,
        *,
        path: str,
        identity: uuid.UUID,
        notes: list[str],
    ) -> None:
        self.path = path
        self.identity = identity
        self.notes = notes
        self.size = core.map.size
        self.cluster_size = core.map.cluster_size
        self.read_only = stack.read_only
        self.format_version = stack.version
        self.layers: list[LayerInfo] = stack.describe()
        self._core = core
        self._stack = stack
        self._stop = trio.Event()
        self._open = True
        self._kick = engine.kick
        self._levels = core.map.level_view
        self._hosts = core.map.view
        self._exclusive = core.locks.exclusive
        self._readers = tuple(source.try_read for source in core.sources)
        self._viewers = tuple(
            source.try_view if isinstance(source, File) else no_view for source in core.sources
        )
        self.lane = VolumeLane(core, read_only=self.read_only)
        self._top_write = _not_now if self.read_only else core.top.try_write
        self._top_view = no_view if self.read_only else core.top.try_write_view
        self._zeros = core.zeros
        self._inline_allocation = core.bat is not None and core.top.policy is Policy.INLINE

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        """See `BlockDevice.try_read`."""
        size = self.cluster_size
        cluster = offset // size
        within = offset - cluster * size
        if within + len(buffer) > size:
            return self._try_read_runs(offset, buffer)
        if cluster in self._exclusive:
            return False
        level = self._levels[cluster]
        if level:
            return self._readers[level](buffer, self._hosts[cluster] * size + within)
        if len(buffer) <= len(self._zeros):
            buffer[:] = self._zeros[: len(buffer)]
        else:
            read_path.fill_zero(self._core, buffer)
        return True

    def _try_read_runs(self, offset: int, buffer: memoryview) -> bool:
        size = self.cluster_size
        stop = (offset + len(buffer) - 1) // size + 1
        if self._exclusive and self._core.locks.first_exclusive(offset // size, stop) is not None:
            return False
        readers = self._readers
        for level, host, at, length in self._core.map.runs(offset, len(buffer)):
            part = buffer[at - offset : at - offset + length]
            if level == UNMAPPED:
                read_path.fill_zero(self._core, part)
            elif not readers[level](part, host):
                return False
        return True

    def try_view(self, offset: int, length: int) -> memoryview | None:
        """See `HasViews.try_view`: for what is in one piece of one file."""
        size = self.cluster_size
        cluster = offset // size
        within = offset - cluster * size
        if within + length > size:
            run = self._one_run(offset, length)
            return None if run is None else self._viewers[run.level](run.host, length)
        level = self._levels[cluster]
        if not level or cluster in self._exclusive:
            return None
        return self._viewers[level](self._hosts[cluster] * size + within, length)

    def try_write_view(self, offset: int, length: int) -> memoryview | None:
        """See `HasWriteViews.try_write_view`: for what is in one piece of the top file."""
        size = self.cluster_size
        cluster = offset // size
        within = offset - cluster * size
        if within + length > size:
            run = self._one_run(offset, length)
            return None if run is None or run.level != TOP else self._top_view(run.host, length)
        if self._levels[cluster] != TOP or cluster in self._exclusive:
            return None
        return self._top_view(self._hosts[cluster] * size + within, length)

    def _one_run(self, offset: int, length: int) -> Run | None:
        """Several clusters that lie together in one file and are not being changed, or None."""
        size = self.cluster_size
        stop = (offset + length - 1) // size + 1
        if self._exclusive and self._core.locks.first_exclusive(offset // size, stop) is not None:
            return None
        run = next(self._core.map.runs(offset, length))
        return None if run.length != length or run.level == UNMAPPED else run

    def try_write(self, offset: int, buffer: memoryview) -> bool:
        """See `BlockDevice.try_write`."""
        size = self.cluster_size
        cluster = offset // size
        within = offset - cluster * size
        if within + len(buffer) > size:
            return self._try_write_runs(offset, buffer)
        if cluster in self._exclusive:
            return False
        level = self._levels[cluster]
        if level == TOP:
            return self._top_write(buffer, self._hosts[cluster] * size + within)
        if level or not self._inline_allocation:
            return False
        return write_path.write_new_now(self._core, cluster, within, buffer)

    def _try_write_runs(self, offset: int, buffer: memoryview) -> bool:
        size = self.cluster_size
        stop = (offset + len(buffer) - 1) // size + 1
        if self._exclusive and self._core.locks.first_exclusive(offset // size, stop) is not None:
            return False
        runs = list(self._core.map.runs(offset, len(buffer)))
        inline_allocation = self._inline_allocation
        for run in runs:
            if run.level != TOP and (run.level or not inline_allocation):
                return False
        for level, host, at, length in runs:
            part = buffer[at - offset : at - offset + length]
            if level == TOP:
                if not self._top_write(part, host):
                    return False
            elif not self._try_write_new(at, part):
                return False
        return True

    def _try_write_new(self, offset: int, buffer: memoryview) -> bool:
        size = self.cluster_size
        while len(buffer):
            cluster, within = divmod(offset, size)
            part = buffer[: size - within]
            if not write_path.write_new_now(self._core, cluster, within, part):
                return False
            offset += len(part)
            buffer = buffer[len(part) :]
        return True

    def read(self, offset: int, buffer: memoryview, done: Done) -> Pending:
        """See `BlockDevice.read`."""
        if not self._open:
            return self._refuse(done, errno.ESHUTDOWN, "read")
        request = Request(self._core.requests, done)
        read_path.read(self._core, request, offset, buffer)
        request.ended(None)
        return request

    def write(self, offset: int, buffer: memoryview, done: Done, *, fua: bool = False) -> Pending:
        """See `BlockDevice.write`."""
        refused = self._not_writable()
        if refused:
            return self._refuse(done, refused, "write")
        request = Request(self._core.requests, done, self._core.make_durable if fua else None)
        write_path.write(self._core, request, offset, buffer)
        request.ended(None)
        return request

    def write_zeroes(
        self, offset: int, length: int, done: Done, *, unmap: bool = False, fua: bool = False
    ) -> Pending:
        """See `BlockDevice.write_zeroes`."""
        refused = self._not_writable()
        if refused:
            return self._refuse(done, refused, "write")
        request = Request(self._core.requests, done, self._core.make_durable if fua else None)
        if length:
            zero_path.zero(self._core, request, offset, length, unmap=unmap)
        request.ended(None)
        return request

    def discard(self, offset: int, length: int, done: Done) -> Pending:
        """See `BlockDevice.discard`."""
        return self.write_zeroes(offset, length, done, unmap=True)

    def flush(self, done: Done) -> Pending:
        """See `BlockDevice.flush`.  After a failed sync every flush fails: see `SyncGroup`."""
        if not self._open:
            return self._refuse(done, errno.ESHUTDOWN, "flush")
        if self.read_only:
            done(None)
            return FINISHED
        request = Request(self._core.requests, done, self._core.make_durable)
        request.begin()
        request.ended(None)
        return request

    @property
    def sync_failed(self) -> StorageError | None:
        """Why no flush succeeds; None while they may."""
        return self._core.sync.failed

    def sync_again(self, rewrite: Callable[[], Awaitable[None]], done: Done) -> Pending:
        """A flush that may succeed although a sync has failed, because `rewrite` does all changes
        since the last good one again.  There must be no others meanwhile.

        Only for a failure that has left the file as usable as it was: a storage without room.
        """
        if not self._open:
            return self._refuse(done, errno.ESHUTDOWN, "flush")
        request = Request(self._core.requests, done)
        request.begin()
        self._core.spawn(self._sync_again, rewrite, request)
        return request

    async def _sync_again(self, rewrite: Callable[[], Awaitable[None]], request: Request) -> None:
        error = None
        try:
            await rewrite()
            await self._core.sync_again()
        except StorageError as failure:
            error = failure
        request.ended(error)
        self._kick()

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """See `BlockDevice.extents`."""
        if not length:
            return
        size, end = self.cluster_size, offset + length
        first, stop = offset // size, (end - 1) // size + 1
        for segment in self._core.map.segments(first, stop - first):
            at = max(offset, segment.first * size)
            length = min(end, (segment.first + segment.clusters) * size) - at
            if segment.level == UNMAPPED:
                yield Extent(offset=at, length=length, kind=ExtentKind.HOLE)
                continue
            layer = self.layers[min(segment.level, len(self.layers)) - 1]
            yield Extent(
                offset=at,
                length=length,
                kind=ExtentKind.DATA,
                depth=layer.level,
                path=layer.path,
                host_offset=segment.host * size + at - segment.first * size,
            )

    def kick(self) -> None:
        """See `BlockDevice.kick`."""
        self._kick()

    def allocated_bytes(self) -> int:
        """Bytes of the clusters that the top delta has."""
        return self._core.map.in_top() * self.cluster_size

    def mapped_bytes(self) -> int:
        """Bytes of the clusters that some file of the chain has: what does not read as a hole."""
        return min(self.size, self._core.map.in_any() * self.cluster_size)

    async def probe_write(self) -> None:
        """Write the beginning of the top file again as it is, and sync; raises StorageError.

        Tells whether the storage takes writes.  Not to be used while requests are under way.
        """
        await closing.probe(self._core, self._stack)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the slow operations until the volume is closed or abandoned."""
        async with trio.open_nursery() as nursery:
            self._core.nursery = nursery
            task_status.started()
            await self._stop.wait()
            self._core.nursery = None

    async def close(self) -> None:
        """Wait for the requests, sync, give the preallocation back, clear the in-use word, unlock.

        Raises StorageError when that failed, or a sync before did: the in-use word stays set then,
        and the files are closed all the same.
        """
        if not self._open:
            return
        self._refuse_all()
        try:
            await closing.close(self._core, self._stack)
        finally:
            self._stop.set()

    def doubt(self) -> None:
        """Leave the in-use word set when it is closed, so that whoever opens it next checks it."""
        self._stack.in_doubt = True

    def abandon(self) -> None:
        """Let go of a dead storage at once.

        Nothing is written or waited for; requests under way end late or never.  The in-use word
        stays as it is.
        """
        self._refuse_all()
        if self._core.nursery is not None:
            self._core.nursery.cancel_scope.cancel()
        self._stop.set()
        self._stack.abandon()
        self._core.requests.abandoned()

    def renamed(self, level: int, path: str) -> None:
        """The file of `level` was given another name while it is open."""
        self.layers = self._stack.renamed(level, path)

    @property
    def filesystem(self) -> str:
        """The type of the file system that the top is on, "unknown" if nobody says."""
        return self._stack.top.file.filesystem

    @property
    def remote(self) -> bool:
        """Whether some of its files have a server behind them, or nobody knows."""
        return any(may_lose_written(each.file.filesystem) for each in self._stack.layers)

    def inode_numbers(self) -> set[tuple[int, int]]:
        """Device and inode of the files, for a volume that is opened in place of this one."""
        return self._stack.inode_numbers()

    @property
    def in_flight(self) -> int:
        """Operations of its files that have not come back from the kernel, also once abandoned."""
        return self._stack.in_flight

    def late_references(self) -> set[int]:
        """Host clusters of the top that a late BAT write of this volume may come to name, or that a
        late write of data may come to change although nothing names them."""
        bat, space = self._core.bat, self._core.space
        if bat is None or space is None:
            return set()
        return bat.referenced_by_late_writes() | space.unnamed

    def withdraw(self, hosts: Iterable[int]) -> None:
        """Never use these host clusters of the top, as far as they are free: see
        `late_references`.  Before it is used."""
        self._core.allocator.withdraw(hosts)

    def _refuse_all(self) -> None:
        """No request begins from now on; what would have ended at once gets an error slowly."""
        self._open = False
        self._inline_allocation = False
        self._top_write = _not_now
        self._top_view = no_view
        self._readers = (_not_now,) * len(self._readers)
        self._viewers = (no_view,) * len(self._viewers)
        self.lane.close()

    def _not_writable(self) -> int:
        if not self._open:
            return errno.ESHUTDOWN
        return errno.EROFS if self.read_only else 0

    def _refuse(self, done: Done, number: int, op: str) -> Pending:
        done(StorageError(number, op, path=self.path))
        return FINISHED


def _not_now(buffer: memoryview, offset: int) -> bool:
    """The inline path of a closed file."""
    return False
