"""Never two writers: QEMU's and libploop's byte-range locks, plus flock for shell tools.

QEMU says with read locks on single bytes what it does (100 + n) and what it does not tolerate from
others (200 + n), n being 0 consistent read, 1 write, 2 write unchanged, 3 resize; nobody ever takes
a write lock, one only asks whether one could (F_OFD_GETLK).  libploop read-locks 200–204 as a whole
and asks the same way.  The locks are *open file description* locks: they die with the last copy of
the descriptor, not with any descriptor of the file, and hold against other descriptors of the same
process, too.

Sources: QEMU block/file-posix.c (RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE), libploop lib/lock.c
(LOCK_EXCL_BASE), fcntl(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from enum import Enum

from ploopd.errors import LockedError, StorageError, UnsupportedError
from ploopd.fileio.lock_holders import describe_holder
from ploopd.fileio.policy import filesystem_type

_PERMISSION_BASE = 100
_UNSHARED_BASE = 200
_READ, _WRITE, _WRITE_UNCHANGED, _RESIZE, _GRAPH = range(5)

_FLOCK = struct.Struct("hhqqi4x")  # l_type l_whence l_start l_len l_pid, as the C library has it

_EMULATED_FLOCK = frozenset({"nfs", "nfs4", "cifs", "smb3"})
"""There flock is a byte-range write lock on the whole file, which would shut QEMU's readers out."""


class Claim(Enum):
    """What an image file is opened for."""

    READER = "reader"
    BASE = "base"
    WRITER = "writer"


@dataclass(frozen=True, slots=True, kw_only=True)
class _LockRow:
    """The bytes that a claim holds, and those that must be free of everybody else."""

    held: tuple[int, ...]
    free: tuple[int, ...]
    flock: int


_ROWS = {
    Claim.READER: _LockRow(
        held=(
            _PERMISSION_BASE + _READ,
            _UNSHARED_BASE + _WRITE,
            _UNSHARED_BASE + _RESIZE,
        ),
        free=(
            _UNSHARED_BASE + _READ,
            _PERMISSION_BASE + _WRITE,
            _PERMISSION_BASE + _RESIZE,
        ),
        flock=fcntl.LOCK_SH,
    ),
    # libploop locks the base delta of whatever it works on; a base only excludes writers otherwise,
    # so what is asked for are the bytes that no QEMU reader holds.
    Claim.BASE: _LockRow(
        held=(_PERMISSION_BASE + _READ, *range(_UNSHARED_BASE, _UNSHARED_BASE + 5)),
        free=(
            _UNSHARED_BASE + _READ,
            _UNSHARED_BASE + _WRITE_UNCHANGED,
            _UNSHARED_BASE + _GRAPH,
            _PERMISSION_BASE + _WRITE,
            _PERMISSION_BASE + _RESIZE,
        ),
        flock=fcntl.LOCK_SH,
    ),
    Claim.WRITER: _LockRow(
        held=(
            _PERMISSION_BASE + _READ,
            _PERMISSION_BASE + _WRITE,
            _PERMISSION_BASE + _RESIZE,
            *range(_UNSHARED_BASE, _UNSHARED_BASE + 5),
        ),
        free=(
            *range(_PERMISSION_BASE, _PERMISSION_BASE + 5),
            *range(_UNSHARED_BASE, _UNSHARED_BASE + 5),
        ),
        flock=fcntl.LOCK_EX,
    ),
}


def lock_image(fd: int, *, path: str, writer: bool, base: bool = False) -> None:
    """Lock an image file for as long as its open file description lives.

    `writer`: it will be written; nobody else may have it open.  `base`: it is the read-only base of
    a chain whose top is written.  Otherwise: a reader among readers.  Raises `LockedError` naming
    the holder as far as the kernel tells, `UnsupportedError` on a file system without locks,
    `StorageError` for what else it answers.
    """
    claim = Claim.WRITER if writer else Claim.BASE if base else Claim.READER
    row = _ROWS[claim]
    try:
        _require_free(fd, path, row, claim)
        for first, length in _runs(row.held):
            _set_read_lock(fd, first, length)
        # Whoever came between asking and locking sees us, and we see it: both give up.
        _require_free(fd, path, row, claim)
        if filesystem_type(os.fstat(fd).st_dev) not in _EMULATED_FLOCK:
            _flock(fd, path, row.flock, claim)
    except LockedError:
        unlock_image(fd)
        raise
    except OSError as error:
        unlock_image(fd)
        if error.errno in (errno.ENOLCK, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise UnsupportedError(
                "its file system does not do file locks; two writers would destroy the image",
                path=path,
                field="errno",
                value=errno.errorcode.get(error.errno, error.errno),
            ) from error
        raise StorageError.from_os(error, "lock", path) from error


def unlock_image(fd: int) -> None:
    """Give all locks of this open file description back; closing its last descriptor does, too."""
    try:
        request = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
        fcntl.flock(fd, fcntl.LOCK_UN)
    except OSError:
        return  # what cannot be unlocked was not locked, or its storage is gone


def _require_free(fd: int, path: str, row: _LockRow, claim: Claim) -> None:
    for first, length in _runs(row.free):
        found = _conflict(fd, first, length)
        if found is not None:
            raise _locked(fd, path, found, claim)


def _conflict(fd: int, first: int, length: int) -> int | None:
    """The first byte of the range on which somebody else has any lock."""
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, first, length, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request)
    kind, _, start, _, _ = _FLOCK.unpack(answer)
    return None if kind == fcntl.F_UNLCK else max(int(start), first)


def _set_read_lock(fd: int, first: int, length: int) -> None:
    request = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, first, length, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except OSError as error:
        # Somebody has a *write* lock there: the probe that follows tells where and who.
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise


def _flock(fd: int, path: str, kind: int, claim: Claim) -> None:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _locked(fd, path, None, claim) from None


def _locked(fd: int, path: str, byte: int | None, claim: Claim) -> LockedError:
    holder = describe_holder(fd, byte)
    text = "is in use" if holder is None else f"is in use by {holder}"
    what = "flock" if byte is None else _meaning(byte)
    hint = (
        "close it there first"
        if claim is Claim.WRITER
        else "close it there first, or serve it while nobody writes it"
    )
    return LockedError(text, path=path, field="lock", value=what, hint=hint)


def _meaning(byte: int) -> str:
    names = ("read", "write", "write-unchanged", "resize", "graph")
    if byte >= _UNSHARED_BASE:
        return f"byte {byte}: {names[byte - _UNSHARED_BASE]} is not shared"
    return f"byte {byte}: open for {names[byte - _PERMISSION_BASE]}"


def _runs(numbers: tuple[int, ...]) -> list[tuple[int, int]]:
    """(first, length) of the runs of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and number == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs
