"""What a file would be as the new top delta of a device, found out without changing it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

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


def inspect(path: str, *, raw: bool, layer: OsLayer = REAL) -> Candidate:
    """Look at the file; `raw`: take it as a raw image, whatever is in it.

    Blocking.  Raises NotFoundError, DeniedError, UnsupportedError (not a regular file),
    ImageFormatError, or StorageError when the storage does not answer properly.
    """
    file = File.open(path, read_only=True, engine=None, layer=layer)
    try:
        size = file.size()
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
    for field, must, found in (
        ("format version", wanted.format_version, candidate.format_version),
        ("cluster size", wanted.cluster_size, candidate.cluster_size or wanted.cluster_size),
        ("disk size", wanted.size, candidate.size),
    ):
        if must != found:
            raise UsageError(
                f"does not fit the device: its {field} must be {must}",
                path=path,
                field=field.replace(" ", "_"),
                value=found,
            )
    if candidate.in_use and not wanted.force and candidate.inode != wanted.top:
        raise UncleanImageError(
            "was not closed cleanly, or is in use on another host",
            path=path,
            hint="check it with `ploopctl image check`, or replace with --force",
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
