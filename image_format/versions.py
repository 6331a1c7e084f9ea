"""What differs between the versions of the ploop format: one row per version."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType


class EntryUnit(Enum):
    """What a BAT entry counts in."""

    SECTOR = "sector"
    CLUSTER = "cluster"


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatVersion:
    """One version: its 16 magic bytes, the unit of its BAT entries and its largest disk."""

    number: int
    magic: bytes
    entry_unit: EntryUnit
    max_size_sectors: int


V1 = FormatVersion(
    number=1,
    magic=b"WithoutFreeSpace",
    entry_unit=EntryUnit.SECTOR,
    max_size_sectors=(1 << 32) - 1,
)
V2 = FormatVersion(
    number=2,
    magic=b"WithouFreSpacExt",
    entry_unit=EntryUnit.CLUSTER,
    max_size_sectors=(1 << 63) // 512,
)

VERSIONS = MappingProxyType({row.number: row for row in (V1, V2)})
"""Version number → row."""

MAGICS = MappingProxyType({row.magic: row for row in (V1, V2)})
"""Magic bytes → row."""
