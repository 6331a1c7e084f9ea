"""Changing one file name in a DiskDescriptor.xml and nothing else.

The name is exchanged in the document's own bytes, so that comments, unknown elements, the name of
the root element and the layout stay as whoever wrote them has left them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final
from xml.parsers import expat
from xml.sax.saxutils import escape

from image_format.descriptor import Descriptor, parse_descriptor
from image_format.errors import DescriptorFormatError

_UTF8: Final = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
_FILE: Final = ("StorageData", "Storage", "Image", "File")
_GUID: Final = ("StorageData", "Storage", "Image", "GUID")


def with_file(data: bytes, guid: str, name: str, *, file: str = "<bytes>") -> bytes:
    """The descriptor `data` with `name` as the file of image `guid`.

    `guid` in braces and lower case, as `parse_descriptor` returns it.  A document in another
    encoding than UTF-8, or one whose name cannot be exchanged in place, is written anew: what it
    says stays, comments do not.  Raises DescriptorFormatError for a document that cannot be read or
    has no such image.
    """
    before = parse_descriptor(data, file=file)
    wanted = _renamed(before, guid, name)
    if wanted is None:
        raise DescriptorFormatError("no image has this GUID", file=file, field="GUID", value=guid)
    if wanted == before:
        return data
    span = _find_name(data, guid)
    if span is not None:
        edited = data[: span[0]] + escape(name).encode() + data[span[1] :]
        if _says(edited, wanted):
            return edited
    return wanted.to_xml()


def _renamed(descriptor: Descriptor, guid: str, name: str) -> Descriptor | None:
    """`descriptor` with another file name; None if it has no image `guid`."""
    found = False
    storages = []
    for storage in descriptor.storages:
        images = []
        for image in storage.images:
            if image.guid == guid:
                found = True
                images.append(replace(image, file=name))
            else:
                images.append(image)
        storages.append(replace(storage, images=tuple(images)))
    return replace(descriptor, storages=tuple(storages)) if found else None


def _says(data: bytes, wanted: Descriptor) -> bool:
    try:
        return parse_descriptor(data) == wanted
    except DescriptorFormatError:
        return False


def _find_name(data: bytes, guid: str) -> tuple[int, int] | None:
    """Where in `data` the text of the <File> of image `guid` is, if it is plain text in UTF-8."""
    finder = _Finder(guid)
    finder.parser.Parse(data, True)
    if finder.span is None or not finder.utf8:
        return None
    start = data.find(b">", finder.span[0]) + 1
    return (start, finder.span[1]) if 0 < start <= finder.span[1] else None


class _Finder:
    """Receives expat's events of a document that is known to be well formed."""

    def __init__(self, guid: str) -> None:
        self._guid = guid
        self._path: list[str] = []
        self._text: list[str] = []
        self._image_guid = ""
        self._file: tuple[int, int] | None = None
        self.utf8 = True
        self.span: tuple[int, int] | None = None
        """From the `<` of `<File>` to that of `</File>`."""
        self.parser = expat.ParserCreate()
        self.parser.XmlDeclHandler = self._declaration
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._characters

    def _declaration(self, _version: str, encoding: str | None, _standalone: int) -> None:
        self.utf8 = encoding is None or encoding.lower() in _UTF8

    def _start(self, tag: str, _attributes: dict[str, str]) -> None:
        self._path.append(tag)
        self._text.clear()
        if tag == "Image":
            self._image_guid, self._file = "", None
        if tuple(self._path[1:]) == _FILE:
            self._file = (self.parser.CurrentByteIndex, 0)

    def _characters(self, text: str) -> None:
        self._text.append(text)

    def _end(self, tag: str) -> None:
        place = tuple(self._path[1:])
        if place == _FILE and self._file is not None:
            self._file = (self._file[0], self.parser.CurrentByteIndex)
        elif place == _GUID:
            self._image_guid = "".join(self._text).strip().lower()
        elif tag == "Image" and self._image_guid == self._guid:
            self.span = self._file
        self._path.pop()
