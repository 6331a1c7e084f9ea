"""What kind of image a file is, told by its first bytes and its name.

A raw image has nothing that says so, and a delta whose magic is damaged must not be served as one:
the initiator would see the container.  So a file without a ploop magic counts as raw only if it is
not named like a delta, its other header fields are not those of one, and it is not another known
format.
"""

from __future__ import annotations

import re
import struct
from enum import Enum
from pathlib import PurePath
from typing import Final

from image_format import HEADER_SIZE, SECTOR, VERSIONS
from ploopd.errors import ImageFormatError

MAGICS: Final = tuple(version.magic for version in VERSIONS.values())
"""How ploop images begin."""

_FIELDS: Final = struct.Struct("<16sIIIIIQIIIQ")
_DELTA_NAME: Final = re.compile(r"\.(hds|hdd|ploop)(\.|$)", re.IGNORECASE)
_FOREIGN: Final = (
    (b"QFI\xfb", "qcow2"),
    (b"KDMV", "VMDK"),
    (b"COWD", "VMDK"),
    (b"# Disk DescriptorFile", "VMDK"),
    (b"vhdxfile", "VHDX"),
    (b"conectix", "VPC"),
    (b"QED\0", "QED"),
    (b"<<< ", "VDI"),
)


class ImageFormat(Enum):
    """How a file is to be read; AUTO finds out."""

    AUTO = "auto"
    PLOOP = "ploop"
    RAW = "raw"


def probe_format(start: bytes, path: str) -> ImageFormat:
    """PLOOP or RAW for the file at `path` that begins with `start` (its first 64 bytes, or all).

    Raises ImageFormatError if it looks like a damaged delta, or like another format.
    """
    if start.startswith(MAGICS):
        return ImageFormat.PLOOP
    for magic, name in _FOREIGN:
        if start.startswith(magic):
            raise ImageFormatError(
                f"is a {name} image, not a ploop or raw one",
                path=path,
                field="magic",
                value=magic,
                hint=f"qemu-img convert -O parallels {path} NEW.hds",
            )
    if _DELTA_NAME.search(PurePath(path).name) or _looks_like_header(start):
        raise ImageFormatError(
            "is named or built like a ploop image, but does not begin like one",
            path=path,
            field="magic",
            value=bytes(start[:16]),
            hint="rename it if it is a raw image",
        )
    return ImageFormat.RAW


def _looks_like_header(start: bytes) -> bool:
    """True if the fields after the magic fit together as those of a PVD header do."""
    if len(start) < HEADER_SIZE:
        return False
    fields = _FIELDS.unpack(start[:HEADER_SIZE])
    kind, cluster, entries, size, first_block = (fields[i] for i in (1, 4, 5, 6, 8))
    if kind != 2 or not cluster or not entries:
        return False
    needed = -(-(HEADER_SIZE + 4 * entries) // SECTOR)
    return bool(entries == -(-size // cluster) and first_block >= needed)
