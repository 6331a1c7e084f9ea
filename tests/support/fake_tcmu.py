"""The kernel's side of TCMU's shared memory, as far as a handler can see it.

Puts entries into the ring as drivers/target/target_core_user.c does (padding where an entry would
wrap, ids of 1 and up, the lowest free one first) and takes the answers, complaining about whatever
would make the kernel declare the device broken.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field

MAILBOX = 128
COMMAND, TASK_MANAGEMENT = 1, 2


class BrokenDeviceError(AssertionError):
    """The kernel would have given up the device."""


@dataclass
class Answer:
    """What the initiator gets: `data` is what the kernel copies back."""

    command_id: int
    status: int
    sense: bytes
    data: bytes
    read_length: int | None


@dataclass
class Outstanding:
    iovs: list[tuple[int, int]]
    direction: str
    answered: bool = False


@dataclass
class FakeKernel:
    """`ring_size` and `data_size` in bytes; `piece` splits data into iovs of at most that size."""

    ring_size: int = 4096 - 128
    data_size: int = 1 << 20
    flags: int = 0xF
    version: int = 2
    piece: int = 1 << 20
    outstanding: dict[int, Outstanding] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory = mmap.mmap(-1, MAILBOX + self.ring_size + self.data_size)
        self.view = memoryview(self.memory)
        self.words = self.view.cast("I")
        struct.pack_into("=HHII", self.view, 0, self.version, self.flags, MAILBOX, self.ring_size)
        self.data = MAILBOX + self.ring_size
        self.view[self.data :] = b"\xee" * self.data_size  # what others left there
        self.harvested = 0

    # -- putting entries in ----------------------------------------------------------------

    @property
    def head(self) -> int:
        return self.words[3]

    @head.setter
    def head(self, value: int) -> None:
        self.words[3] = value

    @property
    def tail(self) -> int:
        return self.words[16]

    def room(self, length: int) -> bool:
        """Would an entry of `length` fit, with padding, and one byte left?"""
        head, tail, size = self.head, self.harvested, self.ring_size
        left = size - head
        needed = length if length < left else left + length
        return (tail - head - 1) % size > needed

    def command(self, cdb: bytes, *, out: bytes = b"", expect: int = 0) -> int | None:
        """A command with data-out, or one that expects data-in; None if there is no room."""
        total = len(out) or expect
        iovs = self._allocate(total)
        base = max(48 + 16 * len(iovs), 112)
        length = base + (len(cdb) + 7) // 8 * 8
        if iovs is None or not self.room(length):
            return None
        at = self._place(length)
        command_id = next(i for i in range(1, 65536) if i not in self.outstanding)
        struct.pack_into("=IHBBIII", self.view, at, length | COMMAND, command_id, 0, 0,
                         len(iovs), 0, 0)  # fmt: skip
        struct.pack_into("=Q", self.view, at + 24, at + base)
        for i, (offset, size) in enumerate(iovs):
            struct.pack_into("=QQ", self.view, at + 48 + 16 * i, offset, size)
        self.view[at + base : at + length] = b"\x5a" * (length - base)
        self.view[at + base : at + base + len(cdb)] = cdb
        done = 0
        for offset, size in iovs:
            part = out[done : done + size]
            self.view[offset : offset + len(part)] = part
            done += size
        self.outstanding[command_id] = Outstanding(iovs, "out" if out else "in")
        self._publish(length)
        return command_id

    def task_management(self, function: int, ids: list[int]) -> bool:
        length = (32 + 2 * len(ids) + 7) // 8 * 8
        if not self.room(length):
            return False
        at = self._place(length)
        struct.pack_into("=IHBBBxxxI", self.view, at, length | TASK_MANAGEMENT, 0, 0, 0, function,
                         len(ids))  # fmt: skip
        for i, each in enumerate(ids):
            struct.pack_into("=H", self.view, at + 32 + 2 * i, each)
        self._publish(length)
        return True

    def raw(self, content: bytes) -> int:
        """Any entry; returns its offset in the mapping."""
        at = self._place(len(content))
        self.view[at : at + len(content)] = content
        self._publish(len(content))
        return at

    def _allocate(self, total: int) -> list[tuple[int, int]]:
        """Pieces of the data area, never two next to each other."""
        taken = sorted(iov for each in self.outstanding.values() for iov in each.iovs)
        iovs, at = [], self.data
        while total:
            size = min(total, self.piece)
            while any(at < offset + length + 64 and offset < at + size for offset, length in taken):
                at += 512
            assert at + size <= len(self.memory), "the data area is full"
            iovs.append((at, size))
            total -= size
            at += size + 512
        return iovs

    def _place(self, length: int) -> int:
        """Where the entry goes; pads the end of the ring where it would not fit."""
        left = self.ring_size - self.head
        if left < length:
            at = MAILBOX + self.head
            struct.pack_into("=IHBB", self.view, at, left, 0, 0, 0)
            self.head = 0
        return MAILBOX + self.head

    def _publish(self, length: int) -> None:
        self.head = (self.head + length) % self.ring_size

    # -- taking answers --------------------------------------------------------------------

    def harvest(self) -> list[Answer]:
        """What the handler has answered since the last call."""
        new = []
        while self.harvested != self.tail:
            at = MAILBOX + self.harvested
            word, command_id, _, flags = struct.unpack_from("=IHBB", self.view, at)
            if word & 7 == COMMAND:
                new.append(self._answer(at, command_id, flags))
            elif self.harvested == self.head:
                raise BrokenDeviceError("the tail has passed the head")
            self.harvested = (self.harvested + (word & ~7)) % self.ring_size
        self.answers += new
        return new

    def _answer(self, at: int, command_id: int, flags: int) -> Answer:
        command = self.outstanding.pop(command_id, None)
        if command is None:
            raise BrokenDeviceError(f"answer to {command_id}, which is not outstanding")
        status, read_length = struct.unpack_from("=BxxxI", self.view, at + 8)
        sense = bytes(self.view[at + 16 : at + 112])
        data = b"".join(bytes(self.view[o : o + n]) for o, n in command.iovs)
        length = read_length if flags & 2 else None
        if command.direction == "out" or status:
            data = b""
        elif length is not None:
            data = data[:length]
        for offset, size in command.iovs:
            self.view[offset : offset + size] = b"\xee" * size  # reused by others
        return Answer(command_id, status, sense, data, length)

    def close(self) -> None:
        self.words.release()
        self.view.release()
        self.memory.close()  # BufferError if the handler still holds a view
