"""Where every cluster of the disk is: the BATs of a whole chain merged into two flat arrays.

For each virtual cluster there is a *level* byte and a *host* cluster index.  Level 0 means that no
delta has the cluster: it reads as zeros.  Level 1 is the top delta, 2 the one below it, and so on;
a raw base whose last cluster is cut short has one level more, for that cluster.  The host index
counts clusters from the start of that level's file.  Scalars are looked up through memoryviews (35
ns), whole images are handled by numpy, and nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Indexes = npt.NDArray[np.uint32]
Levels = npt.NDArray[np.uint8]

UNMAPPED: Final = 0
TOP: Final = 1
MAX_LEVELS: Final = 128
"""Deltas in one chain (ploop-format: vz7 refuses more); one level byte has room for them."""

_CHUNK: Final = 1 << 20
_SEGMENT_CHUNK: Final = 1 << 16


class Run(NamedTuple):
    """Bytes of the disk that lie together in one file, or nowhere (`level` 0).

    `offset`, `length`: bytes of the virtual disk.  `host`: byte in the level's file, 0 if unmapped.
    """

    level: int
    host: int
    offset: int
    length: int


class Segment(NamedTuple):
    """Whole clusters that lie together, from virtual cluster `first` and host cluster `host`."""

    level: int
    host: int
    first: int
    clusters: int


class ClusterMap:
    """The merged map of a disk of `size` bytes in clusters of `cluster_size`."""

    __slots__ = ("cluster_size", "clusters", "hosts", "level_view", "levels", "size", "view")

    def __init__(self, *, size: int, cluster_size: int, hosts: Indexes, levels: Levels) -> None:
        self.size = size
        self.cluster_size = cluster_size
        self.clusters = -(-size // cluster_size)
        self.hosts = hosts
        self.levels = levels
        self.view = hosts.data
        self.level_view = levels.data

    @classmethod
    def from_top(cls, indexes: Indexes, *, size: int, cluster_size: int) -> ClusterMap:
        """The map of a single delta; `indexes` (0: none) becomes the map's own array.

        Entries beyond the size of the disk are left out.
        """
        count = -(-size // cluster_size)
        hosts = indexes[:count]
        if hosts.size < count:
            hosts = np.concatenate((hosts, np.zeros(count - hosts.size, dtype=np.uint32)))
        levels = np.zeros(count, dtype=np.uint8)
        for start in range(0, count, _CHUNK):
            levels[start : start + _CHUNK] = hosts[start : start + _CHUNK] != 0
        return cls(size=size, cluster_size=cluster_size, hosts=hosts, levels=levels)

    @classmethod
    def linear(cls, *, size: int, cluster_size: int) -> ClusterMap:
        """The map of a raw file that is the whole disk."""
        count = -(-size // cluster_size)
        return cls(
            size=size,
            cluster_size=cluster_size,
            hosts=np.arange(count, dtype=np.uint32),
            levels=np.ones(count, dtype=np.uint8),
        )

    def add_delta(self, level: int, indexes: Indexes) -> None:
        """Put the next lower delta beneath: its entries show where nothing above has one.

        It may be shorter than the disk: then it has nothing for the rest.
        """
        count = min(self.clusters, indexes.size)
        for start in range(0, count, _CHUNK):
            stop = min(start + _CHUNK, count)
            lower = indexes[start:stop]
            levels = self.levels[start:stop]
            shows = (levels == UNMAPPED) & (lower != 0)
            levels[shows] = level
            self.hosts[start:stop][shows] = lower[shows]

    def add_raw(self, level: int, file_size: int) -> bool:
        """Put a raw base of `file_size` bytes beneath: everything inside it is allocated there.

        True if its last cluster is cut short and shows: that cluster gets `level` + 1, whose reader
        fills up with zeros.
        """
        whole, rest = divmod(file_size, self.cluster_size)
        count = min(self.clusters, whole)
        for start in range(0, count, _CHUNK):
            stop = min(start + _CHUNK, count)
            levels = self.levels[start:stop]
            shows = levels == UNMAPPED
            levels[shows] = level
            self.hosts[start:stop][shows] = np.arange(start, stop, dtype=np.uint32)[shows]
        if rest == 0 or whole >= self.clusters or self.levels[whole] != UNMAPPED:
            return False
        self.levels[whole] = level + 1
        self.hosts[whole] = whole
        return True

    def set(self, cluster: int, host: int) -> None:
        """The top delta has `cluster` at `host` from now on."""
        self.view[cluster] = host
        self.level_view[cluster] = TOP

    def clear(self, cluster: int) -> None:
        """Nothing has `cluster` any more; only right where no lower delta has it."""
        self.level_view[cluster] = UNMAPPED
        self.view[cluster] = 0

    def next_mapped(self, first: int, stop: int) -> int:
        """The first cluster in [first, stop) that something has, or `stop`."""
        step = 64
        while first < stop:
            found = np.flatnonzero(self.levels[first : min(first + step, stop)])
            if found.size:
                return first + int(found[0])
            first += step
            step = min(step * 8, _CHUNK)
        return stop

    def in_top(self) -> int:
        """How many clusters the top delta has."""
        return int(np.count_nonzero(self.levels == TOP))

    def in_any(self) -> int:
        """How many clusters some file of the chain has."""
        return int(np.count_nonzero(self.levels))

    def cluster_length(self, cluster: int) -> int:
        """Bytes of the disk in `cluster`: less than a cluster only at the end of the disk."""
        return min(self.cluster_size, self.size - cluster * self.cluster_size)

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """The runs of a byte range, ascending and without gaps, neighbours in one file merged.

        For ranges of a request's size; `segments` is for those of a disk's.
        """
        size, levels, hosts = self.cluster_size, self.level_view, self.view
        end = offset + length
        while offset < end:
            cluster = offset // size
            level = levels[cluster]
            within = offset - cluster * size
            host = hosts[cluster] * size + within if level else 0
            taken = size - within
            while taken < end - offset:
                cluster += 1
                if levels[cluster] != level:
                    break
                if level and hosts[cluster] * size != host + taken:
                    break
                taken += size
            taken = min(taken, end - offset)
            yield Run(level, host, offset, taken)
            offset += taken

    def segments(self, first: int, count: int) -> Iterator[Segment]:
        """The runs of whole clusters in [first, first + count), ascending, neighbours merged.

        Vectorised: a hole of a million clusters costs milliseconds.  The map must not change while
        this is being iterated, except behind the place reached.
        """
        last: Segment | None = None
        for start in range(first, first + count, _SEGMENT_CHUNK):
            stop = min(start + _SEGMENT_CHUNK, first + count)
            for segment in self._chunk_segments(start, stop):
                if last is None:
                    last = segment
                elif _continues(last, segment):
                    last = last._replace(clusters=last.clusters + segment.clusters)
                else:
                    yield last
                    last = segment
        if last is not None:
            yield last

    def _chunk_segments(self, start: int, stop: int) -> Iterator[Segment]:
        levels = self.levels[start:stop]
        hosts = self.hosts[start:stop]
        joined = levels[1:] == levels[:-1]
        joined &= (levels[1:] == UNMAPPED) | (hosts[1:] - hosts[:-1] == 1)
        edges = [0, *(np.flatnonzero(~joined) + 1).tolist(), stop - start]
        for at, following in pairwise(edges):
            level = int(levels[at])
            host = int(hosts[at]) if level else 0
            yield Segment(level, host, start + at, following - at)


def _continues(last: Segment, segment: Segment) -> bool:
    if last.level != segment.level:
        return False
    return last.level == UNMAPPED or last.host + last.clusters == segment.host
