"""The kernel's FUSE messages that this front end handles itself: bytes ↔ values.

Source: include/uapi/linux/fuse.h (protocol 7.31 and later; native byte order).  pyfuse3 answers for
the tree; what it does not offer is here: requests for the data of a disk, with fallocate, lseek and
interrupts, and the handful of flags in INIT and OPEN that go with them.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

MAX_WRITE = 1 << 20
"""Bytes of data in the largest message: 256 pages, the kernel's default maximum."""
MESSAGE_SIZE = MAX_WRITE + 8192
"""What must be read from the kernel at once."""

IN_HEADER = struct.Struct("=IIQQIIIHH")
OUT_HEADER = struct.Struct("=IiQ")

_INIT_IN = struct.Struct("=IIII")
_READ = struct.Struct("=QQIIQII")
_FSYNC = struct.Struct("=QII")
_FALLOCATE = struct.Struct("=QQQII")
_LSEEK = struct.Struct("=QQII")
_UNIQUE = struct.Struct("=Q")
_U32 = struct.Struct("=I")
_U16 = struct.Struct("=H")
_OPEN_OUT = struct.Struct("=QII")

_SPLICE = 1 << 7 | 1 << 8 | 1 << 9
"""FUSE_SPLICE_WRITE, _MOVE, _READ: not possible through a socket."""
_INIT_EXT = 1 << 30
_DIRECT_IO_ALLOW_MMAP = 1 << (36 - 32)
_PARALLEL_DIRECT_WRITES = 1 << 6

_FLAGS_IN = IN_HEADER.size + 12
_FLAGS2_IN = IN_HEADER.size + 16
_FLAGS_OUT = OUT_HEADER.size + 12
_BACKGROUND_OUT = OUT_HEADER.size + 16
_FLAGS2_OUT = OUT_HEADER.size + 32
_INIT_OUT_SIZE = OUT_HEADER.size + 64

MAX_BACKGROUND = 128
"""Asynchronous requests under way at once (kernel default: 12), e.g. of io_uring or a loop device
with direct I/O."""


class Opcode(IntEnum):
    """The requests that are told apart."""

    FORGET = 2
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    FSYNC = 20
    INIT = 26
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    LSEEK = 46


UNANSWERED = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})
"""Requests that have no reply."""


class Header(NamedTuple):
    """What every request begins with; `length` is that of the whole message."""

    length: int
    opcode: int
    unique: int
    node: int


class Transfer(NamedTuple):
    """READ or WRITE; `flags` are those of the open file."""

    handle: int
    offset: int
    size: int
    flags: int


class Allocation(NamedTuple):
    """FALLOCATE; `mode` as in fallocate(2)."""

    handle: int
    offset: int
    length: int
    mode: int


class Seek(NamedTuple):
    """LSEEK with SEEK_DATA or SEEK_HOLE."""

    handle: int
    offset: int
    whence: int


def header(message: memoryview) -> Header:
    length, opcode, unique, node, *_ = IN_HEADER.unpack_from(message)
    return Header(length, opcode, unique, node)


def transfer(message: memoryview) -> Transfer:
    handle, offset, size, _, _, flags, _ = _READ.unpack_from(message, IN_HEADER.size)
    return Transfer(handle, offset, size, flags)


def write_data(message: memoryview, size: int) -> memoryview:
    """The data of a WRITE."""
    start = IN_HEADER.size + _READ.size
    return message[start : start + size]


def allocation(message: memoryview) -> Allocation:
    handle, offset, length, mode, _ = _FALLOCATE.unpack_from(message, IN_HEADER.size)
    return Allocation(handle, offset, length, mode)


def seek(message: memoryview) -> Seek:
    handle, offset, whence, _ = _LSEEK.unpack_from(message, IN_HEADER.size)
    return Seek(handle, offset, whence)


def fsync_handle(message: memoryview) -> int:
    handle: int = _FSYNC.unpack_from(message, IN_HEADER.size)[0]
    return handle


def first_handle(message: memoryview) -> int:
    """The handle that READ, WRITE, FSYNC, FALLOCATE and LSEEK all begin with."""
    handle: int = _UNIQUE.unpack_from(message, IN_HEADER.size)[0]
    return handle


def interrupted(message: memoryview) -> int:
    """Which request an INTERRUPT means."""
    unique: int = _UNIQUE.unpack_from(message, IN_HEADER.size)[0]
    return unique


def reply(unique: int, size: int) -> bytes:
    """The head of a successful answer with `size` bytes behind it."""
    return OUT_HEADER.pack(OUT_HEADER.size + size, 0, unique)


def error_reply(unique: int, errno: int) -> bytes:
    """An answer that failed, or with 0 one without data."""
    return OUT_HEADER.pack(OUT_HEADER.size, -errno, unique)


def written_reply(unique: int, size: int) -> bytes:
    return reply(unique, 8) + struct.pack("=II", size, 0)


def seek_reply(unique: int, offset: int) -> bytes:
    return reply(unique, 8) + _UNIQUE.pack(offset)


def reply_head(message: memoryview | bytearray) -> tuple[int, int]:
    """`unique` (0 for a notification) and errno (0 for success) of an answer."""
    _, error, unique = OUT_HEADER.unpack_from(message)
    return unique, -error


def restrict_init(message: memoryview) -> bool:
    """Take out of the kernel's INIT what cannot pass through a socket; says whether it offers
    shared mappings of files with direct I/O (Linux 6.6)."""
    _, minor, _, flags = _INIT_IN.unpack_from(message, IN_HEADER.size)
    _U32.pack_into(message, _FLAGS_IN, flags & ~_SPLICE)
    if minor < 36 or not flags & _INIT_EXT or len(message) < _FLAGS2_IN + 4:
        return False
    return bool(_U32.unpack_from(message, _FLAGS2_IN)[0] & _DIRECT_IO_ALLOW_MMAP)


def extend_init(answer: bytearray, *, shared_mmap: bool) -> None:
    """Put into the answer to INIT what pyfuse3 does not ask for."""
    if len(answer) < _INIT_OUT_SIZE:
        return
    _U16.pack_into(answer, _BACKGROUND_OUT, MAX_BACKGROUND)
    _U16.pack_into(answer, _BACKGROUND_OUT + 2, MAX_BACKGROUND * 3 // 4)
    if shared_mmap:
        flags = _U32.unpack_from(answer, _FLAGS_OUT)[0]
        flags2 = _U32.unpack_from(answer, _FLAGS2_OUT)[0] if flags & _INIT_EXT else 0
        _U32.pack_into(answer, _FLAGS_OUT, flags | _INIT_EXT)
        _U32.pack_into(answer, _FLAGS2_OUT, flags2 | _DIRECT_IO_ALLOW_MMAP)


def opened_handle(answer: bytearray) -> int:
    """The handle in the answer to OPEN."""
    handle: int = _OPEN_OUT.unpack_from(answer, OUT_HEADER.size)[0]
    return handle


def allow_parallel_writes(answer: bytearray) -> None:
    """In the answer to OPEN: writes to this file need not wait for each other in the kernel."""
    at = OUT_HEADER.size + 8
    _U32.pack_into(answer, at, _U32.unpack_from(answer, at)[0] | _PARALLEL_DIRECT_WRITES)
