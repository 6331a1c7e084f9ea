"""Who answers which message: pyfuse3 for the tree, this module for the data of the disks.

Sans-IO.  The kernel's messages come in by `from_kernel`, the library's answers by `from_library`;
what is to be sent goes out by two callables.  Requests for a disk's data are known by their handle,
which the tree's `open` has taken from `handles`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from functools import partial

from ploopd.frontends.fuse import wire
from ploopd.frontends.fuse.disk import Disk, Operation, Value

DISK_HANDLE = 1 << 62
"""Set in the handles of disks, and in no other."""

OUTSTANDING = 8
"""Requests given to the library that it has not answered: their answers must fit its socket."""

_STABLE = os.O_DSYNC | os.O_SYNC
_DATA = frozenset(
    {
        wire.Opcode.READ,
        wire.Opcode.WRITE,
        wire.Opcode.FSYNC,
        wire.Opcode.FALLOCATE,
        wire.Opcode.LSEEK,
    }
)

ToKernel = Callable[[Sequence[bytes | bytearray | memoryview]], None]
"""Sends one message, given in pieces, to the kernel; never waits."""


class Handles:
    """The open disks by their handles."""

    def __init__(self) -> None:
        self._disks: dict[int, Disk | None] = {}
        self._next = 0

    def __getitem__(self, handle: int) -> Disk | None:
        """None: its device has gone."""
        return self._disks[handle]

    def __contains__(self, handle: int) -> bool:
        return handle in self._disks

    def open(self, disk: Disk) -> int:
        """A new handle for `disk`."""
        self._next += 1
        handle = DISK_HANDLE | self._next
        self._disks[handle] = disk
        return handle

    def close(self, handle: int) -> None:
        del self._disks[handle]

    def count(self, disk: Disk) -> int:
        """How many handles of `disk` are open."""
        return sum(each is disk for each in self._disks.values())

    def forget(self, disk: Disk) -> None:
        """The device has gone: its handles stay open, and nothing can be done with them."""
        self._disks = {
            handle: None if each is disk else each for handle, each in self._disks.items()
        }


class Channel:
    """One session with the kernel.

    `queue` are the messages for the library that it has not been given, oldest first: the caller
    sends them while `may_send` says so, and calls `sent` for each.
    """

    def __init__(self, *, handles: Handles, to_kernel: ToKernel) -> None:
        self._handles = handles
        self._to_kernel = to_kernel
        self._operations: dict[int, Operation] = {}
        self._outstanding: dict[int, int] = {}
        self._touched: set[Disk] = set()
        self._shared_mmap = False
        self._closed = False
        self.queue: list[bytes] = []

    # -- messages --------------------------------------------------------------------------

    def from_kernel(self, message: memoryview) -> None:
        """Take one request; its memory is not used after the call."""
        head = wire.header(message)
        if head.opcode in _DATA:
            handle = wire.first_handle(message)
            if handle & DISK_HANDLE:
                self._disk_request(head, handle, message)
                return
        elif head.opcode == wire.Opcode.INTERRUPT:
            operation = self._operations.get(wire.interrupted(message))
            if operation is not None:
                operation.interrupt()
            return  # whatever the library does, it does at once
        elif head.opcode == wire.Opcode.INIT:
            self._shared_mmap = wire.restrict_init(message)
        if head.opcode == wire.Opcode.FALLOCATE:
            self._reply(head.unique, errno.EOPNOTSUPP)  # else it is off for the disks, too
        elif head.opcode == wire.Opcode.LSEEK:
            self._reply(head.unique, errno.EINVAL)
        else:
            self.queue.append(bytes(message))

    def kick(self) -> None:
        """Start what has been asked for since the last call."""
        touched, self._touched = self._touched, set()
        for disk in touched:
            disk.kick()

    def may_send(self) -> bool:
        """Whether the library may be given the first message of `queue`."""
        return bool(self.queue) and len(self._outstanding) < OUTSTANDING

    def sent(self) -> bytes:
        """Take the first message of `queue`, which is about to be sent."""
        message = self.queue.pop(0)
        head = wire.header(memoryview(message))
        if head.opcode not in wire.UNANSWERED:
            self._outstanding[head.unique] = head.opcode
        return message

    def from_library(self, answer: bytearray) -> None:
        """Pass on an answer or a notification."""
        unique, number = wire.reply_head(answer)
        opcode = self._outstanding.pop(unique, None) if unique else None
        if number == 0 and opcode == wire.Opcode.INIT:
            wire.extend_init(answer, shared_mmap=self._shared_mmap)
        elif (
            number == 0 and opcode == wire.Opcode.OPEN and wire.opened_handle(answer) & DISK_HANDLE
        ):
            wire.allow_parallel_writes(answer)
        self._to_kernel((answer,))

    def close(self) -> None:
        """Drop what is parked and refuse data from now on: the view is being unmounted."""
        self._closed = True
        for operation in list(self._operations.values()):
            operation.interrupt()

    @property
    def operations(self) -> int:
        """How many requests for data are under way."""
        return len(self._operations)

    # -- data ------------------------------------------------------------------------------

    def _disk_request(self, head: wire.Header, handle: int, message: memoryview) -> None:
        if not self._closed and handle not in self._handles:
            self._reply(head.unique, errno.EBADF)
            return
        disk = None if self._closed else self._handles[handle]
        if disk is None:
            self._reply(head.unique, errno.ENODEV)
            return
        self._touched.add(disk)
        answer = partial(self._answered, head.unique, head.opcode)
        operation: Operation | None = None
        match head.opcode:
            case wire.Opcode.READ:
                read = wire.transfer(message)
                operation = disk.read(read.offset, read.size, answer)
            case wire.Opcode.WRITE:
                write = wire.transfer(message)
                operation = disk.write(
                    write.offset,
                    wire.write_data(message, write.size),
                    answer,
                    stable=bool(write.flags & _STABLE),
                )
            case wire.Opcode.FSYNC:
                operation = disk.flush(answer)
            case wire.Opcode.FALLOCATE:
                asked = wire.allocation(message)
                operation = disk.allocate(asked.offset, asked.length, asked.mode, answer)
            case _:
                self._seek(disk, head.unique, message)
        if operation is not None:
            self._operations[head.unique] = operation

    def _seek(self, disk: Disk, unique: int, message: memoryview) -> None:
        asked = wire.seek(message)
        try:
            place = disk.seek(asked.offset, asked.whence)
        except OSError as error:
            self._reply(unique, error.errno or errno.EIO)
        else:
            self._to_kernel((wire.seek_reply(unique, place),))

    def _answered(self, unique: int, opcode: int, number: int, value: Value) -> None:
        self._operations.pop(unique, None)
        if number:
            self._reply(unique, number)
        elif isinstance(value, memoryview):
            self._to_kernel((wire.reply(unique, len(value)), value))
        elif opcode == wire.Opcode.WRITE and isinstance(value, int):
            self._to_kernel((wire.written_reply(unique, value),))
        else:
            self._reply(unique, 0)

    def _reply(self, unique: int, number: int) -> None:
        self._to_kernel((wire.error_reply(unique, number),))
