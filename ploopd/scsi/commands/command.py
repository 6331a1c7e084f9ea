"""One row of the command table: everything that can be said of a command without running it.

Source: SPC-4 6.35 (CDB usage data), SPC-4 5.12 (reservations), SBC-3 clause 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import TYPE_CHECKING

from ploopd.scsi.cdb import LbaRange
from ploopd.scsi.execution import Script
from ploopd.scsi.sense import CheckCondition, invalid_cdb_field
from ploopd.scsi.task import Direction, Task

if TYPE_CHECKING:
    from ploopd.scsi.logical_unit import LogicalUnit

Handler = Callable[["LogicalUnit", Task], bytes | Script | None]
"""Runs a command.  bytes: its data-in, it ends with GOOD.  A script: is driven to its end.  None:
the handler has started the command and will end it through the logical unit."""


class Standby(Enum):
    """What happens to the command while the storage is away."""

    ANSWERS = auto()
    """It needs no storage and always answers."""
    DEVICE = auto()
    """It goes to the block device, where the gate parks it."""


class ReservationClass(Enum):
    """Which reservations of other nexuses stop the command (SPC-4 table 66, SBC-3 table 13)."""

    ALLOWED = auto()
    """None."""
    READ = auto()
    """Exclusive access."""
    ANY = auto()
    """Write exclusive and exclusive access."""


class DataOut(Enum):
    """What a command says to a transport that brings another amount than it asked for."""

    PARTIAL = auto()
    """It writes what there is; the transport reports the residual."""
    ENOUGH = auto()
    """Fewer bytes are 05/0E/03."""
    EXACT = auto()
    """Any other amount is 05/0E/03."""
    PARAMETERS = auto()
    """A parameter list: fewer bytes are 05/1A/00."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command, or one service action of an operation code.

    `mask`: the bits of the CDB that may be set, its length is the CDB's.  `extent`: LBA and number
    of blocks from the CDB; `length_byte` is where the number is, `limited` says whether MAXIMUM
    TRANSFER LENGTH applies.  `allocation`: offset and size of the ALLOCATION LENGTH field.
    `data_out`: how many bytes the command asks for.  `check`: tests of single fields, raises
    `CheckCondition`.  `attention`: whether a pending unit attention is reported instead.
    `fua`: byte 1 has DPO and FUA.  `thin`: only with logical block provisioning; `thin_bits`: so
    are these bits of byte 1.  `exclusive`: the range is this command's alone while it runs.
    """

    opcode: int
    name: str
    mask: bytes
    handler: Handler
    service_action: int | None = None
    direction: Direction = Direction.NONE
    standby: Standby = Standby.ANSWERS
    reservation: ReservationClass = ReservationClass.ANY
    writes: bool = False
    extent: Callable[[bytes], LbaRange] | None = None
    length_byte: int = 0
    limited: bool = False
    allocation: tuple[int, int] | None = None
    data_out: Callable[[LogicalUnit, Task], int] | None = None
    data_out_rule: DataOut = DataOut.PARTIAL
    check: Callable[[LogicalUnit, Task], None] | None = None
    attention: bool = True
    fua: bool = False
    thin: bool = False
    thin_bits: int = 0
    exclusive: bool = False
    reserved: int = field(init=False)

    def __post_init__(self) -> None:
        bits = 8 * len(self.mask)
        allowed = int.from_bytes(self.mask, "big")
        object.__setattr__(self, "reserved", ((1 << bits) - 1) & ~allowed)

    def without_provisioning(self) -> Command:
        """The row for a unit that is fully provisioned."""
        second = self.mask[1] & ~self.thin_bits
        return replace(self, mask=bytes([self.mask[0], second]) + self.mask[2:])

    @property
    def length(self) -> int:
        """CDB length in bytes."""
        return len(self.mask)

    @property
    def usage(self) -> bytes:
        """CDB usage data: the mask with operation code and service action filled in."""
        if self.service_action is None:
            return bytes([self.opcode]) + self.mask[1:]
        second = self.mask[1] & 0xE0 | self.service_action
        return bytes([self.opcode, second]) + self.mask[2:]

    def check_reserved(self, cdb: bytes) -> None:
        """Raise 05/24/00 with the position of the first bit that must not be set."""
        length = len(self.mask)
        bad = int.from_bytes(cdb[:length], "big") & self.reserved
        if bad:
            raise self._reserved(bad)

    def _reserved(self, bad: int) -> CheckCondition:
        position = bad.bit_length() - 1
        return invalid_cdb_field(len(self.mask) - 1 - position // 8, position % 8)

    def allocation_length(self, cdb: bytes) -> int | None:
        """The ALLOCATION LENGTH field; None if the command has none."""
        if self.allocation is None:
            return None
        offset, size = self.allocation
        return int.from_bytes(cdb[offset : offset + size], "big")
