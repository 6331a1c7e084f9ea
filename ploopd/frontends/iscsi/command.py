"""A SCSI command as the transport sees it, and the residual arithmetic."""

from __future__ import annotations

import struct
from typing import Final

from ploopd.fileio.buffers import Buffer
from ploopd.frontends.iscsi.pdu import FINAL
from ploopd.scsi.nexus import ItlNexus
from ploopd.scsi.task import Attribute, Direction, Task

READ_FLAG: Final = 0x40
WRITE_FLAG: Final = 0x20
ATTRIBUTE_MASK: Final = 0x07

OVERFLOW: Final = 0x04
UNDERFLOW: Final = 0x02

BLOCK: Final = 512
_WRITE_16: Final = struct.Struct(">BBQIBB")


class ReadyToTransfer:
    """An R2T that has not been answered completely: [`offset`, `end`) of the command's data."""

    __slots__ = ("data_sn", "end", "offset", "tag")

    def __init__(self, tag: int, offset: int, end: int) -> None:
        self.tag = tag
        self.offset = offset
        self.end = end
        self.data_sn = 0


class Command:
    """A SCSI command from its PDU to its response.

    `expected` is the Expected Data Transfer Length.  `counted`: the command takes a place in the
    command window.  `unsolicited`: Data-Out PDUs that we did not ask for are still to come.

    Gathering: `wanted` bytes of data-out are needed, `received` are here.  `stream` is set while
    they go straight to the device; otherwise they are kept in `buffer`, which stands for the bytes
    from `base` on.  `next_offset` is what the next R2T asks for.  `reserved` is the command's share
    of the connection's memory budget.  `held`: the status that waits until the initiator has sent
    what it announced.
    """

    __slots__ = (
        "base",
        "buffer",
        "cdb",
        "counted",
        "data_sn",
        "deadline",
        "detached",
        "expected",
        "failed",
        "flags",
        "held",
        "held_sense",
        "held_status",
        "itl",
        "lun",
        "next_offset",
        "r2t_sn",
        "r2ts",
        "received",
        "reserved",
        "stream",
        "tag",
        "task",
        "unsolicited",
        "unsolicited_sn",
        "wanted",
    )

    def __init__(
        self, tag: int, lun: int, flags: int, expected: int, cdb: bytes, *, counted: bool = True
    ) -> None:
        self.tag = tag
        self.lun = lun
        self.flags = flags
        self.expected = expected
        self.cdb = cdb
        self.counted = counted
        self.task: Task | None = None
        self.itl: ItlNexus | None = None
        self.data_sn = 0
        self.r2t_sn = 0
        self.unsolicited = bool(flags & WRITE_FLAG) and not flags & FINAL
        self.unsolicited_sn = 0
        self.wanted = 0
        self.received = 0
        self.base = 0
        self.buffer: Buffer | None = None
        self.stream: int | None = None
        self.r2ts: list[ReadyToTransfer] = []
        self.next_offset = 0
        self.reserved = 0
        self.deadline = 0.0
        self.held = False
        self.held_status = 0
        self.held_sense = b""
        self.detached = False
        self.failed = False

    @property
    def reads(self) -> bool:
        return bool(self.flags & READ_FLAG)

    @property
    def writes(self) -> bool:
        return bool(self.flags & WRITE_FLAG)

    @property
    def attribute(self) -> int:
        return self.flags & ATTRIBUTE_MASK or Attribute.SIMPLE

    @property
    def gathering(self) -> bool:
        """Whether data-out is still to come."""
        return self.unsolicited or self.received < self.wanted

    def remainder_cdb(self) -> bytes:
        """A WRITE (16) for what the stream has not written: from `received` to the end."""
        assert self.stream is not None
        first = (self.stream + self.received) // BLOCK
        count = (self.wanted - self.received) // BLOCK
        return _WRITE_16.pack(0x8A, 0, first, count, 0, 0)

    def residual(self, task: Task) -> tuple[int, int]:
        """(flag, count): how far the command's own length is from what the initiator expected.

        Source: RFC 7143 11.4.5.  The command's length counts only in its own direction; a command
        that moved nothing leaves all that was expected.
        """
        if self.stream is not None:
            return 0, 0  # only commands with equal lengths are streamed
        if task.direction is Direction.FROM_INITIATOR:
            actual = task.data_out_length
            expected = self.expected if self.writes else 0
        elif task.direction is Direction.TO_INITIATOR and (self.reads or not self.writes):
            actual = len(task.data_in)
            expected = self.expected if self.reads else 0
        else:
            actual, expected = 0, self.expected if self.reads or self.writes else 0
        if actual > expected:
            return OVERFLOW, actual - expected
        return (UNDERFLOW, expected - actual) if actual < expected else (0, 0)
