"""Whose delta a file is, as far as a DiskDescriptor.xml says so.

A delta file does not say what it lies over, nor what it is called.  What can be told is what the
descriptor beside it says, and that of the device.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

from image_format import Descriptor, FormatError, chain_to, parse_descriptor
from ploopd.errors import PloopError, UsageError
from ploopd.storage.chain_files import DESCRIPTOR_NAME, read_descriptor

_HINT = "name a copy of the delta that is to be replaced, in a directory of its own"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the delta that is replaced lies: GUIDs from the base up to it; empty for a device that
    has no descriptor."""

    guids: Sequence[str]
    is_top: bool


def require_same_place(path: str, inode: tuple[int, int], place: Place) -> None:
    """Raise UsageError if a descriptor beside the file `path` says that it is another delta.

    Blocking.  A descriptor that cannot be read says nothing.
    """
    beside = os.path.join(os.path.dirname(os.path.realpath(path)), DESCRIPTOR_NAME)
    try:
        descriptor = parse_descriptor(read_descriptor(beside), file=beside)
    except (PloopError, FormatError):
        return
    guid = _guid_of(inode, descriptor, os.path.dirname(beside))
    if guid is None:
        return
    try:
        found = [entry.guid for entry in chain_to(descriptor, guid, file=beside)]
    except FormatError:
        return
    if place.guids and found != list(place.guids):
        raise UsageError(
            f"is the delta of another snapshot, or of another chain, by {beside}",
            path=path,
            field="GUID",
            value=guid,
            hint=_HINT,
        )
    if not place.guids and len(found) > 1:
        raise UsageError(
            f"lies over other deltas by {beside}; the image of the device is a whole disk",
            path=path,
            field="GUID",
            value=guid,
            hint=_HINT,
        )
    above = [shot.guid for shot in descriptor.shots if shot.parent == guid]
    if place.is_top and above:
        raise UsageError(
            f"has another delta over it by {beside}: it must not be written to",
            path=path,
            field="GUID",
            value=above[0],
            hint=_HINT,
        )


def _guid_of(inode: tuple[int, int], descriptor: Descriptor, directory: str) -> str | None:
    """The image of the descriptor that is this file."""
    for storage in descriptor.storages:
        for image in storage.images:
            with contextlib.suppress(OSError):
                status = os.stat(os.path.join(directory, image.file))
                if (status.st_dev, status.st_ino) == inode:
                    return image.guid
    return None
