"""How a new image is made the device's own for the next start, so that a crash at any moment leaves
the old or the new one.

It happens after the new image was verified, marked, brought up to date and synced, and before the
first request is executed on it: what a crash can lose is never more than what both images have.
All methods that do something are blocking, and raise PloopError.
"""

from __future__ import annotations

import errno
import os
import uuid
from typing import Protocol

from ploopd.errors import DeniedError, PloopError, ReadOnlyError, StorageError, UsageError
from ploopd.fileio.oslayer import OsLayer
from ploopd.storage.descriptor_change import sync_directory
from ploopd.storage.descriptor_update import DescriptorUpdate
from ploopd.storage.identity import keep_identity

Inode = tuple[int, int]


class Record(Protocol):
    """One way of doing it."""

    @property
    def intention(self) -> str:
        """What `commit` does, in the infinitive."""
        ...

    def check(self) -> None:
        """Raise what `prepare` and `commit` would, as far as that can be told; nothing changes."""
        ...

    def prepare(self) -> None:
        """Do what can be undone."""
        ...

    def commit(self) -> str:
        """Do it durably; returns what is to be told of it."""
        ...

    def discard(self) -> None:
        """Undo `prepare`."""
        ...


class NoRecord:
    """Nothing is recorded; `reason` says why."""

    def __init__(self, reason: str) -> None:
        self.intention = reason

    def check(self) -> None:
        """Nothing can go wrong."""

    prepare = discard = check

    def commit(self) -> str:
        """Tell why."""
        return self.intention


class NameInDescriptor:
    """The descriptor names the new file."""

    def __init__(self, update: DescriptorUpdate) -> None:
        self._update = update
        self.intention = f"{os.path.basename(update.path)} names {update.name}"

    def check(self) -> None:
        """See `Record.check`."""
        self._update.check()

    def prepare(self) -> None:
        """Write the new descriptor beside the old one."""
        self._update.prepare()

    def commit(self) -> str:
        """Put it in the old one's place."""
        self._update.commit()
        return self.intention

    def discard(self) -> None:
        """Remove it."""
        self._update.discard()


class TakeName:
    """The new file is renamed to the name of the old one, which is unlinked by that.

    What `ploop replace --keep-name` does.
    """

    def __init__(self, image: str, inode: Inode, name: str, layer: OsLayer) -> None:
        self._image, self._inode, self._name, self._layer = image, inode, name, layer
        self.intention = f"{image} is renamed to {name}"

    def check(self) -> None:
        """Raises UsageError for a symbolic link and for another file system."""
        self._require_same()
        directories = {os.path.dirname(self._image), os.path.dirname(self._name)}
        try:
            if os.stat(os.path.dirname(self._name)).st_dev != self._inode[0]:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            for directory in sorted(directories):
                if os.statvfs(directory).f_flag & os.ST_RDONLY:
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
                if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
                    raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise self._refused(error) from error

    prepare = check

    def commit(self) -> str:
        """Rename, and sync the directories."""
        self._require_same()
        try:
            os.rename(self._image, self._name)
            for directory in sorted({os.path.dirname(self._name), os.path.dirname(self._image)}):
                sync_directory(directory, self._layer)
        except OSError as error:
            raise self._refused(error) from error
        return self.intention

    def discard(self) -> None:
        """Nothing was prepared."""

    def _require_same(self) -> None:
        try:
            status = os.lstat(self._image)
        except OSError as error:
            raise self._refused(error) from error
        if (status.st_dev, status.st_ino) != self._inode:
            raise UsageError(
                "is a symbolic link, or was exchanged meanwhile: it cannot keep the old name",
                path=self._image,
                hint="name the file itself",
            )

    def _refused(self, error: OSError) -> PloopError:
        what = f"cannot be renamed to {self._name}: {error.strerror}"
        if error.errno == errno.EXDEV:
            return UsageError(
                f"cannot be renamed to {self._name} on another file system",
                path=self._image,
                hint="copy it there first, or replace without --keep-name",
            )
        if error.errno in (errno.EACCES, errno.EPERM):
            return DeniedError(what, path=self._image)
        if error.errno == errno.EROFS:
            return ReadOnlyError(what, path=self._image)
        return StorageError(error.errno or errno.EIO, "rename", path=self._image, message=what)


class KeepIdentity:
    """Nothing names the image of a device without descriptor but whoever started the daemon; the
    image is the same disk when it is served again, as far as its directory can be written."""

    def __init__(self, image: str, identity: uuid.UUID, *, moved: bool) -> None:
        self._image, self._identity = image, identity
        self.intention = f"{image} is to be named where the device is configured" if moved else ""

    def check(self) -> None:
        """Nothing can go wrong."""

    prepare = discard = check

    def commit(self) -> str:
        """Keep the identity beside the image."""
        if keep_identity(self._image, self._identity):
            return self.intention
        return f"{self.intention or self._image}; it keeps an identity of its own"
