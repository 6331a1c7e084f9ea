"""The format extension: one cluster of sections that describe more than the header can.

Layout: u64 magic, MD5 of everything after it in the cluster, then sections, each u64 magic, u64
flags, u32 data size, u32 unused, data padded to 8 bytes; a section with magic 0 ends the list.

The extension counts only while the in-use word says "closed by software that keeps extensions".  A
writer that does not keep the sections up to date has to drop the extension before its first write.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import construct

from image_format import dirty_bitmap
from image_format.dirty_bitmap import DirtyBitmap
from image_format.errors import FormatError
from image_format.pvd_header import CloseState, PvdHeader

EXTENSION_MAGIC: Final = 0xAB234CEF23DCEA87
FLAG_NECESSARY: Final = 1
FLAG_TRANSIT: Final = 2

_PROLOGUE_SIZE: Final = 24
_SECTION_SIZE: Final = 24

_PROLOGUE = construct.Struct("magic" / construct.Int64ul, "md5" / construct.Bytes(16))
_SECTION = construct.Struct(
    "magic" / construct.Int64ul,
    "flags" / construct.Int64ul,
    "data_size" / construct.Int32ul,
    "unused" / construct.Int32ul,
)

ReadAt = Callable[[int, int], bytes]
"""(length, offset) → bytes of the file, fewer at its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One section; `data` without its padding."""

    magic: int
    flags: int
    data: bytes

    @property
    def necessary(self) -> bool:
        """Whoever does not understand it must not write to the image."""
        return bool(self.flags & FLAG_NECESSARY)

    @property
    def transit(self) -> bool:
        """Whoever does not understand it keeps it as it is."""
        return bool(self.flags & FLAG_TRANSIT)

    @property
    def known(self) -> bool:
        """True for the sections this package can read."""
        return self.magic == dirty_bitmap.SECTION_MAGIC


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatExtension:
    """The sections in their order, and the dirty bitmaps among them, decoded."""

    sections: tuple[Section, ...]
    bitmaps: tuple[DirtyBitmap, ...]

    @classmethod
    def parse(
        cls,
        data: bytes | bytearray | memoryview,
        header: PvdHeader,
        *,
        file: str = "<bytes>",
        offset: int = 0,
    ) -> FormatExtension:
        """Read the extension cluster `data`, found at byte `offset`.

        Raises FormatError for a wrong magic or MD5, a section beyond the cluster and a broken
        bitmap.
        """
        raw = bytes(data)
        if len(raw) != header.cluster_size:
            raise _error("the format extension is cut off", file, offset, "length", len(raw))
        prologue: Any = _PROLOGUE.parse(raw)
        if prologue.magic != EXTENSION_MAGIC:
            raise _error(
                "there is no format extension here", file, offset, "ext_magic", prologue.magic
            )
        digest = hashlib.md5(raw[_PROLOGUE_SIZE:], usedforsecurity=False).digest()
        if prologue.md5 != digest:
            raise _error(
                "the format extension's checksum is wrong", file, offset + 8, "md5", prologue.md5
            )
        sections = _parse_sections(raw, file, offset)
        bitmaps = tuple(
            DirtyBitmap.parse(section.data, header, file=file, offset=at)
            for section, at in sections
            if section.known
        )
        return cls(sections=tuple(section for section, _ in sections), bitmaps=bitmaps)

    def pack(self, cluster_size: int) -> bytes:
        """The extension cluster.  Raises FormatError if the sections do not fit into it."""
        body = bytearray()
        for section in self.sections:
            body += _SECTION.build(
                {
                    "magic": section.magic,
                    "flags": section.flags,
                    "data_size": len(section.data),
                    "unused": 0,
                }
            )
            body += section.data + bytes(-len(section.data) % 8)
        room = cluster_size - _PROLOGUE_SIZE
        if len(body) > room:
            raise FormatError(
                f"the sections do not fit into a cluster of {cluster_size} bytes",
                field="sections",
                value=len(body),
            )
        body += bytes(room - len(body))
        digest = hashlib.md5(body, usedforsecurity=False).digest()
        prologue: bytes = _PROLOGUE.build({"magic": EXTENSION_MAGIC, "md5": digest})
        return prologue + bytes(body)

    def unknown_necessary(self) -> Section | None:
        """The first section that forbids this package to write to the image."""
        return next((s for s in self.sections if s.necessary and not s.known), None)

    def surviving(self) -> FormatExtension:
        """What stays when the image is rewritten by software that keeps the known sections."""
        kept = tuple(s for s in self.sections if s.known or s.necessary or s.transit)
        return FormatExtension(sections=kept, bitmaps=self.bitmaps)

    def clusters(self, header: PvdHeader) -> tuple[int, ...]:
        """Host clusters that the extension and its bitmaps occupy; they have no BAT entry."""
        own = header.ext_offset_sectors // header.cluster_sectors
        stretches = (
            entry // header.cluster_sectors
            for bitmap in self.bitmaps
            for entry in bitmap.l1
            if entry not in (dirty_bitmap.ALL_CLEAN, dirty_bitmap.ALL_DIRTY)
        )
        return (own, *stretches)


def is_valid(header: PvdHeader) -> bool:
    """True if the header names an extension and its last writer kept it."""
    return bool(header.ext_offset_sectors) and (
        header.close_state is CloseState.CLOSED_WITH_EXTENSION
    )


def load(
    read_at: ReadAt, header: PvdHeader, file_size: int, *, file: str = "<bytes>"
) -> FormatExtension | None:
    """The extension that `header` names, or None if there is none or it has to be ignored.

    Raises FormatError if it is outside the data area or broken, or two parts of it share a cluster.
    """
    if not is_valid(header):
        return None
    check_cluster(header.ext_offset_sectors, header, file_size, file, "ext_offset_sectors")
    offset = header.ext_offset_sectors * 512
    data = read_at(header.cluster_size, offset)
    extension = FormatExtension.parse(data, header, file=file, offset=offset)
    for bitmap in extension.bitmaps:
        for k, entry in enumerate(bitmap.l1):
            if entry not in (dirty_bitmap.ALL_CLEAN, dirty_bitmap.ALL_DIRTY):
                check_cluster(entry, header, file_size, file, f"bitmap {bitmap.id} l1[{k}]")
    clusters = extension.clusters(header)
    if len(set(clusters)) != len(clusters):
        raise _error(
            "two parts of the format extension share a cluster", file, offset, "clusters", clusters
        )
    return extension


def check_cluster(sectors: int, header: PvdHeader, file_size: int, file: str, field: str) -> None:
    """Raise FormatError unless a cluster of the data area begins at sector `sectors`."""
    begin = sectors * 512
    whole = sectors % header.cluster_sectors == 0
    if not whole or not header.data_offset <= begin <= file_size - header.cluster_size:
        raise FormatError(
            "does not name a cluster of the data area", file=file, field=field, value=sectors
        )


def with_bitmaps(bitmaps: Sequence[DirtyBitmap]) -> FormatExtension:
    """An extension that holds these bitmaps."""
    sections = tuple(
        Section(magic=dirty_bitmap.SECTION_MAGIC, flags=0, data=bitmap.pack()) for bitmap in bitmaps
    )
    return FormatExtension(sections=sections, bitmaps=tuple(bitmaps))


def _parse_sections(raw: bytes, file: str, base: int) -> list[tuple[Section, int]]:
    """The sections with the byte offset in the file of each one's data."""
    found: list[tuple[Section, int]] = []
    at = _PROLOGUE_SIZE
    while at + 8 <= len(raw):
        if not any(raw[at : at + 8]):
            return found
        begin = at + _SECTION_SIZE
        if begin > len(raw):
            break
        head: Any = _SECTION.parse(raw[at:begin])
        end = begin + head.data_size
        if end > len(raw):
            raise _error(
                "a section is larger than the format extension",
                file,
                base + at + 16,
                "data_size",
                head.data_size,
            )
        section = Section(magic=head.magic, flags=head.flags, data=raw[begin:end])
        found.append((section, base + begin))
        at = end + -head.data_size % 8
    if at + 8 <= len(raw):
        raise _error("a section's head is cut off", file, base + at, "section", len(found))
    return found


def _error(message: str, file: str, offset: int, field: str, value: object) -> FormatError:
    return FormatError(message, file=file, offset=offset, field=field, value=value)
