"""Opening image files: regular files only, and descriptor-relative names only beneath their root.

A file is looked at through O_PATH before it is opened, because opening a device or a FIFO already
does something to it.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path, PurePosixPath

from ploopd.errors import DescriptorError, PloopError, UnsupportedError, open_error
from ploopd.fileio import libc

_KINDS = (
    (stat.S_ISDIR, "directory"),
    (stat.S_ISBLK, "block device"),
    (stat.S_ISCHR, "character device"),
    (stat.S_ISFIFO, "FIFO"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISLNK, "symbolic link"),
)
_RESOLVE = libc.RESOLVE_BENEATH | libc.RESOLVE_NO_MAGICLINKS
_MAX_SYMLINKS = 40


def open_regular(path: str, flags: int, dir_fd: int | None = None) -> int:
    """A descriptor of the regular file `path`; beneath `dir_fd` when there is one.

    Raises `OSError` as open(2) does, `UnsupportedError` for anything but a regular file, and
    `DescriptorError` for a name that leads out of `dir_fd`.
    """
    if dir_fd is not None:
        return open_beneath(dir_fd, path, flags)
    probe = os.open(path, os.O_PATH)
    try:
        seen = os.fstat(probe)
    finally:
        os.close(probe)
    _require_regular(seen, path, UnsupportedError)
    return _checked(os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY), seen, path)


def open_beneath(root_fd: int, name: str, flags: int, *, root: Path | None = None) -> int:
    """A descriptor of the regular file that a descriptor calls `name`, beneath `root_fd`.

    Symbolic links are followed while they stay beneath the root.  An absolute name is accepted only
    when `root`, the path of `root_fd`, contains it.  Raises `DescriptorError` for every name that
    must not be opened, `NotFoundError` and its like (`errors.open_error`) for what open(2) refuses.
    """
    relative = relative_name(name, root)
    probe = _resolve(root_fd, relative, os.O_PATH, name)
    try:
        seen = os.fstat(probe)
    finally:
        os.close(probe)
    _require_regular(seen, name, DescriptorError)
    fd = _resolve(root_fd, relative, flags | os.O_NONBLOCK | os.O_NOCTTY, name)
    return _checked(fd, seen, name)


def relative_name(name: str, root: Path | None = None) -> str:
    """`name` as a path relative to the root; `DescriptorError` if it cannot be one."""
    if not name or "\0" in name:
        raise DescriptorError(
            "names no image file", field="File", value=name, hint="give each image a file name"
        )
    path = PurePosixPath(name)
    if path.is_absolute():
        if root is None or not path.is_relative_to(root):
            raise DescriptorError(
                "absolute file names are not opened",
                field="File",
                value=name,
                hint="use a name relative to the descriptor, or serve with an image root above it",
            )
        path = path.relative_to(root)
    if ".." in path.parts:
        raise DescriptorError(
            "file names with '..' are not opened",
            field="File",
            value=name,
            hint="keep all deltas beneath the descriptor's directory",
        )
    return str(path)


def _resolve(root_fd: int, relative: str, flags: int, name: str) -> int:
    try:
        try:
            return libc.openat2(root_fd, relative, flags, _RESOLVE)
        except OSError as error:
            # EPERM: container run-times that answer unknown system calls so.
            if error.errno not in (errno.ENOSYS, errno.EPERM):
                raise
        return _walk(root_fd, relative, flags)
    except OSError as error:
        raise _refusal(error, name) from error


def _refusal(error: OSError, name: str) -> PloopError:
    if error.errno in (errno.EXDEV, errno.ELOOP):
        return DescriptorError(
            "leads out of its directory through a symbolic link",
            field="File",
            value=name,
            hint="keep all deltas beneath the descriptor's directory",
        )
    if error.errno == errno.EISDIR:
        return DescriptorError("is not a regular file", path=name, field="type", value="directory")
    if error.errno == errno.ENOTDIR:
        return DescriptorError("a part of it is not a directory", field="File", value=name)
    return open_error(error, name)


def _walk(root_fd: int, relative: str, flags: int) -> int:
    """openat2(RESOLVE_BENEATH) for kernels without it: one name at a time, O_NOFOLLOW.

    Links are read and walked by hand.  Directories are held open, so a rename cannot lead out.
    """
    stack = [os.dup(root_fd)]
    todo = list(reversed(PurePosixPath(relative).parts))
    links = 0
    try:
        while todo:
            name = todo.pop()
            if name == "..":
                if len(stack) == 1:
                    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
                os.close(stack.pop())
                continue
            target = _link_target(stack[-1], name)
            if target is not None:
                links += 1
                if links > _MAX_SYMLINKS or target.startswith("/"):
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                todo.extend(reversed(PurePosixPath(target).parts))
            elif todo:
                stack.append(os.open(name, os.O_PATH | os.O_DIRECTORY, dir_fd=stack[-1]))
            else:
                return os.open(name, flags | os.O_NOFOLLOW, dir_fd=stack[-1])
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    finally:
        for fd in stack:
            os.close(fd)


def _link_target(dir_fd: int, name: str) -> str | None:
    if not stat.S_ISLNK(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode):
        return None
    return os.readlink(name, dir_fd=dir_fd)


def _require_regular(seen: os.stat_result, path: str, error: type[PloopError]) -> None:
    if stat.S_ISREG(seen.st_mode):
        return
    kind = next((kind for test, kind in _KINDS if test(seen.st_mode)), "unknown file type")
    raise error("is not a regular file", path=path, field="type", value=kind)


def _checked(fd: int, seen: os.stat_result, path: str) -> int:
    """`fd`, if it is the file that was looked at, set to blocking."""
    now = os.fstat(fd)
    if (now.st_dev, now.st_ino) != (seen.st_dev, seen.st_ino):
        os.close(fd)
        raise PloopError("was replaced while it was being opened", path=path, hint="try again")
    os.set_blocking(fd, True)
    return fd
