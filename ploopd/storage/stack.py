"""The files of a disk, from the top delta down to the base: opened, locked, verified, merged.

Rules for a chain (ploop-format: what the kernel drivers check when a table is loaded): one cluster
size, one format version for writing, no delta larger than the one above it; a lower delta may be
shorter, for the disk may have grown after the snapshot; a raw file only as the base.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from image_format import HEADER_SIZE, SECTOR, BatReport
from ploopd.errors import (
    CorruptImageError,
    ImageFormatError,
    PloopError,
    StorageError,
    UncleanImageError,
)
from ploopd.fileio.file import File
from ploopd.storage.core import Source
from ploopd.storage.delta import Delta, PaddedTail, require_sound
from ploopd.storage.mapping import TOP, ClusterMap

RAW_CLUSTER: Final = 1 << 20
"""The unit of the map of a raw file that has no delta over it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInfo:
    """One file of the chain; `level` 0 is the top, `kind` "ploop" or "raw", `version` 0 for raw.

    `size` in bytes of the disk as this file has it; `inode`: device and inode number; `io`: how it
    is read and written (`fileio.policy.Policy`).
    """

    path: str
    kind: str
    io: str
    guid: str | None
    version: int
    level: int
    size: int
    inode: tuple[int, int]


@dataclass(slots=True, kw_only=True, eq=False)
class Layer:
    """An open file of the chain; `delta` is None for a raw one.

    `inode`: device and inode number, for when the file may not be asked any more.
    """

    file: File
    delta: Delta | None
    guid: str | None
    size: int
    inode: tuple[int, int]

    @property
    def kind(self) -> str:
        """Its format."""
        return "raw" if self.delta is None else "ploop"


class Stack:
    """The open files of one disk, `layers[0]` is the top.

    Whoever has one closes it.  `completed_cluster`: the last cluster of the top's file if that was
    cut short; nothing is in it.  `cluster_size` is that of the deltas, or the one given for raw
    files.  `in_doubt`: leave the in-use word set at the end.
    """

    __slots__ = (
        "abandoned",
        "cluster_size",
        "completed_cluster",
        "in_doubt",
        "layers",
        "notes",
        "read_only",
        "size",
        "version",
    )

    def __init__(
        self, layers: list[Layer], *, read_only: bool, raw_cluster: int = RAW_CLUSTER
    ) -> None:
        self.layers = layers
        self.read_only = read_only
        self.notes: list[str] = []
        self.abandoned = False
        self.in_doubt = False
        self.completed_cluster: int | None = None
        top = layers[0]
        self.size = top.size
        self.version = 0 if top.delta is None else top.delta.header.version
        self.cluster_size = raw_cluster if top.delta is None else top.delta.header.cluster_size

    @property
    def top(self) -> Layer:
        """The only file that is ever written to."""
        return self.layers[0]

    def describe(self) -> list[LayerInfo]:
        """The files, top first."""
        return [
            LayerInfo(
                path=layer.file.path,
                kind=layer.kind,
                io=layer.file.policy.value,
                guid=layer.guid,
                version=0 if layer.delta is None else layer.delta.header.version,
                level=level,
                size=layer.size,
                inode=layer.inode,
            )
            for level, layer in enumerate(self.layers)
        ]

    def verify(self) -> None:
        """Raise CorruptImageError or ImageFormatError unless the files fit together."""
        if self.top.delta is None and self.size % SECTOR:
            raise ImageFormatError(
                f"a raw image must be a multiple of {SECTOR} bytes",
                path=self.top.file.path,
                field="size",
                value=self.size,
                hint=f"truncate -s %{SECTOR} {self.top.file.path}",
            )
        if self.size == 0:
            raise ImageFormatError("is empty", path=self.top.file.path, field="size", value=0)
        for upper, lower in zip(self.layers, self.layers[1:], strict=False):
            self._verify_pair(upper, lower)

    def _verify_pair(self, upper: Layer, lower: Layer) -> None:
        path = lower.file.path
        if lower.delta is not None:
            header = lower.delta.header
            if header.cluster_size != self.cluster_size:
                raise CorruptImageError(
                    f"its cluster size differs from the {self.cluster_size} bytes of the top delta",
                    path=path,
                    field="cluster_size",
                    value=header.cluster_size,
                )
            if header.version != self.version:
                if not self.read_only:
                    raise CorruptImageError(
                        f"its format version differs from the top delta's ({self.version})",
                        path=path,
                        field="version",
                        value=header.version,
                        hint="serve it with --read-only, or convert one of them",
                    )
                self.notes.append(f"{path}: format version {header.version} below {self.version}")
        if lower.size > upper.size:
            raise CorruptImageError(
                f"it is larger than the {upper.size} bytes of the delta above it",
                path=path,
                field="size",
                value=lower.size,
            )

    def load_map(self) -> tuple[ClusterMap, tuple[Source, ...], BatReport | None]:
        """The merged map, where its levels are read, and how the top's BAT agrees with its file.

        One BAT is in memory at a time beside the map.  Raises CorruptImageError for wrong entries,
        UncleanImageError if it is the image to be written to and it was not closed cleanly.
        """
        top = self.top
        report: BatReport | None = None
        if top.delta is None:
            cluster_map = ClusterMap.linear(size=self.size, cluster_size=self.cluster_size)
        else:
            indexes, report = top.delta.load_bat()
            require_sound(top.delta, indexes, report, self._problem(top.delta))
            cluster_map = ClusterMap.from_top(
                indexes, size=self.size, cluster_size=self.cluster_size
            )
            self._note_top(top.delta, report)
        sources: list[Source] = [top.file, top.file]
        for level, layer in enumerate(self.layers[1:], TOP + 1):
            sources.append(layer.file)
            if layer.delta is None:
                if cluster_map.add_raw(level, layer.size):
                    sources.append(PaddedTail(layer.file, layer.size))
                continue
            indexes, lower_report = layer.delta.load_bat()
            require_sound(layer.delta, indexes, lower_report)
            if layer.delta.header.unclean:
                self.notes.append(f"{layer.file.path}: a lower delta is marked as in use")
            # Its own disk may be shorter than its BAT: entries behind that end are none.
            cluster_map.add_delta(level, indexes[: -(-layer.size // self.cluster_size)])
            del indexes
        return cluster_map, tuple(sources), report

    def _problem(self, delta: Delta) -> Callable[..., PloopError]:
        return UncleanImageError if delta.header.unclean else CorruptImageError

    def _note_top(self, delta: Delta, report: BatReport) -> None:
        path = delta.file.path
        for layer in self.layers:
            if layer.delta is not None and layer.delta.note is not None:
                self.notes.append(f"{layer.file.path}: {layer.delta.note}")
        if delta.header.unclean:
            self.notes.append(
                f"{path}: was not closed cleanly; checked {report.allocated} clusters, no errors, "
                f"{report.leaked_clusters} unreferenced"
            )

    def mark_in_use(self) -> None:
        """Mark the top as open for writing, and sync: before anything else is written.

        A file that ends inside a cluster (a crash while it grew) is made whole clusters then, as
        libploop's check does, so that the last one can be used.
        """
        if self.read_only or self.top.delta is None:
            return
        self.top.delta.mark_in_use()
        whole, rest = divmod(self.top.file.size(), self.cluster_size)
        if rest:
            self.top.file.truncate((whole + 1) * self.cluster_size)
            self.completed_cluster = whole

    def renamed(self, level: int, path: str) -> list[LayerInfo]:
        """The file of `level` is called `path` from now on; returns what `describe` says then."""
        self.layers[level].file.path = path
        return self.describe()

    def probe_bytes(self) -> int:
        """How many bytes at the start of the top are rewritten to see whether it can be written."""
        return SECTOR if self.top.delta is None else HEADER_SIZE

    def finish(self, used_end: int | None) -> None:
        """Sync, cut the file after cluster `used_end` (None: leave it), mark the image as closed
        unless it is `in_doubt`.

        Blocking; raises StorageError, and the in-use word is set then.
        """
        file = self.top.file
        file.fsync()
        if used_end is not None:
            end = used_end * self.cluster_size
            if file.size() > end:
                file.truncate(end)
                file.fsync()
        if self.top.delta is not None and not self.in_doubt:
            self.top.delta.mark_closed()

    def close(self) -> None:
        """Close all files, which gives their locks back; raises the first StorageError."""
        problem: StorageError | None = None
        for layer in self.layers:
            try:
                layer.file.close()
            except StorageError as error:
                problem = problem or error
        if problem is not None:
            raise problem

    def abandon(self) -> None:
        """Let go of the files without waiting for them."""
        self.abandoned = True
        for layer in self.layers:
            layer.file.abandon()

    @property
    def in_flight(self) -> int:
        """Operations of the files that have not come back from the kernel."""
        return sum(layer.file.in_flight for layer in self.layers)

    def inode_numbers(self) -> set[tuple[int, int]]:
        """Device and inode of each file."""
        return {layer.inode for layer in self.layers}


def inode_number(file: File) -> tuple[int, int]:
    """Device and inode of an open file."""
    status = os.fstat(file.fd)
    return status.st_dev, status.st_ino
