"""One file of a chain, opened and verified: a delta with its header and BAT, or a raw base."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from image_format import CLOSED_V20, HEADER_SIZE, IN_USE, BatReport, FormatError, PvdHeader
from image_format import bat as bat_format
from image_format import extension as extension_format
from ploopd.errors import CorruptImageError, PloopError, StorageError, UnsupportedError
from ploopd.fileio.file import File
from ploopd.storage.device import Done
from ploopd.storage.format_errors import convert

_FLAG_EMPTY: Final = 1
_READ_CHUNK: Final = 8 << 20


class Delta:
    """A delta file whose header has been read and found consistent.

    `note`: what is to be told about it (an ignored extension), or None.
    """

    __slots__ = ("file", "header", "note")

    def __init__(self, file: File, header: PvdHeader) -> None:
        self.file = file
        self.header = header
        self.note: str | None = None

    @classmethod
    def read(cls, file: File, *, writable: bool) -> Delta:
        """Read and verify the header of `file`; `writable`: by the rules for writing.

        Raises ImageFormatError, or UnsupportedError where the format extension forbids writing.
        """
        try:
            size = file.size()
            header = PvdHeader.parse(file.pread(min(HEADER_SIZE, size), 0), file=file.path)
            header.check_geometry(size, file.path, writable)
        except FormatError as error:
            raise convert(error) from error
        delta = cls(file, header)
        delta._check_extension(size, writable)
        return delta

    def _check_extension(self, size: int, writable: bool) -> None:
        try:
            found = extension_format.load(self.file.pread, self.header, size, file=self.file.path)
        except FormatError as error:
            if writable:
                problem = convert(error)
                problem.hint = "serve it with --read-only, or drop the extension by a repair"
                raise problem from error
            self.note = f"the format extension is ignored: {error}"
            return
        section = None if found is None else found.unknown_necessary()
        if writable and section is not None:
            raise UnsupportedError(
                "has a format extension that forbids writing by software that does not know it",
                path=self.file.path,
                field="section magic",
                value=hex(section.magic),
                hint="serve it with --read-only",
            )
        if writable and found is not None and found.bitmaps:
            self.note = f"{len(found.bitmaps)} dirty bitmap(s) were invalidated by opening it"

    def load_bat(self) -> tuple[npt.NDArray[np.uint32], BatReport]:
        """The BAT as host cluster indexes, and how it agrees with the file.

        Raises ImageFormatError for a table that cannot be decoded; what to do about entries that
        make no sense is the caller's business (`require_sound`).
        """
        header = self.header
        raw = np.empty(header.bat_bytes, dtype=np.uint8)
        view = raw.data
        done = 0
        while done < len(view):
            got = self.file.pread_into(view[done : done + _READ_CHUNK], HEADER_SIZE + done)
            if got == 0:
                raise StorageError(
                    errno.EIO, "read", path=self.file.path, offset=HEADER_SIZE + done
                )
            done += got
        try:
            indexes = bat_format.decode(view, header, file=self.file.path)
        except FormatError as error:
            raise convert(error) from error
        del view, raw
        return indexes, bat_format.validate(indexes, header, self.file.size())

    def mark_in_use(self) -> None:
        """Set the in-use word, drop the format extension, and sync: to be done before any write.

        The dirty bitmaps in the extension are not kept up to date here, so they must not survive.
        """
        self._write_header(self.header.replace(in_use=IN_USE, ext_offset_sectors=0, flags=0))

    def mark_closed(self) -> None:
        """Clear the in-use word and sync; everything else must be on stable storage.

        If that fails the word is set again, as far as the storage lets us.
        """
        try:
            self._write_header(self.header.replace(in_use=CLOSED_V20))
        except StorageError:
            with contextlib.suppress(StorageError):
                self.file.pwrite(self.header.pack(), 0)
            raise

    def grow(self, header: PvdHeader) -> None:
        """`header` says of the same, marked file how large its disk is from now on; synced.

        Raises StorageError, and nobody knows then which of the two headers a crash leaves.
        """
        self._write_header(header)

    def _write_header(self, header: PvdHeader) -> None:
        self.file.pwrite(header.pack(), 0)
        self.file.fsync()
        self.header = header


def require_sound(
    delta: Delta,
    indexes: npt.NDArray[np.uint32],
    report: BatReport,
    problem: Callable[..., PloopError] = CorruptImageError,
) -> None:
    """Raise `problem` for the first wrong entry of the BAT, naming it."""
    kinds = (
        (report.in_header, "names a cluster inside the header"),
        (report.past_eof, "names a cluster beyond the end of the file"),
        (report.duplicate, "names a cluster that another entry has"),
    )
    for entries, sentence in kinds:
        if len(entries):
            cluster = int(entries[0])
            more = f" ({report.errors} wrong entries)" if report.errors > 1 else ""
            raise problem(
                f"the BAT entry {sentence}{more}",
                path=delta.file.path,
                field=f"BAT[{cluster}]",
                value=int(indexes[cluster]) * delta.header.entry_scale,
                hint=f"ploopctl image check --repair all {delta.file.path}",
            )


class PaddedTail:
    """A file whose end is followed by zeros: the last cluster of a raw base that is cut short."""

    __slots__ = ("_end", "_file")

    def __init__(self, file: File, size: int) -> None:
        self._file = file
        self._end = size

    def try_read(self, buffer: memoryview, offset: int) -> bool:
        """Like `File.try_read`."""
        inside = max(0, min(len(buffer), self._end - offset))
        if inside and not self._file.try_read(buffer[:inside], offset):
            return False
        buffer[inside:] = bytes(len(buffer) - inside)
        return True

    def read(self, buffer: memoryview, offset: int, done: Done) -> None:
        """Like `File.read`."""
        inside = max(0, min(len(buffer), self._end - offset))
        buffer[inside:] = bytes(len(buffer) - inside)
        if inside:
            self._file.read(buffer[:inside], offset, done)
        else:
            done(None)

    async def aread(self, buffer: memoryview, offset: int) -> None:
        """Like `File.aread`."""
        inside = max(0, min(len(buffer), self._end - offset))
        buffer[inside:] = bytes(len(buffer) - inside)
        if inside:
            await self._file.aread(buffer[:inside], offset)
