"""Reads that cannot complete at once: split into runs, each read from its level's file."""

from __future__ import annotations

from functools import partial

from ploopd.errors import StorageError
from ploopd.storage.core import Core
from ploopd.storage.mapping import UNMAPPED
from ploopd.storage.request import Request


def read(core: Core, request: Request, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` from `offset`; the parts of `request` that this begins end by themselves."""
    size = core.map.cluster_size
    cluster = offset // size
    within = offset - cluster * size
    if within + len(buffer) <= size and cluster not in core.locks.exclusive:
        _read_within(core, request, cluster, within, buffer)
        return
    at = offset
    for run in core.map.runs(offset, len(buffer)):
        at = run.offset
        part = buffer[at - offset : at - offset + run.length]
        first = at // size
        stop = (at + run.length - 1) // size + 1
        busy = core.locks.first_exclusive(first, stop)
        if busy is not None:
            request.add_part()
            core.locks.wait(busy, partial(_again, core, request, at, part))
            continue
        if not request.begin():
            return
        if run.level == UNMAPPED:
            fill_zero(core, part)
            continue
        clusters = range(first, stop)
        core.locks.enter(clusters)
        request.add_part()
        core.sources[run.level].read(part, run.host, partial(_ended, core, request, clusters))


def _read_within(
    core: Core, request: Request, cluster: int, within: int, buffer: memoryview
) -> None:
    """The usual case, without the loop: one cluster, which nobody is changing."""
    if not request.begin():
        return
    level = core.map.level_view[cluster]
    if level == UNMAPPED:
        fill_zero(core, buffer)
        return
    core.locks.enter_one(cluster)
    request.add_part()
    host = core.map.view[cluster] * core.map.cluster_size + within
    core.sources[level].read(buffer, host, partial(ended_within, core, request, cluster))


def ended_within(core: Core, request: Request, cluster: int, error: StorageError | None) -> None:
    """The only part of `request` that works on `cluster` has ended."""
    core.locks.leave_one(cluster)
    request.ended(error)


def _again(core: Core, request: Request, offset: int, buffer: memoryview) -> None:
    if request.begin():
        read(core, request, offset, buffer)
        request.ended(None)


def _ended(core: Core, request: Request, clusters: range, error: StorageError | None) -> None:
    core.locks.leave(clusters)
    request.ended(error)


def fill_zero(core: Core, buffer: memoryview) -> None:
    """Zero `buffer`."""
    zeros = core.zeros
    for at in range(0, len(buffer), len(zeros)):
        part = buffer[at : at + len(zeros)]
        part[:] = zeros[: len(part)]
