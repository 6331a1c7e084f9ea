"""Which errnos mean that the storage is gone for the moment, and put a device into standby."""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterable

from ploopd.errors import HARMLESS_ERRNOS, UsageError

STANDBY_ERRNOS = frozenset({errno.EBUSY, errno.ENOTCONN, errno.EIO})
"""The errnos that put a device into standby (the standby contract of dm-ploop)."""

REMOTE_ERRNOS = frozenset(
    {
        errno.ESTALE,
        errno.EBADFD,
        errno.ETIMEDOUT,
        errno.ECONNABORTED,
        errno.ECONNRESET,
        errno.ESHUTDOWN,
        errno.EREMOTEIO,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
    }
)
"""What else the client of a network file system, or a FUSE process that dies, answers first."""


def standby_errnos(*, remote: bool, extra: Collection[int] = ()) -> frozenset[int]:
    """The set for a device; `remote`: some of its files have a server behind them."""
    return STANDBY_ERRNOS | (REMOTE_ERRNOS if remote else frozenset()) | frozenset(extra)


def checked_errnos(errnos: Collection[int]) -> frozenset[int]:
    """`errnos` as a set; raises `UsageError` if it contains one of HARMLESS_ERRNOS."""
    wrong = sorted(HARMLESS_ERRNOS.intersection(errnos))
    if wrong:
        raise UsageError(
            "this errno cannot put a device into standby",
            field="standby_errnos",
            value=names(wrong[:1])[0],
        )
    return frozenset(errnos)


def names(errnos: Iterable[int]) -> list[str]:
    """Their names, those of the contract first."""
    ordered = sorted(errnos, key=lambda number: (number not in STANDBY_ERRNOS, number))
    return [errno.errorcode.get(number, str(number)) for number in ordered]
