"""Reading one delta's metadata and finding everything that is wrong with it; nothing is written.

The rules are those of libploop's check, stricter where it is lenient: unreferenced clusters, the
format extension and the unused end of the BAT are looked at too.  See docs/formats/ploop.md.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np
import numpy.typing as npt

from image_format import HEADER_SIZE, BatReport, FormatError, FormatExtension, PvdHeader
from image_format import bat as bat_format
from image_format import extension as extension_format
from ploopd.errors import StorageError
from ploopd.fileio.file import File
from ploopd.storage.format_errors import convert

_CHUNK: Final = 8 << 20
_PADDING_CHUNK: Final = 1 << 20
_SHOWN: Final = 16
"""Findings of one kind that are listed one by one; the rest is a number."""

Positions = npt.NDArray[np.int64]


class Severity(Enum):
    """What a finding means for the image."""

    CORRUPTION = "corruption"
    LEAK = "leak"
    NOTE = "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something the check has to say.

    `kind` is a stable word for programs, `count` how many objects of the kind this line stands for.
    `fixed`: a repair has removed it.
    """

    kind: str
    severity: Severity
    message: str
    count: int = 1
    field: str | None = None
    value: int | str | None = None
    fixed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """Stretches between the BAT and the data area that are not zero: (offset, length) and words."""

    stretches: tuple[tuple[int, int], ...]
    words: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """The metadata of a delta, read and judged.

    `entries`: the BAT as it is in the file; `misaligned`: virtual clusters whose version 1 entries
    are not at a cluster.  `extension`: the one that counts; `extension_error`: why it cannot be
    read. `occupied`: runs (first, count) of leaked clusters before the last used one that take up
    space. `end`: byte after the last cluster in use; everything beyond it is leaked.
    """

    header: PvdHeader
    file_size: int
    entries: npt.NDArray[np.uint32]
    indexes: npt.NDArray[np.uint32]
    bat: BatReport
    misaligned: Positions
    padding: Padding
    extension: FormatExtension | None
    extension_error: FormatError | None
    occupied: tuple[tuple[int, int], ...]
    end: int

    @property
    def leaks_known(self) -> bool:
        """False where something unreadable may lie in clusters that look unused."""
        return self.extension_error is None and not len(self.misaligned)

    @property
    def tail_clusters(self) -> int:
        """Leaked clusters at the end of the file, a cut one included."""
        return max(0, -(-(self.file_size - self.end) // self.header.cluster_size))

    @property
    def leaks(self) -> int:
        """Clusters that take up space and hold nothing."""
        if not self.leaks_known:
            return 0
        return self.tail_clusters + sum(count for _, count in self.occupied)

    @property
    def corruptions(self) -> int:
        """Everything wrong but leaks, counted as qemu-img does: an unclean image is one."""
        single = self.header.unclean + (self.extension_error is not None)
        return single + self.bat.errors + len(self.misaligned) + self.padding.words

    @property
    def stale_extension(self) -> bool:
        """The header names an extension that has to be ignored."""
        return bool(self.header.ext_offset_sectors) and not extension_format.is_valid(self.header)

    @property
    def fragmented(self) -> int:
        """Allocated clusters that do not follow the allocated one before them in the file."""
        used = self.indexes[self.indexes != 0]
        return int(np.count_nonzero(np.diff(used) != 1))  # differences modulo 2**32 will do


def scan(file: File) -> Scan:
    """Read header, BAT and extension of `file` and compare them with it.

    Raises ImageFormatError for a header that gives no geometry to work with, StorageError for
    reads.
    """
    size = file.size()
    try:
        header = PvdHeader.parse(file.pread(min(size, HEADER_SIZE), 0), file=file.path)
        header.check_geometry(size, file.path)
    except FormatError as error:
        raise convert(error) from error
    entries = _read_entries(file, header)
    misaligned = bat_format.misaligned(entries, header)
    indexes = _indexes(entries, header, misaligned)
    extension, extension_error = _read_extension(file, header, size)
    reserved = () if extension is None else extension.clusters(header)
    report = bat_format.validate(indexes, header, size, reserved=reserved)
    cluster = header.cluster_size
    end = report.end_cluster * cluster
    if len(report.cut_off):
        # The last cluster is there in part: it is in use, not leaked.
        end = -(-size // cluster) * cluster
    inner = report.leaks[report.leaks[:, 0] * cluster < end]
    return Scan(
        header=header,
        file_size=size,
        entries=entries,
        indexes=indexes,
        bat=report,
        misaligned=misaligned,
        padding=_read_padding(file, header, size),
        extension=extension,
        extension_error=extension_error,
        occupied=tuple(_occupied(file.fd, inner, cluster)),
        end=end,
    )


def _read_entries(file: File, header: PvdHeader) -> npt.NDArray[np.uint32]:
    raw = np.empty(header.bat_bytes, dtype=np.uint8)
    view = raw.data
    for done in range(0, len(view), _CHUNK):
        piece = view[done : done + _CHUNK]
        if file.pread_into(piece, HEADER_SIZE + done) != len(piece):
            raise StorageError(
                errno.EIO, "read", path=file.path, offset=HEADER_SIZE + done, message="short read"
            )
    return raw.view("<u4").astype(np.uint32, copy=False)


def _indexes(
    entries: npt.NDArray[np.uint32], header: PvdHeader, misaligned: Positions
) -> npt.NDArray[np.uint32]:
    """Host cluster indexes, 0 for entries that name none."""
    if header.entry_scale == 1:
        return entries
    indexes: npt.NDArray[np.uint32] = entries // np.uint32(header.entry_scale)
    indexes[misaligned] = 0
    return indexes


def _read_extension(
    file: File, header: PvdHeader, size: int
) -> tuple[FormatExtension | None, FormatError | None]:
    try:
        return extension_format.load(file.pread, header, size, file=file.path), None
    except FormatError as error:
        return None, error


def _read_padding(file: File, header: PvdHeader, size: int) -> Padding:
    """Look at the rest of the BAT's last cluster, which growing the disk would turn into
    entries."""
    begin = HEADER_SIZE + header.bat_bytes
    end = min(-(-begin // header.cluster_size) * header.cluster_size, header.data_offset, size)
    stretches: list[tuple[int, int]] = []
    words = 0
    for offset in range(begin, end, _PADDING_CHUNK):
        data = file.pread(min(_PADDING_CHUNK, end - offset), offset)
        found = int(np.count_nonzero(np.frombuffer(data[: len(data) & ~3], dtype="<u4")))
        if found:
            stretches.append((offset, len(data)))
            words += found
    return Padding(stretches=tuple(stretches), words=words)


def _occupied(fd: int, runs: Positions, cluster: int) -> Iterator[tuple[int, int]]:
    """The parts of `runs` (first, count) that the file system has blocks for, in whole clusters.

    A hole that was punched is not worth a word; where holes cannot be told, all runs are occupied.
    """
    data = hole = 0
    for first, count in runs.tolist():
        at, end = first * cluster, (first + count) * cluster
        while at < end:
            if hole <= at:
                data = _seek(fd, at, os.SEEK_DATA)
                hole = _seek(fd, data, os.SEEK_HOLE)
            if data >= end:
                break
            begin = max(data, at) // cluster
            stop = min(-(-hole // cluster), first + count)
            yield begin, stop - begin
            at = stop * cluster


def _seek(fd: int, offset: int, whence: int) -> int:
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole up to the end
            return 1 << 62
        if error.errno == errno.EINVAL:  # the file system cannot say: everything is data
            return offset if whence == os.SEEK_DATA else 1 << 62
        raise StorageError.from_os(error, "lseek", "image", offset) from error


def findings(found: Scan, path: str) -> list[Finding]:
    """All that is wrong, worst first, in words."""
    header, report = found.header, found.bat
    lines: list[Finding] = []
    if header.unclean:
        lines.append(
            _corruption(
                "unclean",
                f"the image is {header.close_state.value}: it is open elsewhere or was not closed",
                "in_use",
                hex(header.in_use),
            )
        )
    if found.extension_error is not None:
        error = found.extension_error
        lines.append(_corruption("extension", error.message, error.field, str(error.value)))
    cut = np.isin(report.past_eof, report.cut_off)
    for kind, entries, sentence in (
        ("misaligned", found.misaligned, "is not at the start of a cluster"),
        ("in-header", report.in_header, "names a cluster of the header"),
        ("cut-off", report.cut_off, "names a cluster that the end of the file cuts off"),
        ("past-eof", report.past_eof[~cut], "names a cluster beyond the end of the file"),
        ("duplicate", report.duplicate, "names a cluster that is used already"),
    ):
        lines += _entry_findings(kind, sentence, entries, found.entries)
    if found.padding.words:
        lines.append(
            _corruption(
                "beyond-disk",
                "BAT slots beyond the end of the disk are not zero",
                "slots",
                None,
                found.padding.words,
            )
        )
    lines += _leak_findings(found)
    lines += _notes(found, path)
    return lines


def _corruption(
    kind: str, message: str, field: str | None, value: int | str | None, count: int = 1
) -> Finding:
    return Finding(
        kind=kind,
        severity=Severity.CORRUPTION,
        message=message,
        count=count,
        field=field,
        value=value,
    )


def _entry_findings(
    kind: str, sentence: str, clusters: Positions, entries: npt.NDArray[np.uint32]
) -> Iterator[Finding]:
    for cluster in clusters[:_SHOWN].tolist():
        value = int(entries[cluster])
        yield _corruption(kind, f"the BAT entry {sentence}", f"BAT[{cluster}]", value)
    more = len(clusters) - _SHOWN
    if more > 0:
        yield _corruption(kind, f"{more} more BAT entries of this kind", None, None, more)


def _leak_findings(found: Scan) -> Iterator[Finding]:
    if not found.leaks_known:
        return
    cluster = found.header.cluster_size
    if found.tail_clusters:
        yield Finding(
            kind="tail",
            severity=Severity.LEAK,
            message=f"{found.file_size - found.end} bytes at the end of the file hold nothing",
            count=found.tail_clusters,
            field="offset",
            value=found.end,
        )
    for first, count in found.occupied[:_SHOWN]:
        yield Finding(
            kind="unreferenced",
            severity=Severity.LEAK,
            message="clusters are allocated that no BAT entry names",
            count=count,
            field="offset",
            value=first * cluster,
        )
    rest = found.occupied[_SHOWN:]
    if rest:
        yield Finding(
            kind="unreferenced",
            severity=Severity.LEAK,
            message="more clusters are allocated that no BAT entry names",
            count=sum(count for _, count in rest),
        )


def _notes(found: Scan, path: str) -> Iterator[Finding]:
    try:
        found.header.check_geometry(found.file_size, path, writable=True)
    except FormatError as error:
        yield _note("read-only", f"cannot be written to: {error.message}", error.field)
    if len(found.misaligned):
        yield _note("no-repair", "misaligned entries cannot be repaired: copy the image", None)
    if not found.leaks_known:
        yield _note("leaks-unknown", "leaks are not counted until the rest is repaired", None)
    if found.stale_extension:
        yield _note("stale-extension", "an outdated format extension is ignored", None)


def _note(kind: str, message: str, field: str | None) -> Finding:
    return Finding(kind=kind, severity=Severity.NOTE, message=message, count=0, field=field)
