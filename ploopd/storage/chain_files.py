"""Which files make a disk: a delta, a raw file, or what a DiskDescriptor.xml lists."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from image_format import (
    MAX_DESCRIPTOR_BYTES,
    SECTOR,
    Descriptor,
    FormatError,
    ImageType,
    ShotFlag,
    chain,
    parse_descriptor,
)
from ploopd.errors import DescriptorError, NotFoundError, UnsupportedError, open_error
from ploopd.storage.format_errors import convert
from ploopd.storage.probe import ImageFormat

DESCRIPTOR_NAME: Final = "DiskDescriptor.xml"

_INTERRUPTED: Final = frozenset({ShotFlag.TEMPORARY_ZERO, ShotFlag.TEMPORARY_ZERO_SWAP})


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFile:
    """A file to be opened.  `root`: the directory it must lie beneath, None for a file the operator
    named; `path` is relative to it then."""

    path: str
    root: Path | None
    format: ImageFormat
    guid: str | None

    @property
    def full_path(self) -> str:
        """For people."""
        return self.path if self.root is None else str(self.root / self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFiles:
    """The files of a disk, base first; `size` and `cluster_size` in bytes as the descriptor has
    them, None without one.  `path` is what carries the disk's identity; `key` names the key of an
    encrypted disk, whose LUKS ciphertext is served as it is."""

    path: str
    images: tuple[ImageFile, ...]
    size: int | None
    cluster_size: int | None
    key: str | None = None

    def substituted(self, substitutes: Mapping[str, str]) -> DiskFiles:
        """With other files, GUID → path, in the place of those that the descriptor names."""
        images = []
        for image in self.images:
            other = None if image.guid is None else substitutes.get(image.guid)
            images.append(image if other is None else replace(image, path=other, root=None))
        return replace(self, images=tuple(images))

    @property
    def descriptor(self) -> str | None:
        """The descriptor's path."""
        return None if self.size is None else self.path


def locate(path: str, image_root: Path | None, image_format: ImageFormat) -> DiskFiles:
    """The files of the disk at `path`.

    Raises NotFoundError, DescriptorError and what `errors.open_error` says.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise open_error(error, path) from error
    if stat.S_ISDIR(status.st_mode):
        inside = os.path.join(path, DESCRIPTOR_NAME)
        if not os.path.lexists(inside):
            raise NotFoundError(
                f"the directory holds no {DESCRIPTOR_NAME}",
                path=path,
                hint="name a delta, a raw file or a DiskDescriptor.xml",
            )
        return _from_descriptor(inside, image_root)
    if path.lower().endswith(".xml"):
        return _from_descriptor(path, image_root)
    single = ImageFile(path=path, root=None, format=image_format, guid=None)
    return DiskFiles(path=path, images=(single,), size=None, cluster_size=None)


def descriptor_path(path: str) -> str:
    """The descriptor of a disk that was opened by `path`: the file itself, or in that directory."""
    return os.path.join(path, DESCRIPTOR_NAME) if os.path.isdir(path) else path


def _from_descriptor(path: str, image_root: Path | None) -> DiskFiles:
    data = read_descriptor(path)
    try:
        descriptor = parse_descriptor(data, file=path)
        entries = chain(descriptor, file=path)
    except FormatError as error:
        raise convert(error) from error
    _require_finished(descriptor, {entry.guid for entry in entries}, path)
    storage = descriptor.storages[0]
    directory = Path(path).absolute().parent
    images = []
    for entry in entries:
        root, name = rooted(entry.file, directory, image_root)
        kind = ImageFormat.RAW if entry.type is ImageType.PLAIN else ImageFormat.PLOOP
        images.append(ImageFile(path=name, root=root, format=kind, guid=entry.guid))
    return DiskFiles(
        path=path,
        images=tuple(images),
        size=descriptor.disk_size_sectors * SECTOR,
        cluster_size=storage.block_size_sectors * SECTOR,
        key=_key_of(descriptor),
    )


def _key_of(descriptor: Descriptor) -> str | None:
    """The name of the disk's key; a key of zeros is how none is written."""
    key = descriptor.key_id
    return key if key is not None and key.strip("{}-0 \t\r\n") else None


def rooted(name: str, directory: Path, image_root: Path | None) -> tuple[Path, str]:
    """The directory that file `name` of a descriptor must lie beneath, and its path from there.

    `directory`: the descriptor's own, absolute.  That is the root, or the configured one that the
    directory is beneath: then names may lead out of the one as long as they stay in the other.
    """
    if image_root is None:
        return directory, name
    root = image_root.absolute()
    joined = Path(os.path.normpath(directory / name))
    if not joined.is_relative_to(root):
        raise DescriptorError(
            f"an image lies outside of the image root {root}",
            path=str(directory / DESCRIPTOR_NAME),
            field="File",
            value=name,
        )
    return root, str(joined.relative_to(root))


def read_descriptor(path: str) -> bytes:
    """The descriptor's bytes, at most one more than is allowed, so that the parser refuses them.

    Raises UnsupportedError for anything but a regular file, and what `errors.open_error` says.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise open_error(error, path) from error
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UnsupportedError("is not a regular file", path=path)
        try:
            return file.read(MAX_DESCRIPTOR_BYTES + 1)
        except OSError as error:
            if error.errno == errno.EISDIR:
                raise UnsupportedError("is not a regular file", path=path) from error
            raise open_error(error, path) from error


def _require_finished(descriptor: Descriptor, guids: set[str], path: str) -> None:
    for shot in descriptor.shots:
        if shot.guid not in guids:
            continue
        flags = shot.flags & _INTERRUPTED
        if shot.guid == descriptor.top:
            flags |= shot.flags & {ShotFlag.TEMPORARY}
        if flags:
            raise DescriptorError(
                "an operation of libploop on this snapshot was interrupted",
                path=path,
                field=min(flag.value for flag in flags),
                value=shot.guid,
                hint="finish it with ploop snapshot-merge",
            )
