"""Writes that cannot complete at once: in place, by allocation, or by copy-on-write.

The order on the disk is always: room that reads as zeros, data, BAT entry, completion.  A write
into a cluster that nothing had needs no sync in between: should the entry survive a crash and the
data not, the cluster reads as the zeros it was.  A copy-on-write is different, for then the entry
hides data of a lower delta; so its data is synced before the entry is written.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from ploopd.errors import StorageError
from ploopd.storage.core import Core
from ploopd.storage.mapping import TOP, UNMAPPED
from ploopd.storage.request import Request


def write(core: Core, request: Request, offset: int, buffer: memoryview) -> None:
    """Write `buffer` at `offset`; the parts of `request` that this begins end by themselves."""
    size = core.map.cluster_size
    for run in core.map.runs(offset, len(buffer)):
        part = buffer[run.offset - offset : run.offset - offset + run.length]
        first = run.offset // size
        stop = (run.offset + run.length - 1) // size + 1
        if run.level == TOP and core.locks.first_exclusive(first, stop) is None:
            if not request.begin():
                return
            request.add_part()
            _in_place(core, request, range(first, stop), run.host, part)
            continue
        at = run.offset
        while len(part):
            taken = min(size - at % size, len(part))
            request.add_part()
            _write_cluster(core, request, at, part[:taken])
            part = part[taken:]
            at += taken


def _in_place(core: Core, request: Request, clusters: range, host: int, buffer: memoryview) -> None:
    core.locks.enter(clusters)
    core.top.write(buffer, host, partial(_in_place_ended, core, request, clusters))


def _in_place_ended(
    core: Core, request: Request, clusters: range, error: StorageError | None
) -> None:
    core.locks.leave(clusters)
    request.ended(error)


def _write_cluster(core: Core, request: Request, offset: int, buffer: memoryview) -> None:
    """Write within one cluster, when it is not locked; whoever comes second finds it allocated."""
    cluster, within = divmod(offset, core.map.cluster_size)
    if cluster in core.locks.exclusive:
        core.locks.wait(cluster, partial(_write_cluster, core, request, offset, buffer))
    elif not request.begin():
        return
    elif core.map.level_view[cluster] == TOP:
        host = core.map.view[cluster] * core.map.cluster_size + within
        _in_place(core, request, range(cluster, cluster + 1), host, buffer)
    else:
        start = partial(core.spawn, _allocate_and_write, core, request, cluster, within, buffer)
        core.locks.lock(cluster, start)


async def _allocate_and_write(
    core: Core, request: Request, cluster: int, within: int, buffer: memoryview
) -> None:
    error = None
    try:
        if core.map.level_view[cluster] != UNMAPPED:
            await copy_up(core, cluster, within, buffer)
        elif not is_zero(buffer):
            await _write_new(core, cluster, within, buffer)
    except StorageError as failure:
        error = failure
    core.locks.unlock(cluster)
    request.ended(error)
    core.kick()


def write_new_now(core: Core, cluster: int, within: int, buffer: memoryview) -> bool:
    """`_write_new` by plain calls, where the file can do that; False: use the slow form.

    Raises StorageError.
    """
    if is_zero(buffer):
        return True
    assert core.space is not None
    assert core.bat is not None
    host = core.space.take_now()
    if not host:
        return False
    written = False
    try:
        written = core.top.try_write(buffer, host * core.map.cluster_size + within)
    finally:
        if not written:
            core.space.give_back(host)
    if not written or not core.bat.put_now(cluster, host):
        return False
    core.space.named(host)
    return True


async def _write_new(core: Core, cluster: int, within: int, buffer: memoryview) -> None:
    """Write into a new cluster for one that nothing has."""
    assert core.space is not None
    assert core.bat is not None
    host = await core.space.take()
    try:
        await core.top.awrite(buffer, host * core.map.cluster_size + within)
    except StorageError:
        core.space.give_back(host)
        raise
    await core.bat.put(cluster, host)
    core.space.named(host)


async def copy_up(
    core: Core, cluster: int, within: int, overlay: memoryview | None, length: int = 0
) -> None:
    """Copy a cluster of a lower delta to the top one with `overlay` (None: `length` zeros) laid
    over it.

    A cluster that is overlaid whole is not read.  The caller has locked it.  Raises StorageError;
    the cluster is where it was then.
    """
    size = core.map.cluster_size
    if overlay is not None:
        length = len(overlay)
    async with core.copies:
        copy = core.buffers.take(size)
        # Cancelled means abandoned: the buffer then stays with the I/O that may be under way.
        try:
            if length < size:
                source = core.sources[core.map.level_view[cluster]]
                await source.aread(copy.view, core.map.view[cluster] * size)
            part = copy.view[within : within + length]
            part[:] = bytes(length) if overlay is None else overlay
            await _write_copy(core, cluster, copy.view)
        except StorageError:
            copy.release()
            raise
        copy.release()


async def _write_copy(core: Core, cluster: int, view: memoryview) -> None:
    assert core.space is not None
    assert core.bat is not None
    host = await core.space.take()
    try:
        await core.top.awrite(view, host * core.map.cluster_size)
        await core.sync.wait()
    except StorageError:
        core.space.give_back(host)
        raise
    await core.bat.put(cluster, host)
    core.space.named(host)


def is_zero(buffer: memoryview) -> bool:
    """True if all bytes are zero; most buffers that are not are found out by their ends."""
    if buffer[0] or buffer[-1]:
        return False
    return not np.frombuffer(buffer, dtype=np.uint8).any()
