"""DiskDescriptor.xml: which image files make a disk, and in which order.

Schema: QEMU's docs/interop/prl-xml.rst and libploop.  Elements that are not known here are kept and
written back.  Paths are taken as text: resolving them safely is the business of whoever opens
files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from image_format.errors import DescriptorFormatError
from image_format.xml_tree import MAX_BYTES, XmlElement, parse, serialise

MAX_DESCRIPTOR_BYTES: Final = MAX_BYTES
MAX_CHAIN: Final = 128
TOP_GUID: Final = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
"""The name of the current image where the descriptor has no TopGUID."""
ZERO_GUID: Final = "{00000000-0000-0000-0000-000000000000}"
"""The parent of a base image."""

_GUID: Final = re.compile(r"\{[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\}")
_ROOT: Final = "Parallels_disk_image"


class ImageType(Enum):
    """How an image file is laid out."""

    COMPRESSED = "Compressed"
    """A ploop delta ("expanding" image)."""
    PLAIN = "Plain"
    """The raw disk; only as the base of a chain."""


class ShotFlag(Enum):
    """Marks of a snapshot that an interrupted operation of libploop leaves."""

    TEMPORARY = "Temporary"
    TEMPORARY_ZERO = "TemporaryZero"
    TEMPORARY_ZERO_SWAP = "TemporaryZeroSwap"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageEntry:
    """An image of a storage: `file` as written in the descriptor."""

    guid: str
    type: ImageType
    file: str
    extra: tuple[XmlElement, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """A part of the disk, from sector `start` to sector `end`; `block_size_sectors` is the
    cluster."""

    start_sectors: int
    end_sectors: int
    block_size_sectors: int
    preallocated: bool
    images: tuple[ImageEntry, ...]
    extra: tuple[XmlElement, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """A node of the tree of snapshots: image `guid` lies over image `parent`."""

    guid: str
    parent: str
    flags: frozenset[ShotFlag] = frozenset()
    extra: tuple[XmlElement, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """A DiskDescriptor.xml; the `…extra` fields hold what is not known, to be written back.

    `top_guid` is None where the descriptor leaves it out; use `top`.  `max_delta_size` is in bytes.
    """

    disk_size_sectors: int
    cylinders: int
    heads: int
    sectors: int
    padding: int = 0
    max_delta_size: int | None = None
    key_id: str | None = None
    storages: tuple[Storage, ...]
    top_guid: str | None
    shots: tuple[Shot, ...]
    attributes: tuple[tuple[str, str], ...] = (("Version", "1.0"),)
    extra: tuple[XmlElement, ...] = ()
    parameters_extra: tuple[XmlElement, ...] = ()
    encryption_extra: tuple[XmlElement, ...] = ()
    storage_data_extra: tuple[XmlElement, ...] = ()
    snapshots_extra: tuple[XmlElement, ...] = ()

    @property
    def top(self) -> str:
        """GUID of the current image."""
        return TOP_GUID if self.top_guid is None else self.top_guid

    def to_xml(self) -> bytes:
        """The document, with the root element's name that the specification gives."""
        storage_data = XmlElement(
            tag="StorageData",
            children=(*map(_storage_element, self.storages), *self.storage_data_extra),
        )
        top = () if self.top_guid is None else (_leaf("TopGUID", self.top_guid),)
        snapshots = XmlElement(
            tag="Snapshots",
            children=(*top, *map(_shot_element, self.shots), *self.snapshots_extra),
        )
        return serialise(
            XmlElement(
                tag=_ROOT,
                attributes=self.attributes,
                children=(_parameters_element(self), storage_data, snapshots, *self.extra),
            )
        )


def new_descriptor(
    *,
    size_sectors: int,
    cluster_sectors: int,
    geometry: tuple[int, int, int],
    images: Iterable[ImageEntry],
    preallocated: bool = False,
) -> Descriptor:
    """The descriptor of a disk whose `images`, base first, each lie over the one before.

    `geometry`: cylinders, heads, sectors per track.  The last image is the current one.
    """
    entries = tuple(images)
    parents = (ZERO_GUID, *(entry.guid for entry in entries))
    cylinders, heads, sectors = geometry
    return Descriptor(
        disk_size_sectors=size_sectors,
        cylinders=cylinders,
        heads=heads,
        sectors=sectors,
        storages=(
            Storage(
                start_sectors=0,
                end_sectors=size_sectors,
                block_size_sectors=cluster_sectors,
                preallocated=preallocated,
                images=entries,
            ),
        ),
        top_guid=entries[-1].guid,
        shots=tuple(
            Shot(guid=entry.guid, parent=parent)
            for entry, parent in zip(entries, parents, strict=False)
        ),
    )


def parse_descriptor(data: bytes, *, file: str = "<bytes>") -> Descriptor:
    """Read a descriptor.

    Raises DescriptorFormatError if the XML is refused (see `xml_tree.parse`), an element is
    missing, is there twice or holds something else than it must, or two images or two snapshots
    have one GUID.
    """
    return _Reader(file).descriptor(parse(data, file=file))


def chain(descriptor: Descriptor, *, file: str = "<bytes>") -> list[ImageEntry]:
    """The images from the base to the current one.

    Raises DescriptorFormatError for a disk that is split or borrows images of another descriptor,
    for images and snapshots that do not match one to one, a missing parent, a cycle, more than 128
    images and a raw image that is not the base.
    """
    return chain_to(descriptor, descriptor.top, file=file)


def chain_to(descriptor: Descriptor, guid: str, *, file: str = "<bytes>") -> list[ImageEntry]:
    """Like `chain`, for the snapshot `guid`."""
    images = {image.guid: image for image in _only_storage(descriptor, file).images}
    parents = {shot.guid: shot.parent for shot in descriptor.shots}
    if not parents and len(images) == 1:
        return list(images.values())
    _check_one_to_one(images.keys(), parents.keys(), file)
    found: list[ImageEntry] = []
    seen: set[str] = set()
    while guid != ZERO_GUID:
        if guid in seen:
            raise _error("the chain of snapshots is a cycle", file, "ParentGUID", guid)
        if guid not in images:
            name = "ParentGUID" if found else "TopGUID"
            raise _error("no image has this GUID", file, name, guid)
        if len(found) == MAX_CHAIN:
            raise _error(f"the chain has more than {MAX_CHAIN} images", file, "Shot", guid)
        seen.add(guid)
        found.append(images[guid])
        guid = parents[guid]
    found.reverse()
    for image in found[1:]:
        if image.type is ImageType.PLAIN:
            raise _error("a raw image can only be the base", file, "Type", image.type.value)
    return found


def _only_storage(descriptor: Descriptor, file: str) -> Storage:
    if any(element.tag == "Volume" for element in descriptor.storage_data_extra):
        raise _error(
            "the disk is a linked clone: images of other descriptors are not supported",
            file,
            "Volume",
        )
    if len(descriptor.storages) != 1:
        count = len(descriptor.storages)
        raise _error("the disk is split into several storages", file, "Storage", count)
    return descriptor.storages[0]


def _check_one_to_one(images: Iterable[str], shots: Iterable[str], file: str) -> None:
    orphans = sorted(set(images) - set(shots))
    if orphans:
        raise _error("an image is in no snapshot", file, "Image GUID", orphans[0])
    empty = sorted(set(shots) - set(images))
    if empty:
        raise _error("a snapshot has no image", file, "Shot GUID", empty[0])


def _error(message: str, file: str, field: str, value: object = None) -> DescriptorFormatError:
    return DescriptorFormatError(message, file=file, field=field, value=value)


class _Reader:
    """Reads elements into dataclasses; `file` is for its errors."""

    def __init__(self, file: str) -> None:
        self._file = file

    def descriptor(self, root: XmlElement) -> Descriptor:
        parameters = self._child(root, "Disk_Parameters")
        storage_data = self._child(root, "StorageData")
        snapshots = self._optional(root, "Snapshots") or XmlElement(tag="Snapshots")
        encryption = self._optional(parameters, "Encryption") or XmlElement(tag="Encryption")
        key = self._optional(encryption, "KeyId")
        top = self._optional(snapshots, "TopGUID")
        storages = tuple(map(self._storage, storage_data.find_all("Storage")))
        shots = tuple(map(self._shot, snapshots.find_all("Shot")))
        self._unique("Image", [image.guid for part in storages for image in part.images])
        self._unique("Shot", [shot.guid for shot in shots])
        return Descriptor(
            disk_size_sectors=self._positive(parameters, "Disk_size"),
            cylinders=self._number(parameters, "Cylinders", 0),
            heads=self._number(parameters, "Heads", 0),
            sectors=self._number(parameters, "Sectors", 0),
            padding=self._padding(parameters),
            max_delta_size=self._number(parameters, "Max_delta_size", 0) or None,
            key_id=None if key is None else key.text,
            storages=storages,
            top_guid=None if top is None else self._guid_text(top),
            shots=shots,
            attributes=root.attributes,
            extra=root.others("Disk_Parameters", "StorageData", "Snapshots"),
            parameters_extra=parameters.others(*_PARAMETERS),
            encryption_extra=encryption.others("KeyId"),
            storage_data_extra=storage_data.others("Storage"),
            snapshots_extra=snapshots.others("TopGUID", "Shot"),
        )

    def _storage(self, element: XmlElement) -> Storage:
        images = tuple(map(self._image, element.find_all("Image")))
        if not images:
            raise _error("a storage has no image", self._file, "Image")
        return Storage(
            start_sectors=self._number(element, "Start", 0),
            end_sectors=self._positive(element, "End"),
            block_size_sectors=self._positive(element, "Blocksize"),
            preallocated=self._number(element, "Preallocated", 0) != 0,
            images=images,
            extra=element.others("Start", "End", "Blocksize", "Preallocated", "Image"),
        )

    def _image(self, element: XmlElement) -> ImageEntry:
        kind = self._child(element, "Type").text
        try:
            image_type = ImageType(kind)
        except ValueError as error:
            raise _error("an image has an unknown type", self._file, "Type", kind) from error
        name = self._child(element, "File").text
        if not name:
            raise _error("an image has no file name", self._file, "File", name)
        return ImageEntry(
            guid=self._guid(element, "GUID"),
            type=image_type,
            file=name,
            extra=element.others("GUID", "Type", "File"),
        )

    def _shot(self, element: XmlElement) -> Shot:
        flags = frozenset(flag for flag in ShotFlag if element.find_all(flag.value))
        known = ("GUID", "ParentGUID", *(flag.value for flag in ShotFlag))
        return Shot(
            guid=self._guid(element, "GUID"),
            parent=self._guid(element, "ParentGUID"),
            flags=flags,
            extra=element.others(*known),
        )

    def _padding(self, parameters: XmlElement) -> int:
        padding = self._number(parameters, "Padding", 0)
        if padding:
            raise _error("padded disks are not supported", self._file, "Padding", padding)
        return padding

    def _optional(self, parent: XmlElement, tag: str) -> XmlElement | None:
        found = parent.find_all(tag)
        if len(found) > 1:
            raise _error(f"<{parent.tag}> has more than one", self._file, tag, len(found))
        return found[0] if found else None

    def _child(self, parent: XmlElement, tag: str) -> XmlElement:
        found = self._optional(parent, tag)
        if found is None:
            raise _error(f"<{parent.tag}> does not have the element <{tag}>", self._file, tag)
        return found

    def _number(self, parent: XmlElement, tag: str, default: int) -> int:
        element = self._optional(parent, tag)
        if element is None:
            return default
        text = element.text
        if not (text.isascii() and text.isdigit() and len(text) <= 19):
            raise _error("is not a number", self._file, tag, text)
        return int(text)

    def _positive(self, parent: XmlElement, tag: str) -> int:
        self._child(parent, tag)
        number = self._number(parent, tag, 0)
        if number == 0:
            raise _error("must not be zero", self._file, tag, number)
        return number

    def _guid(self, parent: XmlElement, tag: str) -> str:
        return self._guid_text(self._child(parent, tag))

    def _guid_text(self, element: XmlElement) -> str:
        guid = element.text.lower()
        if _GUID.fullmatch(guid) is None:
            raise _error("is not a GUID in braces", self._file, element.tag, element.text)
        return guid

    def _unique(self, what: str, guids: list[str]) -> None:
        seen: set[str] = set()
        for guid in guids:
            if guid in seen or guid == ZERO_GUID:
                raise _error("a GUID is used twice or zero", self._file, f"{what} GUID", guid)
            seen.add(guid)


_PARAMETERS: Final = (
    "Disk_size",
    "Max_delta_size",
    "Cylinders",
    "Heads",
    "Sectors",
    "Padding",
    "Encryption",
)


def _leaf(tag: str, value: object) -> XmlElement:
    return XmlElement(tag=tag, text=str(value))


def _parameters_element(descriptor: Descriptor) -> XmlElement:
    children = [_leaf("Disk_size", descriptor.disk_size_sectors)]
    if descriptor.max_delta_size is not None:
        children.append(_leaf("Max_delta_size", descriptor.max_delta_size))
    children += [
        _leaf("Cylinders", descriptor.cylinders),
        _leaf("Heads", descriptor.heads),
        _leaf("Sectors", descriptor.sectors),
        _leaf("Padding", descriptor.padding),
    ]
    encryption = list(descriptor.encryption_extra)
    if descriptor.key_id is not None:
        encryption.insert(0, _leaf("KeyId", descriptor.key_id))
    if encryption:
        children.append(XmlElement(tag="Encryption", children=tuple(encryption)))
    return XmlElement(tag="Disk_Parameters", children=(*children, *descriptor.parameters_extra))


def _storage_element(storage: Storage) -> XmlElement:
    return XmlElement(
        tag="Storage",
        children=(
            _leaf("Start", storage.start_sectors),
            _leaf("End", storage.end_sectors),
            _leaf("Blocksize", storage.block_size_sectors),
            _leaf("Preallocated", int(storage.preallocated)),
            *map(_image_element, storage.images),
            *storage.extra,
        ),
    )


def _image_element(image: ImageEntry) -> XmlElement:
    known = (
        _leaf("GUID", image.guid),
        _leaf("Type", image.type.value),
        _leaf("File", image.file),
    )
    return XmlElement(tag="Image", children=(*known, *image.extra))


def _shot_element(shot: Shot) -> XmlElement:
    marks = (XmlElement(tag=flag.value) for flag in ShotFlag if flag in shot.flags)
    return XmlElement(
        tag="Shot",
        children=(_leaf("GUID", shot.guid), _leaf("ParentGUID", shot.parent), *marks, *shot.extra),
    )
