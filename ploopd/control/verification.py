"""Whether a file is the disk that a device had: what automatic recovery asks before it replaces.

An operator who names a file knows what it is; a program must find out.  Three things can be told:

* geometry: format version, disk size and cluster size are the device's;
* identity: the UUID kept beside the file is the device's.  The path that is served now may have
  none, any other file must have it;
* generation: the in-use word.  The device set it, on stable storage, before its first write, so a
  file without it has been closed by somebody: it is from before the device was opened, or from
  after somebody else had it.  Raw files have no such word.
"""

from __future__ import annotations

import os

from ploopd.control.candidate import examine
from ploopd.control.plan import ReplaceOptions, choose, requirements
from ploopd.devices import Device
from ploopd.errors import (
    CorruptImageError,
    ImageFormatError,
    PloopError,
    UncleanImageError,
    UnsupportedError,
    UsageError,
)
from ploopd.storage.identity import read_identity, sidecar_path

Fingerprint = tuple[int, int, int, int]
"""Device, inode, size and time of change of a file."""


def fingerprint(path: str) -> Fingerprint | None:
    """What changes when another file is put there; None if there is none.  Blocking."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns


def served_path(device: Device) -> str:
    """The file that the device's top delta is, or was."""
    return next(layer.path for layer in device.volume.layers if layer.level == 0)


def accepts_in_use(device: Device) -> bool:
    """Whether the in-use word of a file may be set: it must be, where there is one."""
    return device.volume.format_version != 0


def verify(device: Device, path: str, *, closed_by_us: bool) -> None:
    """Raise the PloopError that says why the file at `path` cannot be the device's storage now.

    `closed_by_us`: its in-use word says nothing, because the device itself may have cleared it.
    `is_refusal` tells those that are about the file from those of a storage that does not work yet.
    Blocking; nothing is changed.
    """
    options = ReplaceOptions(force=accepts_in_use(device))
    target = choose(device, options)
    found = examine(
        path,
        requirements(device, target, options),
        thorough=False,
        layer=device.env.layer,
    )
    _require_identity(device, path)
    if device.volume.format_version == 0 or device.volume.read_only or closed_by_us:
        return
    if not found.in_use:
        raise UncleanImageError(
            "is not what the device had: somebody has closed it, before or since",
            path=path,
            field="in-use word",
            value=0,
            hint=f"if it is right: ploopctl device replace {device.name} --image {path}",
        )


def _require_identity(device: Device, path: str) -> None:
    found = read_identity(path)
    if found == device.identity:
        return
    if found is None and os.path.abspath(path) == os.path.abspath(served_path(device)):
        return
    if found is None:
        raise UsageError(
            "nothing says that it is this disk",
            path=path,
            hint=f"keep its UUID, {device.identity}, beside it in {sidecar_path(path)}",
        )
    raise UsageError(
        f"is another disk: the UUID of this one is {device.identity}",
        path=path,
        field="uuid",
        value=str(found),
    )


def is_refusal(error: PloopError) -> bool:
    """Whether `error` says that the file is the wrong one.

    All others may go away by themselves when the storage comes back: no such file, a chain that is
    not complete, no permission, a read-only file system, in use elsewhere, no answer.
    """
    return isinstance(
        error,
        (UsageError, ImageFormatError, CorruptImageError, UncleanImageError, UnsupportedError),
    )
