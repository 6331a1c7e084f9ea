"""Giving an image of a DiskDescriptor.xml another file name: see `descriptor_change`."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Final

from image_format import with_file
from ploopd.errors import DescriptorError, open_error
from ploopd.fileio.oslayer import REAL, OsLayer
from ploopd.storage.chain_files import ImageFile, rooted
from ploopd.storage.descriptor_change import DescriptorChange
from ploopd.storage.opener import open_image
from ploopd.storage.probe import ImageFormat
from ploopd.storage.stack import inode_number

_HINT: Final = "with --keep-name or --keep-descriptor it needs no change"


class DescriptorUpdate(DescriptorChange):
    """The change of one name; `name`: the new one, as it will be written."""

    def __init__(self, descriptor: str, guid: str, name: str, *, layer: OsLayer = REAL) -> None:
        edit = partial(with_file, guid=guid, name=name, file=os.path.realpath(descriptor))
        super().__init__(descriptor, edit, hint=_HINT, layer=layer)
        self.name = name


def descriptor_name(descriptor: str, image: str, image_root: Path | None) -> str:
    """The name by which a descriptor can refer to the file `image`.

    Raises DescriptorError if it cannot: the file lies outside of the descriptor's directory and of
    the image root, or only a symbolic link leads to it that must not be followed.
    """
    directory = Path(descriptor).absolute().parent
    for start, target in (
        (directory, Path(os.path.abspath(image))),
        (directory.resolve(), Path(image).parent.resolve() / os.path.basename(image)),
    ):
        name = os.path.relpath(target, start)
        if image_root is not None or ".." not in Path(name).parts:
            _require_same(descriptor, name, image, image_root)
            return name
    raise DescriptorError(
        f"lies outside of {directory}, so that the descriptor could not name it",
        path=image,
        hint="move it there, rename it with --keep-name, or serve it with --keep-descriptor",
    )


def _require_same(descriptor: str, name: str, image: str, image_root: Path | None) -> None:
    """Open what the descriptor will name, as it will be opened."""
    directory = Path(descriptor).absolute().parent
    root, path = rooted(name, directory, image_root)
    entry = ImageFile(path=path, root=root, format=ImageFormat.AUTO, guid=None)
    file = open_image(entry, descriptor, read_only=True, engine=None)
    try:
        found = inode_number(file)
    finally:
        file.close()
    try:
        wanted = os.stat(image)
    except OSError as error:
        raise open_error(error, image) from error
    if found != (wanted.st_dev, wanted.st_ino):
        raise DescriptorError(
            "is another file than the descriptor would name", path=image, field="File", value=name
        )
