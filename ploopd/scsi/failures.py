"""Storage errors as sense data: the one table.

Source: SPC-4 annex D, SBC-3 4.7.3.6 (out of space on a thin provisioned unit).
"""

from __future__ import annotations

import errno
from enum import Enum

from ploopd.errors import NO_ROOM, StorageError
from ploopd.scsi.sense import Asc, Sense, SenseKey


class Access(Enum):
    """What the failed operation was for."""

    READ = Sense(SenseKey.MEDIUM_ERROR, Asc.UNRECOVERED_READ_ERROR)
    WRITE = Sense(SenseKey.MEDIUM_ERROR, Asc.WRITE_ERROR)


PROTECTED = {
    **dict.fromkeys(NO_ROOM, Asc.SPACE_ALLOCATION_FAILED_WRITE_PROTECT),
    errno.EROFS: Asc.WRITE_PROTECTED,
}
"""Errors that mean: nothing is broken, but nothing can be written."""

INTERNAL = frozenset({errno.ENOMEM, errno.EBADF, errno.EINVAL, errno.EFAULT})
"""Errors that say nothing about the medium."""


def storage_sense(error: StorageError, access: Access, lba: int | None) -> Sense:
    """The sense for a failed operation that began at `lba` (None: not known)."""
    protected = PROTECTED.get(error.errno)
    if protected is not None and access is Access.WRITE:
        return Sense(SenseKey.DATA_PROTECT, protected)
    if error.errno in INTERNAL:
        return Sense(SenseKey.HARDWARE_ERROR, Asc.INTERNAL_TARGET_FAILURE)
    sense = access.value
    return Sense(sense.key, sense.asc, information=lba)
