"""Every error ploopd reports, by what the caller must do about it.

The class says whose fault it is; `exit_code` says how a command line ends; the fields name the
file, the field and the value, so that one line is enough for whoever reads it.  Errors are
converted once, at the edge of a layer, with `raise … from`.
"""

from __future__ import annotations

import errno as _errno
import os
from enum import IntEnum

NO_ROOM = frozenset({_errno.ENOSPC, _errno.EDQUOT, _errno.EFBIG})
"""What a storage answers that works and has no room: on its disk, in a quota, or because a file of
version 1, or of its file system, cannot be larger."""

HARMLESS_ERRNOS = NO_ROOM | {_errno.EROFS, _errno.ECANCELED, _errno.EOPNOTSUPP}
"""Errors that say nothing about the storage's health: they never latch a device, and they can never
be standby errnos."""


class ExitCode(IntEnum):
    """Exit codes of `ploopd` and `ploopctl` (`ploopctl image check` uses qemu-img's instead)."""

    OK = 0
    ERROR = 1
    USAGE = 2
    NOT_RUNNING = 3
    NOT_FOUND = 4
    DENIED = 5
    BUSY = 6
    TIMEOUT = 7
    STANDBY = 8
    READ_ONLY = 9
    NO_SPACE = 10
    FORMAT = 11
    CORRUPT = 12
    DESCRIPTOR = 13
    UNCLEAN = 14
    ADDRESS_IN_USE = 15
    UNSUPPORTED = 16
    CONFIG = 17


class PloopError(Exception):
    """Base of all errors that are reported to a person.

    `message` is one sentence.  `path`, `field`, `value` say where it is; `hint` says what to do
    next, as a command to type where there is one.
    """

    exit_code: ExitCode = ExitCode.ERROR

    def __init__(
        self,
        message: str,
        *,
        path: str | os.PathLike[str] | None = None,
        field: str | None = None,
        value: object = None,
        hint: str | None = None,
        exit_code: ExitCode | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = None if path is None else os.fspath(path)
        self.field = field
        self.value = value
        self.hint = hint
        if exit_code is not None:
            self.exit_code = exit_code

    def __str__(self) -> str:
        text = self.message if self.path is None else f"{self.path}: {self.message}"
        if self.field is not None:
            text += f" ({self.field} = {self.value!r})"
        if self.hint is not None:
            text += f"; {self.hint}"
        return text


class UsageError(PloopError):
    """The caller asked for something that makes no sense."""

    exit_code = ExitCode.USAGE


class NotFoundError(PloopError):
    """The named file, device or object does not exist."""

    exit_code = ExitCode.NOT_FOUND


class DeniedError(PloopError):
    """The operating system or an access rule does not allow it."""

    exit_code = ExitCode.DENIED


class LockedError(PloopError):
    """The image is open elsewhere: QEMU, libploop or another ploopd."""

    exit_code = ExitCode.BUSY


class BusyError(PloopError):
    """The object is in a state that does not allow this now; trying later may work."""

    exit_code = ExitCode.BUSY


class ImageFormatError(PloopError):
    """The bytes of an image's header are not those of a ploop image that can be served."""

    exit_code = ExitCode.FORMAT


class CorruptImageError(PloopError):
    """The image's metadata contradict each other; serving it would damage it further."""

    exit_code = ExitCode.CORRUPT


class UncleanImageError(PloopError):
    """The image was not closed cleanly and its check found errors."""

    exit_code = ExitCode.UNCLEAN


class DescriptorError(PloopError):
    """DiskDescriptor.xml cannot be used: broken, contradictory or unsafe."""

    exit_code = ExitCode.DESCRIPTOR


class UnsupportedError(PloopError):
    """Legal, but not something this program does."""

    exit_code = ExitCode.UNSUPPORTED


class ReadOnlyError(PloopError):
    """A write was asked of something read-only."""

    exit_code = ExitCode.READ_ONLY


class StorageError(PloopError):
    """An operation on a backing file failed; `errno` is what the operating system answered.

    This is the only exception that block devices (`storage.device.BlockDevice`) raise or hand to a
    completion.  The gate decides by `errno` whether the device goes into standby.
    """

    def __init__(
        self,
        errno: int,
        op: str,
        *,
        path: str | os.PathLike[str] | None = None,
        offset: int | None = None,
        message: str | None = None,
    ) -> None:
        name = _errno.errorcode.get(errno, str(errno))
        text = message or f"{op} failed: {os.strerror(errno)} [{name}]"
        super().__init__(text, path=path, field=None if offset is None else "offset", value=offset)
        self.errno = errno
        self.op = op
        self.offset = offset
        if errno in NO_ROOM:
            self.exit_code = ExitCode.NO_SPACE

    @classmethod
    def from_os(
        cls, error: OSError, op: str, path: str | os.PathLike[str], offset: int | None = None
    ) -> StorageError:
        """The storage error for an `OSError`; the caller raises it `from` that error."""
        return cls(error.errno or _errno.EIO, op, path=path, offset=offset)

    def again(self) -> StorageError:
        """The same error as a new object, for an error that is kept and raised more than once."""
        return StorageError(
            self.errno, self.op, path=self.path, offset=self.offset, message=self.message
        )


class ParkTimeoutError(StorageError):
    """A parked request waited longer than `park_max` and was never executed: answer BUSY."""

    def __init__(self, op: str, *, path: str | None = None) -> None:
        super().__init__(_errno.EBUSY, op, path=path, message=f"{op} was parked for too long")


_HIDDEN_BY = {
    "ProtectHome=no": ("/home/", "/root/", "/run/user/"),
    "PrivateTmp=no": ("/tmp/", "/var/tmp/"),  # noqa: S108 - not used, only told
}


def _unit_hint(path: str | os.PathLike[str]) -> str | None:
    """In a service: which setting of a confined unit would hide a file that is there."""
    if "NOTIFY_SOCKET" not in os.environ:
        return None
    for setting, directories in _HIDDEN_BY.items():
        if os.path.abspath(path).startswith(directories):
            return f"if it is there, the unit hides it: systemctl edit, and write {setting}"
    return None


def open_error(error: OSError, path: str | os.PathLike[str]) -> PloopError:
    """The error to raise `from` an `OSError` that opening `path` gave."""
    number = error.errno or _errno.EIO
    if number == _errno.ENOENT:
        return NotFoundError("no such file or directory", path=path, hint=_unit_hint(path))
    if number in (_errno.EACCES, _errno.EPERM):
        return DeniedError("permission denied", path=path, hint="check its owner and mode")
    if number == _errno.EROFS:
        return ReadOnlyError(
            "is on a read-only file system", path=path, hint="serve it with --read-only"
        )
    return StorageError.from_os(error, "open", path)
