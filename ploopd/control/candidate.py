"""What a file would be as the new top delta of a device, found out without changing it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

from image_format import HEADER_SIZE
from ploopd.errors import (
    BusyError,
    DeniedError,
    PloopError,
    StorageError,
    UncleanImageError,
    UsageError,
)
from ploopd.fileio.file import File
from ploopd.fileio.oslayer import REAL, OsLayer
from ploopd.storage.delta import Delta
from ploopd.storage.probe import ImageFormat, probe_format
from ploopd.storage.stack import inode_number


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A file as its first bytes describe it.

    `format_version` is 0 for a raw file, whose `cluster_size` is 0; `size` in bytes of the virtual
    disk; `in_use` whether its in-use word is set; `inode` device and inode number.
    """

    path: str
    format_version: int
    size: int
    cluster_size: int
    in_use: bool
    inode: tuple[int, int]


def inspect(
    path: str, *, raw: bool, image_format: ImageFormat = ImageFormat.RAW, layer: OsLayer = REAL
) -> Candidate:
    """Look at the file; `raw`: it is to be a raw image, which `image_format` AUTO has to agree
    with, as it will when the file is opened.

    Blocking.  Raises NotFoundError, DeniedError, UnsupportedError (not a regular file), UsageError
    (not a raw image), ImageFormatError, or StorageError when the storage does not answer properly.
    """
    file = File.open(path, read_only=True, engine=None, layer=layer)
    try:
        size = file.size()
        if raw and image_format is ImageFormat.AUTO:
            _require_raw(file.pread(min(HEADER_SIZE, size), 0), path)
        header = None if raw else Delta.read(file, writable=True).header
        inode = inode_number(file)
    finally:
        with contextlib.suppress(StorageError):
            file.close()
    return Candidate(
        path=path,
        format_version=0 if header is None else header.version,
        size=size if header is None else header.size,
        cluster_size=0 if header is None else header.cluster_size,
        in_use=header is not None and header.unclean,
        inode=inode,
    )


def _require_raw(start: bytes, path: str) -> None:
    if probe_format(start, path) is not ImageFormat.RAW:
        raise UsageError("is a ploop image; that of the device is a raw one", path=path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What the new top delta of a device must be.

    `top` is the inode of the current top delta, whose in-use word is our own; `lower` are those of
    the deltas below it.  `force` accepts an image that is marked as in use.
    """

    format_version: int
    size: int
    cluster_size: int
    top: tuple[int, int]
    lower: frozenset[tuple[int, int]]
    force: bool


def require_fit(candidate: Candidate, wanted: Requirements) -> None:
    """Raise a PloopError unless `candidate` can take the place of the current top delta."""
    path = candidate.path
    if candidate.inode in wanted.lower:
        raise UsageError("is a lower delta of the same chain", path=path)
    _require_equal("format version", wanted.format_version, candidate.format_version, path)
    cluster_size = candidate.cluster_size or wanted.cluster_size
    require_geometry(path, (candidate.size, cluster_size), (wanted.size, wanted.cluster_size))
    if candidate.in_use and not wanted.force and candidate.inode != wanted.top:
        raise UncleanImageError(
            "was not closed cleanly, or is in use on another host",
            path=path,
            hint="check it with `ploopctl image check`, or replace with --force",
        )


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


def require_quiet(candidate: Candidate, hung: Iterable[tuple[tuple[int, int], int]]) -> None:
    """Raise `BusyError` while operations that hang could still change the very same file.

    `hung`: inode of an abandoned top delta, and how many of its operations have not come back.
    """
    for inode, count in hung:
        if count and inode == candidate.inode:
            raise BusyError(
                f"{count} operations that hang in the kernel may still change this file",
                path=candidate.path,
                hint="wait until they have come back, or replace with a copy of the image",
            )


def is_conclusive(error: PloopError) -> bool:
    """Whether an error of `inspect` says something about the file, not about its storage."""
    return not isinstance(error, (StorageError, DeniedError))
