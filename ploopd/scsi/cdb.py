"""CDB fields: LBA and transfer length of each CDB size.

Source: SPC-4 4.2 (CDB formats), SBC-3 clause 5.  All numbers are logical blocks.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

BLOCK_SHIFT: Final = 9
BLOCK_SIZE: Final = 1 << BLOCK_SHIFT

LbaRange = tuple[int, int]
"""(LBA, number of logical blocks)."""

CDB6: Final = Struct(">BBHBB")
"""opcode, LBA bits 20-16, LBA bits 15-0, transfer length, control."""
CDB10: Final = Struct(">BBIBHB")
"""opcode, flags, LBA, group, transfer length, control."""
CDB12: Final = Struct(">BBIIBB")
"""opcode, flags, LBA, transfer length, group, control."""
CDB16: Final = Struct(">BBQIBB")
"""opcode, flags, LBA, transfer length, group, control."""


def range_6(cdb: bytes) -> LbaRange:
    """READ(6), WRITE(6): a transfer length of 0 means 256 blocks (SBC-3 5.10)."""
    _, high, low, blocks, _ = CDB6.unpack_from(cdb)
    return (high & 0x1F) << 16 | low, blocks or 256


def range_10(cdb: bytes) -> LbaRange:
    _, _, lba, _, blocks, _ = CDB10.unpack_from(cdb)
    return lba, blocks


def range_12(cdb: bytes) -> LbaRange:
    _, _, lba, blocks, _, _ = CDB12.unpack_from(cdb)
    return lba, blocks


def range_16(cdb: bytes) -> LbaRange:
    _, _, lba, blocks, _, _ = CDB16.unpack_from(cdb)
    return lba, blocks


def range_caw(cdb: bytes) -> LbaRange:
    """COMPARE AND WRITE: LBA in bytes 2-9, NUMBER OF LOGICAL BLOCKS in byte 13 (SBC-3 5.2)."""
    return int.from_bytes(cdb[2:10], "big"), cdb[13]


def be16(data: bytes | memoryview, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 2], "big")


def be32(data: bytes | memoryview, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "big")


def be64(data: bytes | memoryview, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 8], "big")
