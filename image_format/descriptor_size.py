"""Changing the size of the disk in a DiskDescriptor.xml and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from image_format.descriptor import Descriptor, parse_descriptor
from image_format.descriptor_bytes import elements, says
from image_format.errors import DescriptorFormatError

_PARAMETERS: Final = "Disk_Parameters"
_SIZE: Final = (_PARAMETERS, "Disk_size")
_CYLINDERS: Final = (_PARAMETERS, "Cylinders")
_HEADS: Final = (_PARAMETERS, "Heads")
_SECTORS: Final = (_PARAMETERS, "Sectors")
_END: Final = ("StorageData", "Storage", "End")


def with_size(
    data: bytes, size_sectors: int, geometry: tuple[int, int, int], *, file: str = "<bytes>"
) -> bytes:
    """The descriptor `data` of a disk of `size_sectors`; `geometry`: cylinders, heads, sectors.

    The numbers are exchanged in the document's own bytes.  Where that cannot be done (another
    encoding than UTF-8, elements that are missing) it is written anew: what it says stays, comments
    do not.  Raises DescriptorFormatError for a document that cannot be read or has several
    storages.
    """
    before = parse_descriptor(data, file=file)
    if len(before.storages) != 1:
        raise DescriptorFormatError(
            "the disk is split into several storages",
            file=file,
            field="Storage",
            value=len(before.storages),
        )
    wanted = _resized(before, size_sectors, geometry)
    if wanted == before:
        return data
    edited = _edit(data, size_sectors, geometry)
    return edited if edited is not None and says(edited, wanted) else wanted.to_xml()


def _resized(
    descriptor: Descriptor, size_sectors: int, geometry: tuple[int, int, int]
) -> Descriptor:
    cylinders, heads, sectors = geometry
    return replace(
        descriptor,
        disk_size_sectors=size_sectors,
        cylinders=cylinders,
        heads=heads,
        sectors=sectors,
        storages=(replace(descriptor.storages[0], end_sectors=size_sectors),),
    )


def _edit(data: bytes, size_sectors: int, geometry: tuple[int, int, int]) -> bytes | None:
    numbers = dict(
        zip(
            (_SIZE, _END, _CYLINDERS, _HEADS, _SECTORS),
            (size_sectors, size_sectors, *geometry),
            strict=True,
        )
    )
    for element in sorted(elements(data), key=lambda element: element.start, reverse=True):
        if element.place in numbers:
            content = element.content(data)
            if content is None:
                return None
            begin, stop = content
            data = data[:begin] + str(numbers[element.place]).encode() + data[stop:]
    return data
