"""TCMU's shared memory: a mailbox, a ring of commands and the data they point to.

Source: <linux/target_core_user.h> (mailbox version 2) and what the kernel does with it.  The kernel
adds entries at `cmd_head`; we answer at `cmd_tail`.  Between the two we keep a third position, up
to which entries have been taken (`taken`), because commands end in another order than they come.

An answer is written over the *oldest* command entry of the ring, whichever command it is for, and
names the command by its id.  So nothing may be read from an entry after it has been taken.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

VERSION: Final = 2
MAILBOX: Final = struct.Struct("=HHII")
"""version, flags, offset of the ring, its size."""

FLAG_OUT_OF_ORDER: Final = 1
FLAG_READ_LENGTH: Final = 2
FLAG_TASK_MANAGEMENT: Final = 4

_HEAD: Final = 12 >> 2
_TAIL: Final = 64 >> 2
_PAD: Final = 0
_COMMAND: Final = 1
_TASK_MANAGEMENT: Final = 2
_OPCODE: Final = 7
_UNKNOWN_OPCODE: Final = 1 << 24
_READ_LENGTH: Final = 2 << 24
_MIN_COMMAND: Final = 112
_IOVS: Final = 48
_SENSE: Final = 16
SENSE_LENGTH: Final = 96

_ENTRY: Final = struct.Struct("=4xHxxI12xQ16xQQ")
"""A command's entry: id, number of pieces, offset of the CDB, offset and length of a piece."""

_CDB_OFFSET: Final = struct.Struct("=Q")
_IOV: Final = struct.Struct("=QQ")
_IDS: Final = 32

CDB_LENGTHS: Final = (6, 10, 10, 16, 16, 12, 10, 10)
"""By the group code (SPC-4 4.2.5.1).  Of a variable-length CDB, group 3, the first 16 bytes."""

CDB_FIELD: Final = 16


DECLINED: Final = 0
BEGUN: Final = 1
DONE: Final = 2

Plain = Callable[[int, bytes, int, memoryview], int]
"""`plain(command_id, cdb, at, data)`: what to do with a command that has `data`, at `at` in the
shared memory.  DECLINED: something else; BEGUN: it will be answered; DONE: it is to be answered
GOOD.  `cdb` has 16 bytes, with anything behind the CDB.  `data` must not be kept."""


def padded(cdb: bytes) -> bytes:
    """The first CDB_FIELD bytes of `cdb`, with zeros for what does not belong to it."""
    return cdb[: CDB_LENGTHS[cdb[0] >> 5]].ljust(CDB_FIELD, b"\0")


class RingError(Exception):
    """The shared memory does not hold what the kernel's interface says it holds."""


def _outside(offset: int, length: int) -> RingError:
    return RingError(f"data of {length} bytes at {offset}, outside of the data area")


class Command(NamedTuple):
    """A command as it was in the ring.

    `command_id` names it until it has been answered.  `cdb` has 16 bytes, padded with zeros.
    `iovs`: offset and length in bytes of each piece of its data in the shared memory, in order.
    """

    command_id: int
    cdb: bytes
    iovs: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        """Bytes of data, in whichever direction the opcode moves them."""
        return sum(length for _, length in self.iovs)


class TaskManagement(NamedTuple):
    """The kernel aborts commands: `function` is SAM's number as TCMU counts them (1 ABORT TASK,
    5 LOGICAL UNIT RESET …), `command_ids` those that it concerns and that are not answered yet."""

    function: int
    command_ids: tuple[int, ...]


class Ring:
    """One device's ring over `memory`, the whole shared mapping (writable).

    Raises RingError for a mailbox of another version or with impossible numbers.  `close` lets go
    of `memory`; it must be called before the mapping is closed.

    `outstanding`: commands that were taken and are not answered.  `moved`: the kernel has something
    to look at; whoever tells it sets that to False.  `declined`: the last `execute` has left an
    entry to `take`.
    """

    __slots__ = (
        "_memory",
        "_size",
        "_start",
        "_taken",
        "_words",
        "declined",
        "flags",
        "moved",
        "outstanding",
    )

    def __init__(self, memory: memoryview) -> None:
        if len(memory) < MAILBOX.size + 128:
            raise RingError(f"the mapping has {len(memory)} bytes, which is too little for a ring")
        version, flags, start, size = MAILBOX.unpack_from(memory)
        if version != VERSION:
            raise RingError(f"mailbox version {version}; this program knows version {VERSION}")
        if start % 8 or size % 8 or not 128 <= start < start + size <= len(memory):
            raise RingError(f"ring of {size} bytes at {start} in a mapping of {len(memory)}")
        self.flags: int = flags
        self.outstanding = 0
        self.moved = False
        self.declined = False
        self._start: int = start
        self._size: int = size
        self._memory = memory
        # Whole 32-bit loads and stores: the kernel must never see half of a position.
        self._words = memory.cast("I")
        self._taken = self._position(_TAIL)

    # -- what can be asked -----------------------------------------------------------------

    @property
    def tail(self) -> int:
        """Up to where the ring has been answered, in bytes from its start."""
        return self._position(_TAIL)

    @property
    def drained(self) -> bool:
        """Everything that was taken has been answered."""
        return self._taken == self._position(_TAIL)

    @property
    def waiting(self) -> bool:
        """There are entries that have not been taken, or nonsense that taking them will find."""
        return self._taken != self._words[_HEAD]

    # -- taking ----------------------------------------------------------------------------

    def execute(self, plain: Plain, most: int) -> int:
        """Take the commands that are there while `plain` does so with each; returns how many,
        `most` at most.

        The first that it declines, or that has not exactly one piece of data, is left to `take`.
        Raises RingError if the head or a piece makes no sense.
        """
        words, memory, start, size = self._words, self._memory, self._start, self._size
        head, taken = words[_HEAD], self._taken
        if head >= size or head & 7:
            self._position(_HEAD)  # raises
        done = 0
        self.declined = True
        while taken != head and done < most:
            offset = start + taken
            index = offset >> 2
            length = words[index] - _COMMAND
            if length & _OPCODE or not _MIN_COMMAND <= length <= size - taken:
                break
            command_id, pieces, cdb, at, data_length = _ENTRY.unpack_from(memory, offset)
            end = at + data_length
            if pieces != 1 or not offset <= cdb <= offset + length - CDB_FIELD:
                break
            if at < start + size or end > len(memory):
                raise _outside(at, data_length)
            data = memory[at:end]
            try:
                outcome = plain(command_id, bytes(memory[cdb : cdb + CDB_FIELD]), at, data)
            finally:
                data.release()  # not dropped: an exception's frames may keep a reference
            if outcome == DECLINED:
                break
            done += 1
            self._taken = taken = (taken + length) % size
            if outcome == DONE and start + words[_TAIL] == offset:  # the oldest entry is its own
                words[index + 1] = command_id
                words[index + 2] = words[index + 3] = 0
                words[_TAIL] = taken
                self.moved = True
            else:
                self.outstanding += 1
                if outcome == DONE:
                    self.answer(command_id, 0)
        else:
            self.declined = False
        return done

    def take(self, most: int = 1 << 30) -> Iterator[Command | TaskManagement]:
        """The entries that are there now and have not been taken yet, `most` at most, in the
        kernel's order.

        Raises RingError for an entry that cannot be.
        """
        words = self._words
        head = self._position(_HEAD)
        while self._taken != head and most:
            most -= 1
            offset = self._start + self._taken
            word = words[offset >> 2]
            length = word & ~_OPCODE
            if not 8 <= length <= self._size - self._taken:
                raise RingError(f"entry of {length} bytes at {self._taken}")
            entry: Command | TaskManagement | None = None
            match word & _OPCODE:
                case 1:
                    entry = self._command(offset, length)
                    self.outstanding += 1
                case 2:
                    entry = self._task_management(offset, length)
                case 0:
                    pass
                case _:
                    words[(offset >> 2) + 1] |= _UNKNOWN_OPCODE
            self._taken = (self._taken + length) % self._size
            if entry is not None:
                yield entry

    def _command(self, offset: int, length: int) -> Command:
        words, memory = self._words, self._memory
        at = offset >> 2
        iov_count = words[at + 2]
        if length < _MIN_COMMAND or _IOVS + 16 * iov_count > length:
            raise RingError(f"command with {iov_count} pieces in an entry of {length} bytes")
        (cdb_offset,) = _CDB_OFFSET.unpack_from(memory, offset + 24)
        if not offset <= cdb_offset < offset + length:
            raise RingError(f"CDB at {cdb_offset}, outside of its entry")
        iovs: tuple[tuple[int, int], ...]
        if iov_count == 1:
            iovs = (_IOV.unpack_from(memory, offset + _IOVS),)
        else:
            end = offset + _IOVS + 16 * iov_count
            iovs = tuple(_IOV.iter_unpack(memory[offset + _IOVS : end]))
        # Not beyond the entry: behind the ring may be pages that are not there.
        cdb = padded(bytes(memory[cdb_offset : min(cdb_offset + CDB_FIELD, offset + length)]))
        return Command(words[at + 1] & 0xFFFF, cdb, iovs)

    def _task_management(self, offset: int, length: int) -> TaskManagement:
        words = self._words
        at = offset >> 2
        count = words[at + 3]
        if _IDS + 2 * count > length:
            raise RingError(f"task management of {count} commands in an entry of {length} bytes")
        ids = self._memory[offset + _IDS : offset + _IDS + 2 * count].cast("H")
        return TaskManagement(words[at + 2] & 0xFF, tuple(ids))

    # -- data ------------------------------------------------------------------------------

    def piece(self, offset: int, length: int) -> memoryview:
        """One piece of a command's data.  It must be let go of before the command is answered.

        Raises RingError if it is not inside the data area.
        """
        if offset < self._start + self._size or offset + length > len(self._memory):
            raise _outside(offset, length)
        return self._memory[offset : offset + length]

    def gather(self, command: Command) -> bytes:
        """A copy of the data that came with `command`."""
        return b"".join([self.piece(offset, length) for offset, length in command.iovs])

    def scatter(self, command: Command, data: memoryview | bytes) -> int:
        """Fill the command's data with `data`, and what is left of it with zeros; returns how many
        bytes of `data` fit.

        Zeros, because the kernel sends all of it: what an earlier command left there would reach
        an initiator.
        """
        done = 0
        for offset, length in command.iovs:
            part = data[done : done + length]
            have = len(part)
            view = self.piece(offset, length)
            view[:have] = part
            if have < length:
                view[have:] = bytes(length - have)
            done += have
        return done

    # -- answering -------------------------------------------------------------------------

    def answer(
        self, command_id: int, status: int, sense: bytes = b"", read_length: int | None = None
    ) -> None:
        """Answer the command; the kernel is told by the caller, once for many answers.

        `read_length`: bytes that are really there, if they are fewer than asked for; only with
        FLAG_READ_LENGTH.  Raises RingError if no command is outstanding: an answer too many would
        make the kernel give up the device.
        """
        if not self.outstanding:
            raise RingError(f"answer to command {command_id}, but none is outstanding")
        self.outstanding -= 1
        words = self._words
        tail = self._skip(self._position(_TAIL))
        at = (self._start + tail) >> 2
        flags = 0 if read_length is None else _READ_LENGTH
        words[at + 1] = command_id | flags
        words[at + 2] = status
        words[at + 3] = read_length or 0
        if sense:
            begin = self._start + tail + _SENSE
            self._memory[begin : begin + SENSE_LENGTH] = sense[:SENSE_LENGTH].ljust(
                SENSE_LENGTH, b"\0"
            )
        words[_TAIL] = (tail + (words[at] & ~_OPCODE)) % self._size
        self.moved = True

    def settle(self) -> None:
        """Step over entries that need no answer; to be called when a batch has been worked on."""
        tail = self._position(_TAIL)
        behind = self._skip(tail)
        if behind != tail:
            self._words[_TAIL] = behind
            self.moved = True

    def _skip(self, position: int) -> int:
        """The next command's entry from `position` on, or what was taken last."""
        words = self._words
        while position != self._taken:
            word = words[(self._start + position) >> 2]
            if word & _OPCODE == _COMMAND:
                break
            position = (position + (word & ~_OPCODE)) % self._size
        return position

    def close(self) -> None:
        """Let go of the memory."""
        self._words.release()
        self._memory.release()

    def _position(self, index: int) -> int:
        position = self._words[index]
        if position >= self._size or position % 8:
            raise RingError(f"position {position} in a ring of {self._size} bytes")
        return position
