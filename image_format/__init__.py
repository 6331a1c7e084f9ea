"""The ploop disk image format: bytes in, frozen values out, and back.

PVD header, BAT, format extension with dirty bitmaps, and DiskDescriptor.xml.  This package opens no
files and knows nothing of the daemon; `FormatError` is the only error it raises for bad input.
"""

from image_format import bat, dirty_bitmap, extension
from image_format.bat import BatReport
from image_format.descriptor import (
    MAX_CHAIN,
    MAX_DESCRIPTOR_BYTES,
    TOP_GUID,
    ZERO_GUID,
    Descriptor,
    ImageEntry,
    ImageType,
    Shot,
    ShotFlag,
    Storage,
    chain,
    chain_to,
    new_descriptor,
    parse_descriptor,
)
from image_format.descriptor_edit import with_file
from image_format.descriptor_size import with_size
from image_format.dirty_bitmap import DirtyBitmap
from image_format.errors import DescriptorFormatError, FormatError
from image_format.extension import FormatExtension, Section
from image_format.pvd_header import (
    CLOSED_V20,
    CLOSED_V21,
    DEFAULT_CLUSTER,
    EXT_OFFSET_OFFSET,
    HEADER_SIZE,
    IN_USE,
    IN_USE_OFFSET,
    MAX_CLUSTER,
    MIN_CLUSTER,
    SECTOR,
    CloseState,
    PvdHeader,
    chs_geometry,
    grown_header,
    new_header,
)
from image_format.versions import VERSIONS, EntryUnit, FormatVersion

__all__ = [
    "CLOSED_V20",
    "CLOSED_V21",
    "DEFAULT_CLUSTER",
    "EXT_OFFSET_OFFSET",
    "HEADER_SIZE",
    "IN_USE",
    "IN_USE_OFFSET",
    "MAX_CHAIN",
    "MAX_CLUSTER",
    "MAX_DESCRIPTOR_BYTES",
    "MIN_CLUSTER",
    "SECTOR",
    "TOP_GUID",
    "VERSIONS",
    "ZERO_GUID",
    "BatReport",
    "CloseState",
    "Descriptor",
    "DescriptorFormatError",
    "DirtyBitmap",
    "EntryUnit",
    "FormatError",
    "FormatExtension",
    "FormatVersion",
    "ImageEntry",
    "ImageType",
    "PvdHeader",
    "Section",
    "Shot",
    "ShotFlag",
    "Storage",
    "bat",
    "chain",
    "chain_to",
    "chs_geometry",
    "dirty_bitmap",
    "extension",
    "grown_header",
    "new_descriptor",
    "new_header",
    "parse_descriptor",
    "with_file",
    "with_size",
]
