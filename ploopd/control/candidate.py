"""What a file would be in the place of a delta of a device, found out without changing it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from image_format import HEADER_SIZE
from ploopd.devices import expected_size
from ploopd.errors import (
    NO_ROOM,
    BusyError,
    DeniedError,
    PloopError,
    StorageError,
    UncleanImageError,
    UsageError,
)
from ploopd.fileio.file import File
from ploopd.fileio.locks import lock_image
from ploopd.fileio.oslayer import REAL, OsLayer
from ploopd.storage.delta import Delta, require_sound
from ploopd.storage.probe import MAGICS, ImageFormat, probe_format
from ploopd.storage.stack import inode_number

Inode = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What a file must be to take the place of a delta.

    `format_version` is 0 for a raw file, which `raw_format` AUTO has to agree with; `size` in bytes
    of the virtual disk, which may be `growing_to` as well.  `writable`: it becomes the top delta of
    a device that is written to; `base`: the lowest delta of one.  `current` is the inode of the
    delta that is replaced, whose in-use word is our own; `others` are those of the other deltas,
    with their levels; `held` those that are locked by the device itself.  `force` accepts an image
    that is marked as in use.
    """

    format_version: int
    size: int
    growing_to: int | None
    cluster_size: int
    raw_format: ImageFormat
    writable: bool
    base: bool
    current: Inode
    others: Mapping[Inode, int]
    held: frozenset[Inode]
    force: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A file that fits: its inode, and whether it is marked as in use."""

    inode: Inode
    in_use: bool


def examine(path: str, wanted: Requirements, *, thorough: bool, layer: OsLayer = REAL) -> Candidate:
    """Look at the file; `thorough`: also whether it is free of locks, and at its BAT.

    Blocking.  Raises NotFoundError, DeniedError, ReadOnlyError, UnsupportedError (not a regular
    file), UsageError (does not fit), UncleanImageError, LockedError, ImageFormatError,
    CorruptImageError, or StorageError when the storage does not answer properly.
    """
    file = File.open(path, read_only=not wanted.writable, engine=None, layer=layer)
    try:
        inode = inode_number(file)
        if inode in wanted.others:
            raise UsageError(
                f"is the delta of level {wanted.others[inode]} of the same chain",
                path=path,
                hint="name a copy of the delta that is to be replaced",
            )
        delta = _fitting(file, wanted)
        in_use = delta is not None and delta.header.unclean
        if in_use and not wanted.force and inode != wanted.current:
            raise UncleanImageError(
                "was not closed cleanly, or is in use on another host",
                path=path,
                hint="check it with `ploopctl image check`, or replace with --force",
            )
        if thorough:
            if inode not in wanted.held:
                lock_image(file.fd, path=path, writer=wanted.writable, base=wanted.base)
            if delta is not None:
                require_sound(delta, *delta.load_bat())
    finally:
        with contextlib.suppress(StorageError):
            file.close()
    return Candidate(inode=inode, in_use=in_use)


def _fitting(file: File, wanted: Requirements) -> Delta | None:
    """The delta, None for a raw file; raises unless its format and size are the right ones."""
    path, size = file.path, file.size()
    if wanted.format_version == 0:
        _require_raw(file.pread(min(HEADER_SIZE, size), 0), path, wanted)
        _require_equal("disk size", expected_size(size, wanted.size, wanted.growing_to), size, path)
        return None
    delta = Delta.read(file, writable=wanted.writable)
    header = delta.header
    _require_equal("format version", wanted.format_version, header.version, path)
    found = (header.size, header.cluster_size)
    expected = expected_size(header.size, wanted.size, wanted.growing_to)
    require_geometry(path, found, (expected, wanted.cluster_size))
    return delta


def _require_raw(start: bytes, path: str, wanted: Requirements) -> None:
    """A delta that is served as a raw disk would show its header where the data should be."""
    if wanted.raw_format is ImageFormat.AUTO:
        raw = probe_format(start, path) is ImageFormat.RAW
    else:
        raw = wanted.force or not start.startswith(MAGICS)
    if not raw:
        raise UsageError("is a ploop image; that of the device is a raw one", path=path)


def require_geometry(path: str, found: tuple[int, int], wanted: tuple[int, int]) -> None:
    """Raise a UsageError unless disk size and cluster size are those of the device."""
    _require_equal("cluster size", wanted[1], found[1], path)
    _require_equal("disk size", wanted[0], found[0], path)


def _require_equal(what: str, wanted: int, found: int, path: str) -> None:
    if wanted != found:
        raise UsageError(
            f"does not fit the device: its {what} must be {wanted}",
            path=path,
            field=what.replace(" ", "_"),
            value=found,
        )


def require_quiet(path: str, top: Inode, hung: Iterable[tuple[Inode, int]]) -> None:
    """Raise `BusyError` while operations that hang could still change the file `top` at `path`.

    `hung`: inode of an abandoned top delta, and how many of its operations have not come back.
    """
    for inode, count in hung:
        if count and inode == top:
            raise BusyError(
                f"{count} operations that hang in the kernel may still change this file",
                path=path,
                hint="wait until they have come back, or replace with a copy of the image",
            )


def is_conclusive(error: PloopError) -> bool:
    """Whether an error says something about the file, not about the state of its storage."""
    if isinstance(error, StorageError):
        return error.errno in NO_ROOM
    return not isinstance(error, DeniedError)
