"""Where the parts of a ploop image are in its file, by a few lines of our own."""

from __future__ import annotations

import os

from tests.support.faultfs.script import Range

_HEADER = 64
_V1 = b"WithoutFreeSpace"
_MAGICS = (_V1, b"WithouFreSpacExt")


def extent_of(wanted: Range, descriptor: int) -> tuple[int, int | None] | None:
    """[start, stop) of a range in an open file; None if it has no such region now.

    Read anew each time: the BAT grows and changes.
    """
    if wanted.region is None:
        return wanted.start, wanted.stop
    header = os.pread(descriptor, _HEADER, 0)
    if len(header) < _HEADER or header[:16] not in _MAGICS:
        return None
    cluster_size = int.from_bytes(header[28:32], "little") * 512
    entries = int.from_bytes(header[32:36], "little")
    end_of_bat = _HEADER + 4 * entries
    match wanted.region:
        case "header":
            return 0, _HEADER
        case "bat":
            return _HEADER, end_of_bat
        case "data":
            return -(-end_of_bat // cluster_size) * cluster_size, None
    number = wanted.cluster or 0
    raw = os.pread(descriptor, 4, _HEADER + 4 * number)
    entry = int.from_bytes(raw, "little")
    if number >= entries or not entry:
        return None
    start = entry * (512 if header[:16] == _V1 else cluster_size)
    return start, start + cluster_size
