"""New images: an empty delta and, if wanted, the DiskDescriptor.xml beside it.

Everything is written under a temporary name, synced, and only then given its own name, which must
be free: nothing is ever overwritten, and a failure at any step leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from image_format import (
    DEFAULT_CLUSTER,
    SECTOR,
    TOP_GUID,
    FormatError,
    ImageEntry,
    ImageType,
    PvdHeader,
    chs_geometry,
    new_descriptor,
    new_header,
)
from ploopd.errors import PloopError, ReadOnlyError, StorageError, UsageError, open_error
from ploopd.fileio.oslayer import REAL, OsLayer

DESCRIPTOR_NAME: Final = "DiskDescriptor.xml"
DELTA_NAME: Final = "root.hds"
"""The delta of an image that is named by its directory, as libploop calls it."""

_MODE: Final = 0o600
_CHUNK: Final = 1 << 20
_NO_HARD_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


@dataclass(frozen=True, slots=True, kw_only=True)
class CreatedImage:
    """What `create_image` made: the files and the header, whose size may have been rounded up."""

    path: str
    descriptor: str | None
    header: PvdHeader


def create_image(
    path: str | os.PathLike[str],
    size: int,
    cluster_size: int = DEFAULT_CLUSTER,
    version: int = 2,
    descriptor: bool = False,
    *,
    layer: OsLayer = REAL,
) -> CreatedImage:
    """Make an empty image of `size` bytes, rounded up to whole clusters.

    `path` is the delta file, or a directory (an existing one, or a name that ends with a slash):
    then the delta is `root.hds` in it.  With `descriptor`, DiskDescriptor.xml is put beside the
    delta.

    Raises UsageError for sizes that the format does not have and for files that exist,
    NotFoundError, DeniedError, ReadOnlyError and StorageError for what the file system refuses.
    """
    try:
        header = new_header(size=size, cluster_size=cluster_size, version=version)
    except FormatError as error:
        raise UsageError(error.message, field=error.field, value=error.value) from error
    with contextlib.ExitStack() as undo:
        delta = _delta_path(os.fspath(path), descriptor, undo)
        beside = delta.with_name(DESCRIPTOR_NAME)
        for name in (delta, beside) if descriptor else (delta,):
            if os.path.lexists(name):
                raise _exists(name)
        with _new_file(delta, layer) as fd:
            _write_delta(fd, header, delta, layer)
        undo.callback(delta.unlink)
        if descriptor:
            with _new_file(beside, layer) as fd:
                _write_all(fd, _descriptor_xml(header, delta.name), 0, beside, layer)
            undo.callback(beside.unlink)
        _sync_directory(delta.parent, layer)
        undo.pop_all()
    return CreatedImage(
        path=str(delta), descriptor=str(beside) if descriptor else None, header=header
    )


def _delta_path(path: str, descriptor: bool, undo: contextlib.ExitStack) -> Path:
    """The delta's path; a directory that is named with a slash and does not exist is made."""
    if not path.endswith("/") and not os.path.isdir(path):
        name = Path(path)
        if descriptor and name.name == DESCRIPTOR_NAME:
            raise UsageError("give the name of the delta, not of the descriptor", path=path)
        return name
    directory = Path(path)
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        if not directory.is_dir():
            raise _exists(directory) from None
    except OSError as error:
        raise _create_error(error, directory) from error
    else:
        undo.callback(directory.rmdir)
    return directory / DELTA_NAME


@contextlib.contextmanager
def _new_file(path: Path, layer: OsLayer) -> Iterator[int]:
    """A descriptor to write `path` through; the name appears when the block ends without an
    error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
    except OSError as error:
        raise _create_error(error, path) from error
    try:
        try:
            yield fd
            layer.fsync(fd)
        finally:
            layer.close(fd)
        _publish(temporary, path)
    except OSError as error:
        raise _create_error(error, path) from error
    finally:
        # After _publish the temporary name is a second link, or gone.
        temporary.unlink(missing_ok=True)


def _publish(temporary: Path, path: Path) -> None:
    """Give the file its own name, which must be free; OSError(EEXIST) if it is not."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
    else:
        return
    # No hard links here: reserve the name with an empty file, and replace exactly that one.
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE))
    try:
        temporary.rename(path)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _write_delta(fd: int, header: PvdHeader, path: Path, layer: OsLayer) -> None:
    """Header and an all-zero BAT, whole clusters.

    The zeros are written, not left as a hole: libploop refuses sparse images, and a BAT that has
    its blocks can never run out of space.
    """
    zeros = bytes(min(_CHUNK, header.data_offset))
    for offset in range(0, header.data_offset, len(zeros)):
        _write_all(fd, zeros[: header.data_offset - offset], offset, path, layer)
    _write_all(fd, header.pack(), 0, path, layer)


def _write_all(fd: int, data: bytes, offset: int, path: Path, layer: OsLayer) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        count = layer.pwritev(fd, [view[done:]], offset + done)
        if count == 0:
            raise StorageError(errno.EIO, "write", path=path, message="short write")
        done += count


def _descriptor_xml(header: PvdHeader, name: str) -> bytes:
    sectors = header.size_sectors
    return new_descriptor(
        size_sectors=sectors,
        cluster_sectors=header.cluster_size // SECTOR,
        geometry=chs_geometry(sectors),
        images=[ImageEntry(guid=TOP_GUID, type=ImageType.COMPRESSED, file=name)],
    ).to_xml()


def _sync_directory(directory: Path, layer: OsLayer) -> None:
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            layer.fsync(fd)
        finally:
            layer.close(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a directory
            raise _create_error(error, directory) from error


def _create_error(error: OSError, path: Path) -> PloopError:
    if error.errno == errno.EEXIST:
        return _exists(path)
    if error.errno == errno.EROFS:
        return ReadOnlyError("is on a read-only file system", path=path)
    if error.errno in (errno.ENOENT, errno.EACCES, errno.EPERM):
        return open_error(error, path if error.errno != errno.ENOENT else path.parent)
    if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG):
        return UsageError(f"cannot be created: {os.strerror(error.errno)}", path=path)
    return StorageError.from_os(error, "create", path)


def _exists(path: Path) -> UsageError:
    return UsageError(
        "already exists", path=path, hint="choose another name: existing files are not overwritten"
    )
