"""One io_uring, driven from Python: ctypes for the three system calls, memoryviews over its rings.

The rings are memory shared with the kernel.  What is written here relies on x86-64's ordering of
plain loads and stores (stores become visible in program order, loads are not moved across loads):
`probe` refuses every other machine.  One thread at a time may use a `Ring`.

Source: io_uring_setup(2), io_uring_enter(2), io_uring_register(2), <linux/io_uring.h>.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
import sys
from enum import IntEnum
from typing import Final

from ploopd.fileio.libc import last_error, libc

_SYS_SETUP = 425
_SYS_ENTER: Final = 426
_SYS_REGISTER: Final = 427

_SETUP_CQSIZE: Final = 1 << 3
_SETUP_CLAMP: Final = 1 << 4
_SETUP_COOP_TASKRUN: Final = 1 << 8
_SETUP_TASKRUN_FLAG: Final = 1 << 9
_COOPERATIVE = _SETUP_COOP_TASKRUN | _SETUP_TASKRUN_FLAG
"""Completions do not interrupt the thread: it sees them when it enters the kernel (Linux 5.19)."""
_ENTER_GETEVENTS: Final = 1 << 0
_FEAT_NODROP: Final = 1 << 1
_REGISTER_EVENTFD: Final = 4
_REGISTER_IOWQ_MAX_WORKERS: Final = 19
_SQ_CQ_OVERFLOW: Final = 1 << 1
_SQ_TASKRUN: Final = 1 << 2

_OFF_SQ_RING: Final = 0
_OFF_CQ_RING: Final = 0x8000000
_OFF_SQES: Final = 0x10000000

_PARAMS_SIZE: Final = 120
_PARAMS_HEAD: Final = struct.Struct(
    "<5I"
)  # sq_entries cq_entries flags sq_thread_cpu sq_thread_idle
_PARAMS_FEATURES: Final = 20
_PARAMS_SQ_OFF: Final = 40  # head tail ring_mask ring_entries flags dropped array
_PARAMS_CQ_OFF: Final = 80  # head tail ring_mask ring_entries overflow cqes flags
_OFFSETS: Final = struct.Struct("<7I")

_SQE: Final = struct.Struct(
    "<BBHiQQIIQ24x"
)  # opcode flags ioprio fd off addr len op_flags user_data
_CQE: Final = struct.Struct("<Qi4x")
_SQE_SIZE: Final = 64
_CQE_SIZE: Final = 16

CANCEL_ALL_OF_FD: Final = 0b11
"""IORING_ASYNC_CANCEL_ALL | IORING_ASYNC_CANCEL_FD (Linux 5.19)."""


class Opcode(IntEnum):
    """The operations in use; all of them exist since Linux 5.6."""

    NOP = 0
    FSYNC = 3
    TIMEOUT = 11
    ASYNC_CANCEL = 14
    FALLOCATE = 17
    READ = 22
    WRITE = 23


FSYNC_DATASYNC: Final = 1
ASYNC: Final = 1 << 4
"""IOSQE_ASYNC: a kernel worker does it from the start, so that submitting never waits."""

Entry = tuple[int, int, int, int, int, int, int, int]
"""opcode, fd, address, length, offset, tag, op_flags, sqe_flags: what `Ring.push` takes."""


class Ring:
    """A submission and a completion ring.

    `entries`: submissions that fit between two `submit` calls.  `completions`: operations that may
    be under way; keeping to it is the caller's business, the kernel keeps the overflow (NODROP).
    Raises `OSError` where the kernel refuses.
    """

    def __init__(self, entries: int = 256, completions: int = 4096) -> None:
        self._syscall = libc().syscall
        params = bytearray(_PARAMS_SIZE)
        self.fd = self._setup(params, entries, completions, _COOPERATIVE)
        if self.fd < 0 and ctypes.get_errno() == errno.EINVAL:
            self.fd = self._setup(params, entries, completions, 0)
        if self.fd < 0:
            raise last_error("io_uring_setup")
        try:
            self._map(params)
        except BaseException:
            os.close(self.fd)
            raise

    def _setup(self, params: bytearray, entries: int, completions: int, flags: int) -> int:
        """io_uring_setup(2)."""
        flags |= _SETUP_CQSIZE | _SETUP_CLAMP
        params[:] = bytes(_PARAMS_SIZE)
        _PARAMS_HEAD.pack_into(params, 0, 0, completions, flags, 0, 0)
        raw = (ctypes.c_char * _PARAMS_SIZE).from_buffer(params)
        return int(self._syscall(_SYS_SETUP, entries, raw))

    def _map(self, params: bytearray) -> None:
        sq_entries, cq_entries, *_ = _PARAMS_HEAD.unpack_from(params, 0)
        (features,) = struct.unpack_from("<I", params, _PARAMS_FEATURES)
        if not features & _FEAT_NODROP:
            raise OSError(errno.ENOSYS, "io_uring without NODROP (before Linux 5.5)")
        sq = _OFFSETS.unpack_from(params, _PARAMS_SQ_OFF)
        cq = _OFFSETS.unpack_from(params, _PARAMS_CQ_OFF)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        sq_map = mmap.mmap(self.fd, sq[6] + sq_entries * 4, flags, offset=_OFF_SQ_RING)
        cq_map = mmap.mmap(self.fd, cq[5] + cq_entries * _CQE_SIZE, flags, offset=_OFF_CQ_RING)
        self._sqes = mmap.mmap(self.fd, sq_entries * _SQE_SIZE, flags, offset=_OFF_SQES)
        self._sq = memoryview(sq_map).cast("I")
        self._cq = memoryview(cq_map).cast("I")
        self._cqes = memoryview(cq_map)[cq[5] :]
        self._sq_head, self._sq_tail, self._sq_flags = sq[0] // 4, sq[1] // 4, sq[4] // 4
        self._cq_head, self._cq_tail = cq[0] // 4, cq[1] // 4
        self.entries, self.completions = sq_entries, cq_entries
        self._sq_mask, self._cq_mask = sq_entries - 1, cq_entries - 1
        for index in range(sq_entries):  # slot i of the ring is always entry i
            self._sq[sq[6] // 4 + index] = index
        self._tail = self._sq[self._sq_tail]
        self._head = self._cq[self._cq_head]
        self.pending = 0

    def push(
        self,
        opcode: int,
        fd: int,
        address: int,
        length: int,
        offset: int,
        tag: int,
        op_flags: int = 0,
        sqe_flags: int = 0,
    ) -> bool:
        """Queue an operation, or say False: the ring is full, `submit` first.

        `tag` comes back with the result.  The memory at `address` belongs to the kernel until then.
        """
        if self.pending == self.entries:
            return False
        tail = self._tail
        _SQE.pack_into(
            self._sqes,
            (tail & self._sq_mask) * _SQE_SIZE,
            opcode,
            sqe_flags,
            0,
            fd,
            offset,
            address,
            length,
            op_flags,
            tag,
        )
        self._tail = (tail + 1) & 0xFFFFFFFF
        self.pending += 1
        return True

    def submit(self, wait: int = 0) -> None:
        """Hand what is pending to the kernel, and wait for `wait` completions.

        `pending` tells what it did not take.  Raises `OSError` with EAGAIN or EBUSY when the kernel
        wants completions to be reaped first.
        """
        self._sq[self._sq_tail] = self._tail
        while True:
            flags = _ENTER_GETEVENTS if wait else 0
            taken = self._syscall(_SYS_ENTER, self.fd, self.pending, wait, flags, None, 0)
            if taken >= 0:
                self.pending -= taken
                return
            if ctypes.get_errno() != errno.EINTR:
                raise last_error("io_uring_enter")

    def ready(self) -> bool:
        """Is there something to reap?"""
        return self._cq[self._cq_tail] != self._head or bool(
            self._sq[self._sq_flags] & (_SQ_CQ_OVERFLOW | _SQ_TASKRUN)
        )

    def completed(self) -> int:
        """How many there are to reap, without what the kernel has no room for."""
        if self._sq[self._sq_flags] & (_SQ_CQ_OVERFLOW | _SQ_TASKRUN):
            self._fetch()
        count: int = (self._cq[self._cq_tail] - self._head) & 0xFFFFFFFF
        return count

    def reap(self, most: int = 1 << 31) -> list[tuple[int, int]]:
        """The (tag, result) of what has completed; a result < 0 is a negative errno."""
        if self._sq[self._sq_flags] & (_SQ_CQ_OVERFLOW | _SQ_TASKRUN):
            self._fetch()
        tail, head = self._cq[self._cq_tail], self._head
        cqes, mask, unpack = self._cqes, self._cq_mask, _CQE.unpack_from
        found: list[tuple[int, int]] = []
        while head != tail and len(found) < most:
            found.append(unpack(cqes, (head & mask) * _CQE_SIZE))
            head = (head + 1) & 0xFFFFFFFF
        self._head = self._cq[self._cq_head] = head
        return found

    def _fetch(self) -> None:
        """Make the kernel put what it keeps aside into the completion ring, as far as it fits."""
        if self._syscall(_SYS_ENTER, self.fd, 0, 0, _ENTER_GETEVENTS, None, 0) < 0:
            number = ctypes.get_errno()
            if number not in (errno.EINTR, errno.EBUSY, errno.EAGAIN):
                raise last_error("io_uring_enter")

    def register_eventfd(self, eventfd: int) -> None:
        """Add 1 to `eventfd` with every completion."""
        self._register(_REGISTER_EVENTFD, ctypes.c_int(eventfd), 1)

    def limit_workers(self, bounded: int) -> None:
        """Let the kernel use up to `bounded` workers for file operations that block.

        Its default is 4 per CPU: eight operations that hang would stop all others.
        """
        self._register(_REGISTER_IOWQ_MAX_WORKERS, (ctypes.c_uint * 2)(bounded, 0), 2)

    def _register(self, opcode: int, argument: ctypes._CData, count: int) -> None:
        if self._syscall(_SYS_REGISTER, self.fd, opcode, ctypes.byref(argument), count) < 0:
            raise last_error("io_uring_register")

    def close(self) -> None:
        """Give the ring back; nothing may be under way."""
        os.close(self.fd)


def probe() -> str | None:
    """None if io_uring works here, else why not.  It is really used, not only looked for."""
    if platform.machine() != "x86_64" or sys.maxsize < 1 << 62:
        return f"io_uring is driven on x86-64 only, this is {platform.machine()}"
    try:
        ring = Ring(8, 16)
    except OSError as error:
        return f"io_uring_setup: {os.strerror(error.errno or errno.EIO)}"
    eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        ring.register_eventfd(eventfd)
        ring.push(Opcode.NOP, -1, 0, 0, 0, 1)
        ring.submit(wait=1)
        if ring.reap() != [(1, 0)] or os.eventfd_read(eventfd) != 1:
            return "io_uring does not complete a no-op"
    except OSError as error:
        return str(error)
    finally:
        ring.close()
        os.close(eventfd)
    return None
