"""Giving an image of a DiskDescriptor.xml another file name, so that a crash leaves the old or the
new document.

A temporary file beside it, fsync, rename, fsync of the directory: what libploop does, and the last
sync on top.  Blocking: to be called in a worker thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import Final

from image_format import FormatError, with_file
from ploopd.errors import (
    DeniedError,
    DescriptorError,
    PloopError,
    ReadOnlyError,
    StorageError,
    open_error,
)
from ploopd.fileio.oslayer import REAL, OsLayer
from ploopd.storage.chain_files import ImageFile, read_descriptor, rooted
from ploopd.storage.format_errors import convert
from ploopd.storage.opener import open_image
from ploopd.storage.probe import ImageFormat
from ploopd.storage.stack import inode_number

SUFFIX: Final = ".tmp"
"""What libploop adds to the descriptor's name while it writes a new one."""


class DescriptorUpdate:
    """The change of one name, from a document that must stay as it is until `commit`.

    `name`: the new one, as it will be written.  Use: `check`, or `prepare` and `commit`, with
    `discard` after a failure.
    """

    def __init__(self, descriptor: str, guid: str, name: str, *, layer: OsLayer = REAL) -> None:
        self.path = os.path.realpath(descriptor)
        self.name = name
        self._guid = guid
        self._layer = layer
        self._before: bytes | None = None
        self._prepared = False

    @property
    def _temporary(self) -> str:
        return self.path + SUFFIX

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
            raise _refused(error, self.path) from error
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
            raise _refused(error, self.path) from error
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
            sync_directory(os.path.dirname(self.path), self._layer)
        except OSError as error:
            raise _refused(error, self.path) from error

    def discard(self) -> None:
        """Take away what `prepare` has left."""
        if self._prepared:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
        self._before, self._prepared = None, False

    def _read(self) -> tuple[bytes, bytes]:
        before = read_descriptor(self.path)
        try:
            return before, with_file(before, self._guid, self.name, file=self.path)
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


def descriptor_name(descriptor: str, image: str, image_root: Path | None) -> str:
    """The name by which a descriptor can refer to the file `image`.

    Raises DescriptorError if it cannot: the file lies outside of the descriptor's directory and of
    the image root, or only a symbolic link leads to it that must not be followed.
    """
    directory = Path(descriptor).absolute().parent
    for start, target in (
        (directory, Path(os.path.abspath(image))),
        (directory.resolve(), Path(image).parent.resolve() / os.path.basename(image)),
    ):
        name = os.path.relpath(target, start)
        if image_root is not None or ".." not in Path(name).parts:
            _require_same(descriptor, name, image, image_root)
            return name
    raise DescriptorError(
        f"lies outside of {directory}, so that the descriptor could not name it",
        path=image,
        hint="move it there, rename it with --keep-name, or serve it with --keep-descriptor",
    )


def _require_same(descriptor: str, name: str, image: str, image_root: Path | None) -> None:
    """Open what the descriptor will name, as it will be opened."""
    directory = Path(descriptor).absolute().parent
    root, path = rooted(name, directory, image_root)
    entry = ImageFile(path=path, root=root, format=ImageFormat.AUTO, guid=None)
    file = open_image(entry, descriptor, read_only=True, engine=None)
    try:
        found = inode_number(file)
    finally:
        file.close()
    try:
        wanted = os.stat(image)
    except OSError as error:
        raise open_error(error, image) from error
    if found != (wanted.st_dev, wanted.st_ino):
        raise DescriptorError(
            "is another file than the descriptor would name", path=image, field="File", value=name
        )


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


def _refused(error: OSError, path: str) -> PloopError:
    """Why a descriptor could not be written anew."""
    hint = "with --keep-name or --keep-descriptor it needs no change"
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
