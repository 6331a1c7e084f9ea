"""The C library's door: the few calls that Python does not offer.

Everything here raises `OSError` with the errno of the call, and `ENOSYS` where the C library or the
kernel has no such call.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import sys
from functools import cache

SYS_OPENAT2 = 437
"""The same number on every architecture (Linux 5.6)."""

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_BENEATH = 0x08

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_UTIME_NOW = (1 << 30) - 1
_UTIME_OMIT = (1 << 30) - 2
_STATX_DIOALIGN = 0x2000
_STATX_SIZE = 256
_STATX_MASK = struct.Struct("=I")
_STATX_DIO = struct.Struct("=II")
_STATX_DIO_OFFSET = 152


@cache
def libc() -> ctypes.CDLL:
    """The C library of this process, with errno kept per call."""
    return ctypes.CDLL(None, use_errno=True)


def last_error(call: str) -> OSError:
    """The `OSError` for the call that has just failed."""
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), without glibc's emulation by writing (posix_fallocate has it)."""
    function = getattr(libc(), "fallocate64", None) or getattr(libc(), "fallocate", None)
    if function is None:
        raise OSError(errno.EOPNOTSUPP, "no fallocate in the C library")
    while function(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
        if ctypes.get_errno() != errno.EINTR:
            raise last_error("fallocate")


def openat2(dir_fd: int, name: str, flags: int, resolve: int) -> int:
    """openat2(2): a descriptor, opened close-on-exec; ENOSYS before Linux 5.6."""
    if not sys.platform.startswith("linux"):
        raise OSError(errno.ENOSYS, "openat2 needs Linux")
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)
    result = libc().syscall(
        ctypes.c_long(SYS_OPENAT2),
        ctypes.c_int(dir_fd),
        ctypes.c_char_p(os.fsencode(name)),
        ctypes.c_char_p(how),
        ctypes.c_size_t(len(how)),
    )
    if result < 0:
        raise last_error("openat2")
    return int(result)


def resident(address: int, length: int) -> bool:
    """mincore(2): whether all pages of a mapping are in memory.

    `address` is that of a page.  The kernel says yes without looking where the caller neither owns
    the file nor may write to it.
    """
    pages = -(-length // mmap.PAGESIZE)
    found = ctypes.create_string_buffer(pages)
    if libc().mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), found) != 0:
        raise last_error("mincore")
    return all(page & 1 for page in found.raw)


def set_modified_now(path: str) -> None:
    """utimensat(2): the file was modified now, and its time of access stays.

    For inotify this is IN_MODIFY, which `os.utime`, that sets both times, is not.
    """
    times = struct.pack("=qqqq", 0, _UTIME_OMIT, 0, _UTIME_NOW)
    if libc().utimensat(_AT_FDCWD, os.fsencode(path), times, 0) != 0:
        raise last_error("utimensat")


def direct_io_alignment(fd: int) -> tuple[int, int] | None:
    """(memory, offset) alignment in bytes that O_DIRECT asks of this file.

    None when neither the kernel (before 6.1) nor the file system says; (0, 0) when the file does
    not do O_DIRECT.  Source: statx(2), STATX_DIOALIGN.
    """
    statx = getattr(libc(), "statx", None)
    if statx is None:
        return None
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    if statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer) != 0:
        return None
    (mask,) = _STATX_MASK.unpack_from(buffer, 0)
    if not mask & _STATX_DIOALIGN:
        return None
    memory, offset = _STATX_DIO.unpack_from(buffer, _STATX_DIO_OFFSET)
    return int(memory), int(offset)
