"""Repairing one delta after a scan; every step leaves an image that is no worse than before it.

Order: mark the image in use (so that an interrupted repair is seen), make the file as long as its
last entry needs, zero entries that name nothing, give each cluster to one entry (data synced before
entries), give back what nothing names, and last write the header of a clean image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from image_format import CLOSED_V20, IN_USE, FormatError
from ploopd.errors import ImageFormatError, UnsupportedError
from ploopd.fileio.file import File
from ploopd.storage.bat_patch import write_entries
from ploopd.storage.check_scan import Scan, scan
from ploopd.storage.format_errors import convert

_FIRST_UNFIT_V1_SECTOR: Final = 1 << 32


def repair_leaks(file: File, found: Scan) -> None:
    """Give back what nothing names; nothing is done while leaks cannot be told for sure.

    `file` is open for writing and locked.  Raises UnsupportedError if the image must not be
    changed, StorageError for what the file system refuses.
    """
    _require_writable(file, found)
    _give_back(file, found)


def repair_all(file: File, found: Scan) -> None:
    """Repair everything that can be repaired; misaligned entries cannot, and then nothing is done.

    `file` is open for writing and locked.  Raises like `repair_leaks`, and ImageFormatError if a
    version 1 file has no room left for the copy of a cluster that two entries name.
    """
    _require_writable(file, found)
    if len(found.misaligned):
        return
    if found.corruptions:
        found = _mark(file, found)
        found = _extend(file, found)
        found = _zero_entries(file, found)
        found = _separate(file, found)
    _give_back(file, found)
    if found.header.in_use == IN_USE:
        file.pwrite(found.header.replace(in_use=CLOSED_V20, flags=0).pack(), 0)
        file.fsync()


def _require_writable(file: File, found: Scan) -> None:
    try:
        found.header.check_geometry(found.file_size, file.path, writable=True)
    except FormatError as error:
        raise convert(error) from error
    section = None if found.extension is None else found.extension.unknown_necessary()
    if section is not None:
        raise UnsupportedError(
            "has a format extension that forbids changes by software that does not know it",
            path=file.path,
            field="section magic",
            value=hex(section.magic),
        )


def _mark(file: File, found: Scan) -> Scan:
    """Set the in-use word and drop the extension: what it says of the disk is no longer certain."""
    header = found.header.replace(in_use=IN_USE, ext_offset_sectors=0)
    file.pwrite(header.pack(), 0)
    file.fsync()
    return scan(file)


def _extend(file: File, found: Scan) -> Scan:
    """Make a last cluster whole that the end of the file cuts off; the missing part reads as
    zeros."""
    if not len(found.bat.cut_off):
        return found
    file.truncate(found.end)
    file.fsync()
    return scan(file)


def _zero_entries(file: File, found: Scan) -> Scan:
    """Entries that name no cluster of the data area have no content to lose."""
    bad = np.union1d(found.bat.in_header, found.bat.past_eof)
    if not len(bad) and not found.padding.words:
        return found
    write_entries(file, found.entries, bad, np.zeros(len(bad), dtype=np.uint32))
    for offset, length in found.padding.stretches:
        file.pwrite(bytes(length), offset)
    file.fsync()
    return scan(file)


def _separate(file: File, found: Scan) -> Scan:
    """Copy every cluster that has several users, so that each has its own with the same content."""
    users = found.bat.duplicate
    if not len(users):
        return found
    header, cluster = found.header, found.header.cluster_size
    places = _free_places(found)
    values = np.empty(len(users), dtype=np.uint32)
    for at, user in enumerate(users.tolist()):
        place = next(places)
        value = place * header.entry_scale
        if value >= _FIRST_UNFIT_V1_SECTOR:
            raise ImageFormatError(
                "the file has no room for the copy of a cluster that two entries name",
                path=file.path,
                field=f"BAT[{user}]",
                value=int(found.entries[user]),
            )
        data = file.pread(cluster, int(found.indexes[user]) * cluster)
        file.pwrite(data, place * cluster)
        values[at] = value
    file.fsync()
    write_entries(file, found.entries, users, values)
    file.fsync()
    return scan(file)


def _free_places(found: Scan) -> Iterator[int]:
    """Host clusters that nothing names, lowest first, then those behind the end of the file."""
    for first, count in found.bat.leaks.tolist():
        yield from range(first, first + count)
    place = max(found.bat.end_cluster, -(-found.file_size // found.header.cluster_size))
    while True:
        yield place
        place += 1


def _give_back(file: File, found: Scan) -> None:
    if not found.leaks_known or not (found.leaks or found.stale_extension):
        return
    if found.stale_extension:
        # Before its cluster goes: who follows the offset must not find something else there.
        file.pwrite(found.header.replace(ext_offset_sectors=0).pack(), 0)
        file.fsync()
    if found.file_size > found.end:
        file.truncate(found.end)
    cluster = found.header.cluster_size
    for first, count in found.occupied:
        file.punch_now(first * cluster, count * cluster)
    file.fsync()
