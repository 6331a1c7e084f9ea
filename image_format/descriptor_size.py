"""Changing the size of the disk in a DiskDescriptor.xml and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Final
from xml.parsers import expat

from image_format.descriptor import Descriptor, parse_descriptor
from image_format.errors import DescriptorFormatError

_UTF8: Final = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
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
    return edited if edited is not None and _says(edited, wanted) else wanted.to_xml()


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
    finder = _Finder()
    finder.parser.Parse(data, True)
    if not finder.utf8:
        return None
    for start, stop, place in sorted(finder.found, reverse=True):
        if place in numbers:
            begin = data.find(b">", start) + 1
            if not 0 < begin <= stop:
                return None
            data = data[:begin] + str(numbers[place]).encode() + data[stop:]
    return data


def _says(data: bytes, wanted: Descriptor) -> bool:
    try:
        return parse_descriptor(data) == wanted
    except DescriptorFormatError:
        return False


class _Finder:
    """Where the elements of a well-formed document are: from the `<` of the start tag to that of
    the end tag, with the names from the root's children down."""

    def __init__(self) -> None:
        self._path: list[tuple[str, int]] = []
        self.utf8 = True
        self.found: list[tuple[int, int, tuple[str, ...]]] = []
        self.parser = expat.ParserCreate()
        self.parser.XmlDeclHandler = self._declaration
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end

    def _declaration(self, _version: str, encoding: str | None, _standalone: int) -> None:
        self.utf8 = encoding is None or encoding.lower() in _UTF8

    def _start(self, tag: str, _attributes: dict[str, str]) -> None:
        self._path.append((tag, self.parser.CurrentByteIndex))

    def _end(self, _tag: str) -> None:
        place = tuple(tag for tag, _ in self._path[1:])
        _, start = self._path.pop()
        self.found.append((start, self.parser.CurrentByteIndex, place))
