"""Changing a DiskDescriptor.xml, so that a crash leaves the old or the new document.

A temporary file beside it, fsync, rename, fsync of the directory: what libploop does, and the last
sync on top.  Blocking: to be called in a worker thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from typing import Final

from image_format import FormatError, chs_geometry, with_size
from ploopd.errors import (
    DeniedError,
    DescriptorError,
    PloopError,
    ReadOnlyError,
    StorageError,
    open_error,
)
from ploopd.fileio.oslayer import REAL, OsLayer
from ploopd.storage.chain_files import read_descriptor
from ploopd.storage.format_errors import convert

SUFFIX: Final = ".tmp"
"""What libploop adds to the descriptor's name while it writes a new one."""
GROWTH_SUFFIX: Final = ".resize"
"""For one with another size, which must stay until it has its name: see `interrupted_growth`."""


Edit = Callable[[bytes], bytes]
"""The new document from the old one.  Raises FormatError."""


class DescriptorChange:
    """The change that `edit` makes, of a document that must stay as it is until `commit`.

    `hint`: what to do when the file system refuses it.  `suffix`: of the temporary name.  Use:
    `check`, or `prepare` and `commit`, with `discard` after a failure.
    """

    def __init__(
        self,
        descriptor: str,
        edit: Edit,
        *,
        hint: str | None = None,
        suffix: str = SUFFIX,
        layer: OsLayer = REAL,
    ) -> None:
        self.path = os.path.realpath(descriptor)
        self._edit = edit
        self._hint = hint
        self._suffix = suffix
        self._layer = layer
        self._before: bytes | None = None
        self._prepared = False

    @property
    def _temporary(self) -> str:
        return self.path + self._suffix

    def check(self) -> bool:
        """Whether anything is to be written; nothing is.  Raises like `prepare`, as far as that can
        be told."""
        before, after = self._read()
        if after == before:
            return False
        directory = os.path.dirname(self.path)
        try:
            if os.statvfs(directory).f_flag & os.ST_RDONLY:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise _refused(error, self.path, self._hint) from error
        return True

    def prepare(self) -> bool:
        """Write the new document beside the old one, synced; False if there is nothing to change.

        Raises DescriptorError for a document that cannot be used, DeniedError, ReadOnlyError or
        StorageError when the new one cannot be written.
        """
        before, after = self._read()
        if after == before:
            self._before = before
            return False
        try:
            self._write(after)
        except OSError as error:
            self.discard()
            raise _refused(error, self.path, self._hint) from error
        self._before, self._prepared = before, True
        return True

    def commit(self) -> None:
        """Put the new document in the old one's place, durably.

        Raises DescriptorError if somebody has changed it since `prepare`, StorageError.  When the
        last sync fails the new document is in place, but may not be after a crash.
        """
        if self._before is None:
            self.prepare()
        try:
            if self._prepared:
                if read_descriptor(self.path) != self._before:
                    raise DescriptorError(
                        "was changed by somebody else meanwhile", path=self.path, hint="try again"
                    )
                os.rename(self._temporary, self.path)
                self._prepared = False
        except OSError as error:
            raise _refused(error, self.path, self._hint) from error
        self.sync()

    def sync(self) -> None:
        """Make the names durable, that of what `prepare` has written among them."""
        try:
            sync_directory(os.path.dirname(self.path), self._layer)
        except OSError as error:
            raise _refused(error, self.path, self._hint) from error

    def discard(self) -> None:
        """Take away what `prepare` has left."""
        if self._prepared:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
        self._before, self._prepared = None, False

    def _read(self) -> tuple[bytes, bytes]:
        before = read_descriptor(self.path)
        try:
            return before, self._edit(before)
        except FormatError as error:
            raise convert(error) from error

    def _write(self, data: bytes) -> None:
        status = os.stat(self.path)
        with contextlib.suppress(FileNotFoundError):  # a crash has left it
            os.unlink(self._temporary)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        os.close(os.open(self._temporary, flags, 0o600))
        self._prepared = True
        fd = self._layer.open(self._temporary, os.O_WRONLY | os.O_CLOEXEC, None)
        try:
            created = os.fstat(fd)
            if (created.st_uid, created.st_gid) != (status.st_uid, status.st_gid):
                os.fchown(fd, status.st_uid, status.st_gid)
            os.fchmod(fd, stat.S_IMODE(status.st_mode))
            written = 0
            while written < len(data):
                written += self._layer.pwritev(fd, [memoryview(data)[written:]], written)
            self._layer.fsync(fd)
        finally:
            self._layer.close(fd)


def finish_growth(descriptor: str, layer: OsLayer = REAL) -> None:
    """Put the document in its place that says what `interrupted_growth` has found.

    Raises like `DescriptorChange.commit`.
    """
    path = os.path.realpath(descriptor)
    try:
        os.rename(path + GROWTH_SUFFIX, path)
        sync_directory(os.path.dirname(path), layer)
    except OSError as error:
        raise _refused(error, path, None) from error


def interrupted_growth(descriptor: str, size_sectors: int) -> bool:
    """Whether an image was grown to `size_sectors` and all that is missing is that the new document
    gets its name: it lies beside the old one, and says the same but for the size.

    Raises what reading the descriptor raises.
    """
    path = os.path.realpath(descriptor)
    try:
        new = read_descriptor(path + GROWTH_SUFFIX)
    except PloopError:
        return False
    try:
        return new == with_size(
            read_descriptor(path), size_sectors, chs_geometry(size_sectors), file=path
        )
    except FormatError as error:
        raise convert(error) from error


def forget_growth(descriptor: str) -> None:
    """Take away what a crash has left of growing an image that has kept its size."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.realpath(descriptor) + GROWTH_SUFFIX)


def sync_directory(directory: str, layer: OsLayer = REAL) -> None:
    """Make the names in a directory durable; some file systems cannot, which is no error."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        layer.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)


def _refused(error: OSError, path: str, hint: str | None) -> PloopError:
    """Why a descriptor could not be written anew."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return DeniedError(
            f"its new version cannot be written beside it: {error.strerror}", path=path, hint=hint
        )
    if error.errno == errno.EROFS:
        return ReadOnlyError("is on a read-only file system", path=path, hint=hint)
    if error.errno == errno.ENOENT:
        return open_error(error, path)
    problem = StorageError.from_os(error, "update", path)
    problem.hint = hint
    return problem
