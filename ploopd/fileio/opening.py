"""Opening an image file: its descriptors, its file system, its policy."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass

from ploopd.errors import PloopError, open_error
from ploopd.fileio import libc
from ploopd.fileio.backends import DIRECT_ALIGNMENT
from ploopd.fileio.buffers import BufferPool
from ploopd.fileio.oslayer import OsLayer
from ploopd.fileio.policy import (
    CacheMode,
    Policy,
    answers_nowait,
    choose,
    filesystem_type,
    in_memory,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """An open regular file.

    `fd` goes through the page cache, `direct_fd` does not (None unless `cache` is NONE).  `cache`
    is what was to be had, which `notes` explain if it is not what was asked for.
    """

    path: str
    fd: int
    direct_fd: int | None
    read_only: bool
    cache: CacheMode
    filesystem: str
    policy: Policy
    layer: OsLayer
    notes: tuple[str, ...]


def open_file(
    path: str,
    *,
    read_only: bool,
    cache: CacheMode,
    dir_fd: int | None,
    layer: OsLayer,
    io: str,
    engine_kind: str | None,
) -> Opened:
    """Open an existing regular file; raises as `File.open` says."""
    flags = os.O_RDONLY if read_only else os.O_RDWR
    fd = direct_fd = None
    note = None
    try:
        fd = layer.open(path, flags, dir_fd)
        filesystem = filesystem_type(layer.fstat(fd).st_dev)
        if cache is CacheMode.NONE and engine_kind is not None:
            direct_fd, note = _open_direct(layer, path, flags, dir_fd, fd, filesystem)
        effective = CacheMode.WRITEBACK if direct_fd is None else CacheMode.NONE
        policy = choose(io, effective, filesystem, engine_kind)
        if policy is Policy.NOWAIT and not answers_nowait(fd):
            policy = choose("auto", effective, "unknown", engine_kind)
    except OSError as error:
        close_quietly(layer, fd, direct_fd)
        raise open_error(error, path) from error
    except PloopError:
        close_quietly(layer, fd, direct_fd)
        raise
    return Opened(
        path=path,
        fd=fd,
        direct_fd=direct_fd,
        read_only=read_only,
        cache=effective,
        filesystem=filesystem,
        policy=policy,
        layer=layer,
        notes=() if note is None else (note,),
    )


def close_quietly(layer: OsLayer, *descriptors: int | None) -> None:
    """Close what is a descriptor; nobody is left who could do something about an error."""
    for fd in descriptors:
        if fd is None:
            continue
        try:
            layer.close(fd)
        except OSError:
            continue


def _open_direct(
    layer: OsLayer, path: str, flags: int, dir_fd: int | None, fd: int, filesystem: str
) -> tuple[int | None, str | None]:
    """A second descriptor with O_DIRECT, or a note why the page cache is used instead."""
    if in_memory(filesystem):
        return None, f"{filesystem} lives in memory: there is no cache to bypass"
    alignment = libc.direct_io_alignment(fd)
    if alignment is not None and alignment[1] > DIRECT_ALIGNMENT:
        return None, f"O_DIRECT needs {alignment[1]}-byte blocks here: the page cache is used"
    direct = layer.open(path, flags, dir_fd)
    try:
        ours, theirs = layer.fstat(fd), layer.fstat(direct)
        if (ours.st_dev, ours.st_ino) != (theirs.st_dev, theirs.st_ino):
            raise PloopError("was replaced while it was being opened", path=path, hint="try again")
        fcntl.fcntl(direct, fcntl.F_SETFL, flags | os.O_DIRECT)
        if alignment is None:
            _read_one_sector(direct)
    except OSError as error:
        layer.close(direct)
        if error.errno != errno.EINVAL:
            raise
        return None, f"{filesystem} has no O_DIRECT with 512-byte blocks: the page cache is used"
    except PloopError:
        layer.close(direct)
        raise
    return direct, None


def _read_one_sector(fd: int) -> None:
    """EINVAL unless O_DIRECT does 512-byte blocks: for kernels that do not tell (before 6.1)."""
    os.preadv(fd, (BufferPool().take(DIRECT_ALIGNMENT).view,), DIRECT_ALIGNMENT)
