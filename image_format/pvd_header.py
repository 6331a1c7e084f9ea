"""The PVD header: the first 64 bytes of a delta file.

Layout (all little-endian): magic, type, heads, cylinders, cluster size in sectors, BAT entries,
virtual size in sectors, in-use word, first block offset in sectors, flags, format extension offset
in sectors. Version 1 uses only the low 32 bits of the size and keeps the others zero, so one layout
reads both. See docs/formats/ploop.md and QEMU's docs/interop/parallels.rst.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import construct

from image_format.errors import FormatError
from image_format.versions import MAGICS, VERSIONS, EntryUnit, FormatVersion

SECTOR: Final = 512
HEADER_SIZE: Final = 64
HEADER_TYPE: Final = 2

IN_USE: Final = 0x746F6E59
CLOSED_V20: Final = 0
CLOSED_V21: Final = 0x312E3276

FLAG_EMPTY: Final = 1
FLAG_CONVERTING: Final = 2

MIN_CLUSTER: Final = 32 << 10
MAX_CLUSTER: Final = 64 << 20
DEFAULT_CLUSTER: Final = 1 << 20
MAX_READABLE_CLUSTER_SECTORS: Final = 0x7FFFFFFF // 513
MAX_BAT_ENTRIES: Final = 1 << 27
"""Largest table that is read: 512 MiB of BAT, 128 TiB of disk with clusters of 1 MiB."""

IN_USE_OFFSET: Final = 44
EXT_OFFSET_OFFSET: Final = 56

_LAYOUT = construct.Struct(
    "magic" / construct.Bytes(16),
    "type" / construct.Int32ul,
    "heads" / construct.Int32ul,
    "cylinders" / construct.Int32ul,
    "cluster_sectors" / construct.Int32ul,
    "bat_entries" / construct.Int32ul,
    "size_sectors" / construct.Int64ul,
    "in_use" / construct.Int32ul,
    "first_block_sectors" / construct.Int32ul,
    "flags" / construct.Int32ul,
    "ext_offset_sectors" / construct.Int64ul,
)

_OFFSETS: Final = {
    "magic": 0,
    "type": 16,
    "heads": 20,
    "cylinders": 24,
    "cluster_sectors": 28,
    "bat_entries": 32,
    "size_sectors": 36,
    "in_use": IN_USE_OFFSET,
    "first_block_sectors": 48,
    "flags": 52,
    "ext_offset_sectors": EXT_OFFSET_OFFSET,
}


class CloseState(Enum):
    """What the in-use word says about the last writer."""

    CLOSED = "closed"
    """Closed cleanly; a format extension, if any, is to be ignored."""
    CLOSED_WITH_EXTENSION = "closed with extension"
    """Closed cleanly by software that keeps format extensions: it is valid."""
    IN_USE = "in use"
    """Open for writing, or not closed cleanly."""
    UNKNOWN = "unknown"
    """A value the format does not know: to be treated as unclean."""


_CLOSE_STATES: Final = {
    CLOSED_V20: CloseState.CLOSED,
    CLOSED_V21: CloseState.CLOSED_WITH_EXTENSION,
    IN_USE: CloseState.IN_USE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PvdHeader:
    """The header of a delta, version 1 or 2; sizes named `…_sectors` are in units of 512 bytes."""

    version: int
    heads: int
    cylinders: int
    cluster_sectors: int
    bat_entries: int
    size_sectors: int
    in_use: int
    first_block_sectors: int
    flags: int
    ext_offset_sectors: int

    @property
    def format_version(self) -> FormatVersion:
        """The row of `versions.VERSIONS` for this header."""
        return VERSIONS[self.version]

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return self.cluster_sectors * SECTOR

    @property
    def size(self) -> int:
        """Bytes of the virtual disk."""
        return self.size_sectors * SECTOR

    @property
    def bat_bytes(self) -> int:
        """Bytes of the BAT, which begins at byte 64."""
        return 4 * self.bat_entries

    @property
    def entry_scale(self) -> int:
        """What a host cluster index is multiplied by to get a BAT entry."""
        sector_unit = self.format_version.entry_unit is EntryUnit.SECTOR
        return self.cluster_sectors if sector_unit else 1

    @property
    def data_offset(self) -> int:
        """Byte where the data area begins.

        An old version 1 image may say 0, which means the end of the BAT rounded up to a sector.
        """
        if self.first_block_sectors == 0:
            return -(-(HEADER_SIZE + self.bat_bytes) // SECTOR) * SECTOR
        return self.first_block_sectors * SECTOR

    @property
    def header_clusters(self) -> int:
        """Clusters at the start of the file that hold no data: no BAT entry may name them."""
        return -(-self.data_offset // self.cluster_size)

    @property
    def close_state(self) -> CloseState:
        """What the in-use word says."""
        return _CLOSE_STATES.get(self.in_use, CloseState.UNKNOWN)

    @property
    def unclean(self) -> bool:
        """True when the last writer has not closed the image (or writes to it now)."""
        return self.close_state in (CloseState.IN_USE, CloseState.UNKNOWN)

    @classmethod
    def parse(cls, data: bytes | bytearray | memoryview, *, file: str = "<bytes>") -> PvdHeader:
        """Read the first 64 bytes of `data`.

        Raises FormatError for fewer bytes, an unknown magic, a type other than 2 and a cluster size
        of zero.  Everything that depends on the file is for `check_geometry`.
        """
        if len(data) < HEADER_SIZE:
            raise FormatError(
                f"is too short to be a ploop image: a header has {HEADER_SIZE} bytes",
                file=file,
                offset=0,
                field="length",
                value=len(data),
            )
        raw: Any = _LAYOUT.parse(bytes(data[:HEADER_SIZE]))
        row = MAGICS.get(raw.magic)
        if row is None:
            raise FormatError(
                "is not a ploop image", file=file, offset=0, field="magic", value=raw.magic
            )
        if raw.type != HEADER_TYPE:
            raise _field_error(f"image type is not {HEADER_TYPE}", file, "type", raw.type)
        header = cls(
            version=row.number,
            heads=raw.heads,
            cylinders=raw.cylinders,
            cluster_sectors=raw.cluster_sectors,
            bat_entries=raw.bat_entries,
            size_sectors=raw.size_sectors,
            in_use=raw.in_use,
            first_block_sectors=raw.first_block_sectors,
            flags=raw.flags,
            ext_offset_sectors=raw.ext_offset_sectors,
        )
        if header.cluster_sectors == 0:
            raise header._error("cluster size is zero", file, "cluster_sectors")
        return header

    def pack(self) -> bytes:
        """The 64 bytes of this header; ValueError if a field does not fit."""
        fields = {name: getattr(self, name) for name in _OFFSETS if name not in ("magic", "type")}
        try:
            packed: bytes = _LAYOUT.build(
                {"magic": self.format_version.magic, "type": HEADER_TYPE, **fields}
            )
        except construct.ConstructError as error:
            raise ValueError(f"a header field does not fit: {error}") from error
        return packed

    def replace(self, **changes: int) -> PvdHeader:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def check_geometry(self, file_size: int, file: str = "<bytes>", writable: bool = False) -> None:
        """Raise FormatError unless the fields agree with each other and with `file_size` bytes.

        For writing the rules are those of the kernel drivers and of libploop; for reading those of
        QEMU, which takes any cluster size and old version 1 layouts.  A data area that begins later
        than it need (a disk that was shrunk) is legal.
        """
        self._check_cluster(file, writable)
        self._check_size(file, writable)
        self._check_table(file_size, file)
        self._check_first_block(file_size, file, writable)
        if self.flags & FLAG_CONVERTING:
            raise self._error(
                "a conversion between format versions was interrupted: its BAT cannot be trusted",
                file,
                "flags",
            )

    def _check_cluster(self, file: str, writable: bool) -> None:
        if self.cluster_sectors > MAX_READABLE_CLUSTER_SECTORS:
            raise self._error("cluster size is absurdly large", file, "cluster_sectors")
        if not writable:
            return
        if self.cluster_sectors & (self.cluster_sectors - 1):
            raise self._error(
                "cluster size is not a power of two: the image can only be read",
                file,
                "cluster_sectors",
            )
        if not MIN_CLUSTER <= self.cluster_size <= MAX_CLUSTER:
            raise self._error(
                "cluster size is not between 32 KiB and 64 MiB: the image can only be read",
                file,
                "cluster_sectors",
            )

    def _check_size(self, file: str, writable: bool) -> None:
        if self.size_sectors == 0:
            raise self._error("the disk has no size", file, "size_sectors")
        if self.size_sectors > self.format_version.max_size_sectors:
            raise self._error(
                f"the disk is larger than format version {self.version} allows",
                file,
                "size_sectors",
            )
        needed = -(-self.size_sectors // self.cluster_sectors)
        if self.bat_entries < needed or (writable and self.bat_entries > needed):
            raise self._error(
                f"a disk of {self.size_sectors} sectors needs {needed} BAT entries",
                file,
                "bat_entries",
            )

    def _check_table(self, file_size: int, file: str) -> None:
        if HEADER_SIZE + self.bat_bytes > file_size:
            raise self._error(
                f"the BAT is larger than the file of {file_size} bytes", file, "bat_entries"
            )
        if self.bat_entries > MAX_BAT_ENTRIES:
            raise self._error(
                f"the BAT has more than {MAX_BAT_ENTRIES} entries", file, "bat_entries"
            )

    def _check_first_block(self, file_size: int, file: str, writable: bool) -> None:
        name = "first_block_sectors"
        if self.data_offset < HEADER_SIZE + self.bat_bytes:
            raise self._error("the data area begins inside the BAT", file, name)
        old_layout = self.version == 1 and not writable
        if not old_layout:
            if self.first_block_sectors == 0 or self.first_block_sectors % self.cluster_sectors:
                raise self._error("the data area does not begin at a cluster", file, name)
            if self.data_offset > file_size:
                raise self._error(
                    f"the data area begins beyond the end of the file of {file_size} bytes",
                    file,
                    name,
                )

    def _error(self, message: str, file: str, field: str) -> FormatError:
        return _field_error(message, file, field, getattr(self, field))


def _field_error(message: str, file: str, field: str, value: object) -> FormatError:
    return FormatError(message, file=file, offset=_OFFSETS[field], field=field, value=value)


def needed_data_offset(bat_entries: int, cluster_size: int) -> int:
    """Bytes that header and BAT take, rounded up to clusters."""
    return -(-(HEADER_SIZE + 4 * bat_entries) // cluster_size) * cluster_size


def new_header(*, size: int, cluster_size: int = DEFAULT_CLUSTER, version: int = 2) -> PvdHeader:
    """The header of a new, empty delta of at least `size` bytes, rounded up to whole clusters.

    Raises FormatError for a version, cluster size or size that the format does not have.
    """
    row = VERSIONS.get(version)
    if row is None:
        raise FormatError("no such format version", field="version", value=version)
    if cluster_size & (cluster_size - 1) or not MIN_CLUSTER <= cluster_size <= MAX_CLUSTER:
        raise FormatError(
            "the cluster size must be a power of two between 32 KiB and 64 MiB",
            field="cluster_size",
            value=cluster_size,
        )
    if size <= 0:
        raise FormatError("the disk must have a size", field="size", value=size)
    entries = -(-size // cluster_size)
    cluster_sectors = cluster_size // SECTOR
    size_sectors = entries * cluster_sectors
    largest = min(row.max_size_sectors // cluster_sectors, MAX_BAT_ENTRIES)
    if entries > largest:
        raise FormatError(
            f"format version {version} with clusters of {cluster_size} bytes holds at most "
            f"{largest * cluster_size} bytes",
            field="size",
            value=size,
        )
    cylinders, heads, _ = chs_geometry(size_sectors)
    return PvdHeader(
        version=version,
        heads=heads,
        cylinders=cylinders,
        cluster_sectors=cluster_sectors,
        bat_entries=entries,
        size_sectors=size_sectors,
        in_use=CLOSED_V20,
        first_block_sectors=needed_data_offset(entries, cluster_size) // SECTOR,
        flags=0,
        ext_offset_sectors=0,
    )


def grown_header(header: PvdHeader, size: int) -> PvdHeader:
    """The header of the same delta when its disk has at least `size` bytes, rounded up to whole
    clusters; its data area begins later if the BAT needs the room.

    Raises FormatError like `new_header`.
    """
    wanted = new_header(size=size, cluster_size=header.cluster_size, version=header.version)
    return header.replace(
        heads=wanted.heads,
        cylinders=wanted.cylinders,
        bat_entries=wanted.bat_entries,
        size_sectors=wanted.size_sectors,
        first_block_sectors=max(header.first_block_sectors, wanted.first_block_sectors),
        flags=0,
    )


def chs_geometry(size_sectors: int) -> tuple[int, int, int]:
    """Cylinders, heads and sectors per track as libploop chooses them; nobody relies on them.

    Disks between 504 MiB and 8 GiB get the classic 16 × 63; others the first numbers that divide.
    """
    if 1_032_192 < size_sectors < 16_777_216:
        return size_sectors // (16 * 63), 16, 63
    for sectors in (63, 32, 16, 8):
        if size_sectors % sectors == 0:
            tracks = size_sectors // sectors
            heads = next((n for n in (16, 8, 4, 2) if tracks % n == 0), 1)
            return min(tracks // heads, 0xFFFFFFFF), heads, sectors
    return min(size_sectors, 0xFFFFFFFF), 1, 1
