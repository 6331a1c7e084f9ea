"""What growing a delta comes to: the new header, and what is in its way.

The BAT lies between the header and the data area.  A longer one may need clusters that hold data
today; those get another place in the file first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from image_format import HEADER_SIZE, BatReport, FormatError, PvdHeader, grown_header
from image_format import bat as bat_format
from ploopd.errors import UsageError
from ploopd.fileio.file import File
from ploopd.storage.delta import Delta
from ploopd.storage.mapping import TOP, UNMAPPED, ClusterMap
from ploopd.storage.stack import Stack

Stretch = tuple[int, int]
"""Offset and length, bytes of a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A cluster of the disk gets the place `place` (a host cluster) in the top's file.

    Its bytes are at `offset` of `source`; `length` of them belong to the disk, the rest of the
    cluster becomes zeros.
    """

    cluster: int
    place: int
    source: File
    offset: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """`header` is the new one, closed; `entries` the BAT as it is, in the units of the file.

    `zeros`: stretches that become the new part of the BAT and of the disk, to be written as zeros
    when nothing is in their way any more.  `room`: stretches of the file that must have their
    blocks before anything is changed; `end`: byte after the last one in use at the end.
    """

    header: PvdHeader
    entries: npt.NDArray[np.uint32]
    moves: tuple[Move, ...]
    zeros: tuple[Stretch, ...]
    room: tuple[Stretch, ...]
    end: int


def new_header_of(delta: Delta, size: int) -> PvdHeader:
    """The header of `delta` with a disk of `size` bytes, rounded up to whole clusters.

    Raises UsageError for a size that its format version does not have.
    """
    try:
        return grown_header(delta.header, size)
    except FormatError as error:
        raise UsageError(
            error.message, path=delta.file.path, field=error.field, value=error.value
        ) from error


def plan_growth(stack: Stack, header: PvdHeader) -> Growth:
    """What is to be done to the top delta of `stack` for `header` to be its header.

    Blocking: reads the BATs.  Raises like `Stack.load_map`, UsageError if a version 1 file has no
    place left for what is in the way.
    """
    top = stack.top.delta
    assert top is not None
    cluster_map, _, report = stack.load_map()
    assert report is not None
    size, first = stack.cluster_size, header.header_clusters
    hosts = np.where(cluster_map.levels == TOP, cluster_map.hosts, np.uint32(0))
    places = _free_places(report, first, top.file.size(), size)
    moves = _moves(stack, cluster_map, hosts, first, places)
    _require_fit(top, moves)
    zeros = [(HEADER_SIZE + top.header.bat_bytes, first * size)]
    zeros[0] = (zeros[0][0], zeros[0][1] - zeros[0][0])
    tail = _tail(stack, hosts, first)
    if tail is not None:
        zeros.append(tail)
    room = [(top.header.data_offset, first * size - top.header.data_offset)]
    room += [(move.place * size, size) for move in moves]
    end = max([first, report.end_cluster, *(move.place + 1 for move in moves)])
    return Growth(
        header=header,
        entries=hosts * np.uint32(header.entry_scale),
        moves=tuple(moves),
        zeros=tuple(zeros),
        room=tuple(stretch for stretch in _joined(room) if stretch[1]),
        end=end * size,
    )


def _moves(
    stack: Stack,
    cluster_map: ClusterMap,
    hosts: npt.NDArray[np.uint32],
    first: int,
    places: Iterator[int],
) -> list[Move]:
    """What lies before the new data area, in the order of the file; and a last cluster that shows
    more of a lower delta than the disk has had so far."""
    size, file = stack.cluster_size, stack.top.file
    in_the_way = np.flatnonzero((hosts != 0) & (hosts < first))
    in_the_way = in_the_way[np.argsort(hosts[in_the_way])]
    moves = [
        Move(
            cluster=cluster,
            place=next(places),
            source=file,
            offset=int(hosts[cluster]) * size,
            length=cluster_map.cluster_length(cluster),
        )
        for cluster in in_the_way.tolist()
    ]
    last, valid = divmod(stack.size, size)
    source = _lower_source(stack, cluster_map, last) if valid else None
    if source is not None:
        offset = cluster_map.view[last] * size
        if any(source.pread(size - valid, offset + valid)):
            place = next(places)
            moves.append(
                Move(cluster=last, place=place, source=source, offset=offset, length=valid)
            )
    return moves


def _lower_source(stack: Stack, cluster_map: ClusterMap, cluster: int) -> File | None:
    """The file of the lower delta that has the cluster; None for the top, and for a raw base, which
    ends where it ends."""
    level = cluster_map.level_view[cluster]
    if level in (UNMAPPED, TOP) or level > len(stack.layers):
        return None
    layer = stack.layers[level - 1]
    return None if layer.delta is None else layer.file


def _tail(stack: Stack, hosts: npt.NDArray[np.uint32], first: int) -> Stretch | None:
    """The part of the last cluster behind the end of the disk, if it stays where it is."""
    last, valid = divmod(stack.size, stack.cluster_size)
    if not valid or hosts[last] < first:
        return None
    return int(hosts[last]) * stack.cluster_size + valid, stack.cluster_size - valid


def _free_places(report: BatReport, first: int, file_size: int, size: int) -> Iterator[int]:
    """Host clusters behind the new BAT that nothing names, lowest first, without end."""
    for start, count in report.leaks.tolist():
        yield from range(max(start, first), start + count)
    place = max(first, -(-file_size // size))
    while True:
        yield place
        place += 1


def _require_fit(top: Delta, moves: list[Move]) -> None:
    if not moves:
        return
    try:
        bat_format.encode_entry(top.header, max(move.place for move in moves))
    except FormatError as error:
        raise UsageError(
            "the file has no room for the clusters that a longer BAT would displace",
            path=top.file.path,
            field=error.field,
            value=error.value,
        ) from error


def _joined(stretches: list[Stretch]) -> list[Stretch]:
    joined: list[Stretch] = []
    for offset, length in sorted(stretches):
        if joined and sum(joined[-1]) == offset:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((offset, length))
    return joined
