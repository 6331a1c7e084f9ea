"""Which errnos may put a device into standby."""

from __future__ import annotations

import errno
from collections.abc import Collection

from ploopd.errors import HARMLESS_ERRNOS, UsageError


def checked_errnos(errnos: Collection[int]) -> frozenset[int]:
    """The errnos as a set.  Raises `UsageError` for one that says nothing of the storage."""
    wrong = sorted(HARMLESS_ERRNOS.intersection(errnos))
    if wrong:
        raise UsageError(
            "this errno cannot put a device into standby",
            field="standby_errnos",
            value=errno.errorcode.get(wrong[0], wrong[0]),
        )
    return frozenset(errnos)
