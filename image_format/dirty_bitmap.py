"""The dirty-bitmap section of the format extension: which parts of the disk changed since a backup.

Layout of its data: u64 disk size in sectors, 16 bytes id, u32 granularity in sectors (a power of
two), u32 number of L1 entries, the entries as u64.  Entry *k* covers one cluster's worth of bits: 0
says all of them are clean, 1 all dirty, else it is the sector where a cluster with the bits lies
(lowest bit first).
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any, Final

import construct

from image_format.errors import FormatError
from image_format.pvd_header import PvdHeader

SECTION_MAGIC: Final = 0x20385FAE252CB34A
ALL_CLEAN: Final = 0
ALL_DIRTY: Final = 1
DEFAULT_GRANULARITY: Final = 128

_FIXED_SIZE: Final = 32
_LAYOUT = construct.Struct(
    "size_sectors" / construct.Int64ul,
    "id" / construct.Bytes(16),
    "granularity_sectors" / construct.Int32ul,
    "l1_size" / construct.Int32ul,
    "l1" / construct.Array(construct.this.l1_size, construct.Int64ul),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DirtyBitmap:
    """One bitmap: its id, the disk size it was made for, granularity and L1 table."""

    id: uuid.UUID
    size_sectors: int
    granularity_sectors: int
    l1: tuple[int, ...]

    @classmethod
    def parse(
        cls, data: bytes, header: PvdHeader, *, file: str = "<bytes>", offset: int = 0
    ) -> DirtyBitmap:
        """Read a section's data, found at byte `offset`.

        Raises FormatError if it is cut off, its granularity is not a power of two, its L1 table
        does not have the size that the disk and the cluster demand, or it was made for another disk
        size.
        """
        if len(data) < _FIXED_SIZE:
            raise FormatError(
                "the dirty bitmap is cut off",
                file=file,
                offset=offset,
                field="data_size",
                value=len(data),
            )
        fixed = _FIXED_SIZE
        l1_size = int.from_bytes(data[28:fixed], "little")
        if len(data) != fixed + 8 * l1_size:
            raise FormatError(
                f"the dirty bitmap has {len(data)} bytes, which its L1 table does not fill",
                file=file,
                offset=offset + 28,
                field="l1_size",
                value=l1_size,
            )
        raw: Any = _LAYOUT.parse(data)
        bitmap = cls(
            id=uuid.UUID(bytes=raw.id),
            size_sectors=raw.size_sectors,
            granularity_sectors=raw.granularity_sectors,
            l1=tuple(raw.l1),
        )
        bitmap._check(header, file, offset)
        return bitmap

    def _check(self, header: PvdHeader, file: str, offset: int) -> None:
        granularity = self.granularity_sectors
        if granularity == 0 or granularity & (granularity - 1):
            raise FormatError(
                "the dirty bitmap's granularity is not a power of two",
                file=file,
                offset=offset + 24,
                field="granularity_sectors",
                value=granularity,
            )
        if self.size_sectors != header.size_sectors:
            raise FormatError(
                f"the dirty bitmap is for another size; the disk has {header.size_sectors} sectors",
                file=file,
                offset=offset,
                field="size_sectors",
                value=self.size_sectors,
            )
        expected = l1_entries(self.size_sectors, granularity, header.cluster_size)
        if len(self.l1) != expected:
            raise FormatError(
                f"the dirty bitmap needs an L1 table of {expected} entries",
                file=file,
                offset=offset + 28,
                field="l1_size",
                value=len(self.l1),
            )

    def pack(self) -> bytes:
        """The section's data."""
        packed: bytes = _LAYOUT.build(
            {
                "size_sectors": self.size_sectors,
                "id": self.id.bytes,
                "granularity_sectors": self.granularity_sectors,
                "l1_size": len(self.l1),
                "l1": self.l1,
            }
        )
        return packed


def l1_entries(size_sectors: int, granularity_sectors: int, cluster_size: int) -> int:
    """Entries of the L1 table: one for each cluster full of bits."""
    bits = -(-size_sectors // granularity_sectors)
    octets = -(-bits // 8)
    return -(-octets // cluster_size)


def new_bitmap(
    header: PvdHeader, bitmap_id: uuid.UUID, *, granularity_sectors: int = DEFAULT_GRANULARITY
) -> DirtyBitmap:
    """A bitmap that says that everything is clean."""
    entries = l1_entries(header.size_sectors, granularity_sectors, header.cluster_size)
    return DirtyBitmap(
        id=bitmap_id,
        size_sectors=header.size_sectors,
        granularity_sectors=granularity_sectors,
        l1=(ALL_CLEAN,) * entries,
    )
