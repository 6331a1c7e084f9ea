"""Who a disk is, for initiators: one UUID for ever, whatever path or front end it is seen by.

It is kept beside the image as `<image>.uuid`, made when the image is first opened for writing.
Where that file is not (a read-only image, or a directory that cannot be written) it is derived
from the machine and the real path, which is stable as long as the image is not moved.  The one
that is kept is random: an image that was moved away and its successor at the same path must
differ.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from typing import Final

from ploopd.errors import ImageFormatError, open_error

_NAMESPACE: Final = uuid.UUID("6d0c1f0e-54a1-5b0b-9d5c-1c6a0f0d9a57")
_MAX_LENGTH: Final = 256


def sidecar_path(path: str) -> str:
    """Where the identity of the image at `path` is kept."""
    return os.path.realpath(path) + ".uuid"


def derived_identity(path: str) -> uuid.UUID:
    """The identity of an image that has none of its own."""
    return uuid.uuid5(_NAMESPACE, f"{_machine()}:{os.path.realpath(path)}")


def _machine() -> str:
    try:
        with open("/etc/machine-id", encoding="ascii", errors="replace") as file:
            return file.read(_MAX_LENGTH).strip()
    except OSError:
        return os.uname().nodename


def load_identity(path: str, *, create: bool) -> uuid.UUID:
    """The identity of the image at `path`; with `create` it is made if there is none.

    Raises ImageFormatError for a file that holds something else: going on with another identity
    would look like another disk to everybody who knows this one.
    """
    sidecar = sidecar_path(path)
    found = read_identity(path)
    if found is not None or not create:
        return found or derived_identity(path)
    return _create(sidecar, uuid.uuid4()) or derived_identity(path)


def keep_identity(path: str, identity: uuid.UUID) -> bool:
    """Make `identity` that of the image at `path`, which takes another image's place.

    False if the image has an identity of its own, which stays, or its directory cannot be written.
    """
    return _create(sidecar_path(path), identity) == identity


def read_identity(path: str) -> uuid.UUID | None:
    """The identity that is kept beside the image at `path`, None if there is none.

    Raises ImageFormatError for a file that holds something else, and what `open` raises.
    """
    return _read(sidecar_path(path))


def _read(sidecar: str) -> uuid.UUID | None:
    try:
        with open(sidecar, encoding="ascii", errors="replace") as file:
            text = file.read(_MAX_LENGTH).strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise open_error(error, sidecar) from error
    try:
        return uuid.UUID(text)
    except ValueError as error:
        raise ImageFormatError(
            "does not hold the image's UUID",
            path=sidecar,
            field="uuid",
            value=text[:40],
            hint="restore it, or remove it to give the disk a new identity",
        ) from error


def _create(sidecar: str, identity: uuid.UUID) -> uuid.UUID | None:
    """Make the file, whole or not at all, unless it is there; returns what is in it then.

    None if the directory does not let us.
    """
    temporary = f"{sidecar}.{identity.hex}.tmp"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except OSError:
        return None
    try:
        with open(fd, "w", encoding="ascii") as file:
            file.write(f"{identity}\n")
            file.flush()
            os.fsync(fd)
        os.link(temporary, sidecar)
    except FileExistsError:
        return _read(sidecar)
    except OSError:
        return None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    return identity
