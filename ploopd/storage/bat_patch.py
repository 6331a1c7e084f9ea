"""Changing entries of a BAT that nobody else uses, many at once."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from image_format import HEADER_SIZE
from image_format import bat as bat_format
from ploopd.fileio.file import File

_PAGE: Final = 4096


def write_entries(
    file: File,
    entries: npt.NDArray[np.uint32],
    clusters: npt.NDArray[np.int64],
    values: npt.NDArray[np.uint32],
) -> None:
    """Write `values` as the entries of `clusters`, a run of whole 4 KiB pages at a time; the header
    is left alone.

    `entries`: the table as it is in the file, in the units of the file.  No sync.
    """
    if not len(clusters):
        return
    changed = entries.copy()
    changed[clusters] = values
    raw = changed.astype("<u4", copy=False).view(np.uint8).data
    pages = np.unique((HEADER_SIZE + 4 * clusters) // _PAGE)
    for run in np.split(pages, np.flatnonzero(np.diff(pages) > 1) + 1):
        begin = max(int(run[0]) * _PAGE - HEADER_SIZE, 0)
        end = min((int(run[-1]) + 1) * _PAGE - HEADER_SIZE, len(raw))
        file.pwrite(raw[begin:end], bat_format.entry_offset(0) + begin)
