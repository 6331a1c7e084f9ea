"""Changing one file name in a DiskDescriptor.xml and nothing else.

The name is exchanged in the document's own bytes, so that comments, unknown elements, the name of
the root element and the layout stay as whoever wrote them has left them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final
from xml.sax.saxutils import escape

from image_format.descriptor import Descriptor, parse_descriptor
from image_format.descriptor_bytes import Element, elements, says
from image_format.errors import DescriptorFormatError

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
        if says(edited, wanted):
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


def _find_name(data: bytes, guid: str) -> tuple[int, int] | None:
    """Where in `data` the text of the <File> of image `guid` is, if it is plain text in UTF-8."""
    file: Element | None = None
    image_guid = ""
    found: Element | None = None
    for element in elements(data):
        if element.place == _FILE:
            file = element
        elif element.place == _GUID:
            image_guid = element.text.strip().lower()
        elif element.place[-1:] == ("Image",):
            if image_guid == guid:
                found = file
            file, image_guid = None, ""
    return None if found is None else found.content(data)
