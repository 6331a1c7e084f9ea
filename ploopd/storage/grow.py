"""Making the disk of an image larger, offline: the top delta, or a raw file that is alone.

Order: mark the image in use; get all the room that is needed; write the new descriptor beside the
old one; copy what lies where the BAT will be, sync, name the copies in the BAT, sync; write zeros
where the BAT and the disk grow, sync; write the header, sync: that is the moment of the change.
Last the new descriptor gets its name, and the image is marked as closed.  A crash at any moment
leaves a sound image of the old or of the new size, and everything can be begun again.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from image_format import SECTOR, PvdHeader, chs_geometry, with_size
from ploopd.errors import NO_ROOM, PloopError, StorageError, UsageError
from ploopd.fileio.file import File
from ploopd.fileio.oslayer import REAL, OsLayer
from ploopd.storage.bat_patch import write_entries
from ploopd.storage.chain_files import DiskFiles
from ploopd.storage.delta import require_sound
from ploopd.storage.descriptor_change import (
    GROWTH_SUFFIX,
    DescriptorChange,
    finish_growth,
)
from ploopd.storage.grow_plan import Growth, Move, new_header_of, plan_growth
from ploopd.storage.opener import (
    NO_SUBSTITUTES,
    OpenOptions,
    open_stack,
    verify_descriptor,
)
from ploopd.storage.stack import Stack

_CHUNK: Final = 1 << 20
_LARGEST_FILE: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GrownImage:
    """`size` of the disk now and `previous` before, in bytes; `moved`: clusters that got another
    place in the file."""

    path: str
    size: int
    previous: int
    moved: int


def grow_image(
    path: str | os.PathLike[str],
    size: int,
    *,
    options: OpenOptions | None = None,
    substitutes: Mapping[str, str] = NO_SUBSTITUTES,
    layer: OsLayer = REAL,
) -> GrownImage:
    """Give the disk at `path` (as for `open_volume`) `size` bytes, rounded up to whole clusters, a
    raw file that is alone to sectors.  The new part reads as zeros.

    The same size changes nothing; DiskDescriptor.xml is changed with the image.  Blocking.

    Raises UsageError for a smaller size and for one that the format does not have, ReadOnlyError,
    what opening an image for writing raises, StorageError for what the file system refuses: without
    room the image is as it was.
    """
    name = os.fspath(path)
    files, stack = open_stack(
        name, writable=True, options=options, substitutes=substitutes, layer=layer
    )
    try:
        verify_whole(files, stack, substitutes)
        if files.size not in (None, stack.size):
            finish_growth(files.path, layer)  # an earlier one; the name it used is needed again
        previous = stack.size
        growth = planned(stack, size)
        moved = 0
        if growth is not None:
            moved = _grow(files, stack, growth, layer)
            size = growth.size
        else:
            size = previous
    except PloopError:
        with contextlib.suppress(StorageError):
            stack.close()
        raise
    stack.close()
    return GrownImage(path=name, size=size, previous=previous, moved=moved)


def verify_whole(files: DiskFiles, stack: Stack, substitutes: Mapping[str, str]) -> None:
    """Raise unless the files are one disk whose size can be changed.

    Not that of one whose descriptor names another top than `substitutes`: that one would keep its
    size.
    """
    stack.verify()
    verify_descriptor(files, stack)
    if stack.top.guid is not None and stack.top.guid in substitutes:
        raise UsageError(
            "its top delta is not the one that the descriptor names, which would keep its size",
            path=files.path,
            field="GUID",
            value=stack.top.guid,
            hint="replace it once more, without --keep-descriptor",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedGrowth:
    """`size` in bytes, rounded; `delta` says how, None for a raw file."""

    size: int
    delta: Growth | None

    def missing_room(self, stack: Stack) -> int:
        """Bytes that the file system of the top lacks, as far as it tells.  Blocking."""
        if self.delta is None:
            return 0
        needed = sum(length for _, length in self.delta.room)
        with contextlib.suppress(OSError):
            free = os.fstatvfs(stack.top.file.fd)
            return max(0, needed - free.f_bfree * free.f_frsize)
        return 0


def planned(stack: Stack, size: int) -> PlannedGrowth | None:
    """How the disk of `stack` becomes one of at least `size` bytes; None if it is that already.

    Blocking.  Raises UsageError as `grow_image`, and what reading the BATs raises.
    """
    header = None if stack.top.delta is None or size <= 0 else new_header_of(stack.top.delta, size)
    new = _rounded_raw(stack, size) if header is None else header.size
    if stack.size in (size, new):
        return None
    if new < stack.size:
        raise UsageError(
            f"the disk has {stack.size} bytes, and can only become larger",
            path=stack.top.file.path,
            field="size",
            value=size,
            hint="to shrink a disk, copy what is on it to a smaller one",
        )
    growth = None if header is None else plan_growth(stack, header)
    return PlannedGrowth(size=new, delta=growth)


def _rounded_raw(stack: Stack, size: int) -> int:
    """A raw file's size: a multiple of what a descriptor has as its cluster, or of a sector."""
    unit = SECTOR if stack.top.guid is None else stack.cluster_size
    rounded = -(-size // unit) * unit
    if rounded > _LARGEST_FILE:
        raise UsageError(
            "no file can be as large", path=stack.top.file.path, field="size", value=size
        )
    return rounded


def _grow(files: DiskFiles, stack: Stack, growth: PlannedGrowth, layer: OsLayer) -> int:
    """Returns how many clusters were moved."""
    change = _descriptor_change(files, growth.size, layer)
    if growth.delta is None:
        _grow_raw(stack.top.file, growth.size, change)
        return 0
    top = stack.top.delta
    assert top is not None
    stack.mark_in_use()
    try:
        _make_room(stack.top.file, growth.delta)
        _prepare(change)
        _move(stack.top.file, growth.delta)
        _write_zeros(stack.top.file, growth.delta)
    except PloopError as error:
        if change is not None:
            change.discard()
        _give_up(stack, error)
        raise
    top.grow(_marked(top.header, growth.delta.header))
    try:
        if change is not None:
            change.commit()
    finally:
        stack.finish(growth.delta.end // stack.cluster_size)
    return len(growth.delta.moves)


def _grow_raw(file: File, size: int, change: DescriptorChange | None) -> None:
    _prepare(change)
    try:
        file.truncate(size)
    except StorageError:
        if change is not None:
            change.discard()
        raise
    file.fsync()
    if change is not None:
        change.commit()


def _descriptor_change(files: DiskFiles, size: int, layer: OsLayer) -> DescriptorChange | None:
    if files.descriptor is None:
        return None
    path = files.descriptor
    sectors = size // SECTOR
    edit = partial(
        with_size, size_sectors=sectors, geometry=chs_geometry(sectors), file=os.path.realpath(path)
    )
    return DescriptorChange(path, edit, suffix=GROWTH_SUFFIX, layer=layer)


def _prepare(change: DescriptorChange | None) -> None:
    """The new document must be there, whatever happens, before the size changes: see
    `finish_growth`."""
    if change is None:
        return
    change.prepare()
    try:
        change.sync()
    except PloopError:
        change.discard()
        raise


def _make_room(file: File, growth: Growth) -> None:
    """Nothing has been changed if there is none."""
    for offset, length in growth.room:
        file.allocate_now(offset, length)


def _move(file: File, growth: Growth) -> None:
    if not growth.moves:
        return
    for move in growth.moves:
        _copy(file, move, growth.header.cluster_size)
    file.fsync()
    clusters = np.array([move.cluster for move in growth.moves], dtype=np.int64)
    places = np.array([move.place for move in growth.moves], dtype=np.uint32)
    values = places * np.uint32(growth.header.entry_scale)
    write_entries(file, growth.entries, clusters, values)
    file.fsync()


def _copy(file: File, move: Move, size: int) -> None:
    for at in range(0, size, _CHUNK):
        wanted = min(_CHUNK, size - at)
        inside = max(0, min(wanted, move.length - at))
        data = move.source.pread(inside, move.offset + at) if inside else b""
        file.pwrite(data.ljust(wanted, b"\0"), move.place * size + at)


def _write_zeros(file: File, growth: Growth) -> None:
    """Written, not left as a hole: libploop refuses sparse images, and a BAT that has its blocks
    can never run out of space."""
    zeros = memoryview(bytes(_CHUNK))
    for offset, length in growth.zeros:
        for at in range(offset, offset + length, _CHUNK):
            file.pwrite(zeros[: min(_CHUNK, offset + length - at)], at)
    file.fsync()


def _marked(old: PvdHeader, new: PvdHeader) -> PvdHeader:
    """The new header with the old one's in-use word, and without its extension."""
    return new.replace(in_use=old.in_use, ext_offset_sectors=old.ext_offset_sectors)


def _give_up(stack: Stack, error: PloopError) -> None:
    """The image keeps its size.  Leave it closed, if what has failed says nothing of the storage:
    otherwise whoever opens it next has to check it."""
    top = stack.top.delta
    assert top is not None
    if isinstance(error, StorageError) and error.errno not in NO_ROOM | {errno.EROFS}:
        return
    with contextlib.suppress(PloopError):
        indexes, report = top.load_bat()
        require_sound(top, indexes, report)
        stack.finish(report.end_cluster)
