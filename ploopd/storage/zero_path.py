"""Zeroing and discarding: the range reads as zeros afterwards, whatever lower deltas hold.

An entry of 0 means "look further down", so it is right only where there is nothing further down:

* nothing has the cluster: nothing to do;
* the top delta has it: a whole cluster that may be unmapped is freed (entry 0, hole punched, room
  reused after a sync) if there is no lower delta; otherwise it is zeroed where it is;
* only a lower delta has it: a cluster of zeros is allocated to hide it, or a part copied up.
"""

from __future__ import annotations

from typing import Final

from ploopd.errors import HARMLESS_ERRNOS, StorageError
from ploopd.storage.core import Core
from ploopd.storage.mapping import TOP, UNMAPPED
from ploopd.storage.request import Request
from ploopd.storage.write_path import copy_up

_BATCH: Final = 256
"""Clusters that are locked together."""
_PUNCH: Final = 64 << 10
"""Bytes from which zeroing by a hole is cheaper than by writing."""


def zero(core: Core, request: Request, offset: int, length: int, *, unmap: bool) -> None:
    """Zero a range; the part of `request` that this begins ends by itself."""
    if _nothing_to_do(core, offset, length):
        request.begin()
        return
    request.add_part()
    core.spawn(_zero_range, core, request, offset, length, unmap)


def _nothing_to_do(core: Core, offset: int, length: int) -> bool:
    size = core.map.cluster_size
    first, stop = offset // size, (offset + length - 1) // size + 1
    if core.locks.first_exclusive(first, stop) is not None:
        return False
    return core.map.next_mapped(first, stop) == stop


async def _zero_range(core: Core, request: Request, offset: int, length: int, unmap: bool) -> None:
    if not request.begin():
        return
    error = None
    try:
        await _zero_parts(core, offset, offset + length, unmap)
    except StorageError as failure:
        error = failure
    request.ended(error)
    core.kick()


async def _zero_parts(core: Core, offset: int, end: int, unmap: bool) -> None:
    """The parts of a cluster at both ends, and the whole clusters between.

    The last cluster of a disk that ends inside it counts as whole when all the disk has of it is.
    """
    size = core.map.cluster_size
    if end == core.map.size:
        end = core.map.clusters * size
    while offset < end:
        cluster, within = divmod(offset, size)
        if within or end - offset < size:
            length = min(size - within, end - offset)
            await _zero_part(core, cluster, within, length)
            offset += length
        else:
            await _zero_whole(core, cluster, end // size, unmap)
            offset = end // size * size


async def _zero_part(core: Core, cluster: int, within: int, length: int) -> None:
    await core.locks.acquire(cluster)
    try:
        level = core.map.level_view[cluster]
        if level == TOP:
            await _zero_bytes(core, core.map.view[cluster] * core.map.cluster_size + within, length)
        elif level != UNMAPPED:
            await copy_up(core, cluster, within, None, length)
    except StorageError:
        core.locks.unlock(cluster)
        raise
    core.locks.unlock(cluster)


async def _zero_bytes(core: Core, host: int, length: int) -> None:
    if length >= _PUNCH:
        await core.top.async_punch(host, length)
    else:
        await core.top.awrite(core.zeros[:length], host)


async def _zero_whole(core: Core, first: int, stop: int, unmap: bool) -> None:
    while True:
        # Clusters that are locked may be about to be allocated, so they are looked at as well.
        mapped = core.map.next_mapped(first, stop)
        busy = core.locks.first_exclusive(first, mapped)
        first = mapped if busy is None else busy
        if first >= stop:
            return
        batch = range(first, min(stop, first + _BATCH))
        for cluster in batch:
            await core.locks.acquire(cluster)
        try:
            for segment in list(core.map.segments(batch.start, len(batch))):
                await _zero_segment(core, segment.level, segment.first, segment.clusters, unmap)
        except StorageError:
            _unlock(core, batch)
            raise
        _unlock(core, batch)
        first = batch.stop


def _unlock(core: Core, batch: range) -> None:
    for cluster in batch:
        core.locks.unlock(cluster)


async def _zero_segment(core: Core, level: int, first: int, count: int, unmap: bool) -> None:
    """Zero locked clusters that lie together."""
    if level == UNMAPPED:
        return
    if level != TOP:
        await _hide(core, range(first, first + count), unmap)
        return
    size = core.map.cluster_size
    host = core.map.view[first]
    if unmap and core.single and core.bat is not None:
        await _free(core, first, host, count)
    else:
        # A raw file must not grow, although its last cluster may be cut short.
        length = (
            min(count * size, core.map.size - first * size) if core.bat is None else count * size
        )
        await _zero_bytes(core, host * size, length)


async def _hide(core: Core, clusters: range, unmap: bool) -> None:
    """Give clusters that lower deltas have a cluster of zeros each in the top one.

    With `unmap` the room that was allocated for them is given back to the file system: else a
    guest's `fstrim` would make a new top delta as large as its disk.
    """
    assert core.space is not None
    assert core.bat is not None
    size = core.map.cluster_size
    start = end = 0
    for cluster in clusters:
        host = await core.space.take()
        await core.bat.put(cluster, host)
        core.space.named(host)
        if host != end:
            if unmap and end:
                await core.top.async_punch(start * size, (end - start) * size)
            start = host
        end = host + 1
    if unmap:
        await core.top.async_punch(start * size, (end - start) * size)


async def _free(core: Core, first: int, host: int, count: int) -> None:
    """Clear the entries, then punch the room; it is used again after the next sync.

    Should the entries survive a crash and the hole not, or the other way round, the range reads as
    what it was or as zeros, and either is right before a flush.
    """
    assert core.bat is not None
    assert core.space is not None
    await core.bat.clear(first, count)
    size = core.map.cluster_size
    failure: StorageError | None = None
    try:
        await core.top.async_punch(host * size, count * size)
    except StorageError as error:
        # The disk reads as zeros all the same; the room is zeroed before it is used again.
        failure = error
    for cluster in range(host, host + count):
        core.space.free(cluster, zeroed=failure is None)
    if failure is not None and failure.errno not in HARMLESS_ERRNOS:
        raise failure  # a client that writes behind may tell of an older write's loss by it
