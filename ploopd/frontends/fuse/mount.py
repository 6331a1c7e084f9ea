"""Mounting and unmounting by fusermount3; everything here blocks and belongs in a thread.

The kernel's descriptor is asked of fusermount3 rather than mounted by libfuse, because messages for
the data of disks are handled here (`channel`).  Source: fusermount3(1), libfuse lib/mount.c for the
_FUSE_COMMFD protocol.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import subprocess
from pathlib import Path

from ploopd.errors import DeniedError, NotFoundError, PloopError, UnsupportedError, UsageError

FUSE_DEVICE = Path("/dev/fuse")
PROGRAM = "fusermount3"
FILE_SYSTEM = "ploopd"
SECONDS = 20.0
"""How long fusermount3 may take."""


def mount(directory: Path, *, everybody: bool) -> int:
    """Mount on an empty directory and return the descriptor that speaks to the kernel.

    `everybody`: other users may look, too (needs root or user_allow_other in /etc/fuse.conf).  What
    a daemon that was killed has left mounted there is unmounted first.  Raises `PloopError`.
    """
    check(directory)
    options = ["rw", "nosuid", "nodev", "noexec", "default_permissions"]
    options += [f"fsname={FILE_SYSTEM}", f"subtype={FILE_SYSTEM}"]
    if everybody:
        options.append("allow_other")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours:
        with theirs:
            result = _run(
                "-o", ",".join(options), "--", os.fspath(directory), descriptor=theirs.fileno()
            )
        descriptors: list[int] = []
        if result.returncode == 0:
            ours.settimeout(SECONDS)
            _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    if not descriptors:
        raise PloopError(
            f"cannot be mounted: {_said(result)}",
            path=directory,
            hint="see fusermount3(1) and /etc/fuse.conf",
        )
    descriptor = descriptors[0]
    os.set_inheritable(descriptor, False)
    os.set_blocking(descriptor, False)
    return descriptor


def check(directory: Path) -> None:
    """Raise `PloopError` unless `directory` can be mounted on, as far as that can be told."""
    _check_system()
    _check_directory(directory)


def unmount(directory: Path) -> bool:
    """Unmount, from under those who still use it if there are any; False if somebody did.

    Raises `PloopError` when it stays mounted.
    """
    if _run("-u", "--", os.fspath(directory)).returncode == 0:
        return True
    result = _run("-u", "-z", "--", os.fspath(directory))
    if result.returncode:
        raise PloopError(f"cannot be unmounted: {_said(result)}", path=directory)
    return False


def _check_system() -> None:
    if not FUSE_DEVICE.exists():
        raise UnsupportedError(
            "there is no FUSE in this kernel", path=FUSE_DEVICE, hint="modprobe fuse"
        )
    if not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        raise DeniedError(
            "cannot be read and written", path=FUSE_DEVICE, hint="see ls -l /dev/fuse"
        )
    if shutil.which(PROGRAM) is None:
        raise UnsupportedError(
            "a view needs fusermount3", field="program", value=PROGRAM, hint="apt-get install fuse3"
        )


def _check_directory(directory: Path) -> None:
    """Raises unless it is an empty directory; unmounts what a dead daemon has left."""
    try:
        names = _names(directory)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise _directory_error(error, directory) from error
        _run("-u", "-z", "--", os.fspath(directory))
        try:
            names = _names(directory)
        except OSError as second:
            raise _directory_error(second, directory) from second
    if os.path.ismount(directory):
        raise UsageError(
            "something is mounted there already",
            path=directory,
            field="sysfs",
            value=os.fspath(directory),
            hint=f"name another directory, or unmount it: {PROGRAM} -u {directory}",
        )
    if names:
        raise UsageError(
            f"is not empty: it has {names[0]!r}",
            path=directory,
            field="sysfs",
            value=os.fspath(directory),
            hint="name an empty directory",
        )


def _names(directory: Path) -> list[str]:
    if not stat.S_ISDIR(directory.stat().st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return sorted(os.listdir(directory))


def _directory_error(error: OSError, directory: Path) -> PloopError:
    field, value = "sysfs", os.fspath(directory)
    if isinstance(error, FileNotFoundError):
        return NotFoundError(
            "does not exist", path=directory, field=field, value=value, hint=f"mkdir -p {directory}"
        )
    if isinstance(error, NotADirectoryError):
        return UsageError(
            "is not a directory", path=directory, field=field, value=value, hint="name a directory"
        )
    if isinstance(error, PermissionError):
        return DeniedError("cannot be read", path=directory, hint=f"see ls -ld {directory}")
    return PloopError(
        f"cannot be used: {error.strerror}",
        path=directory,
        field=field,
        value=value,
        hint=f"{PROGRAM} -u -z {directory} removes what was left mounted there",
    )


def _run(*arguments: str, descriptor: int | None = None) -> subprocess.CompletedProcess[bytes]:
    environment = dict(os.environ)
    if descriptor is not None:
        environment["_FUSE_COMMFD"] = str(descriptor)
    try:
        return subprocess.run(  # noqa: S603 - a fixed program, and paths as arguments
            [PROGRAM, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment,
            pass_fds=() if descriptor is None else (descriptor,),
            check=False,
            timeout=SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PloopError(
            f"{PROGRAM} cannot be run: {error}", hint="apt-get install fuse3"
        ) from error


def _said(result: subprocess.CompletedProcess[bytes]) -> str:
    lines = result.stderr.decode(errors="replace").strip().splitlines()
    said = lines[-1] if lines else f"exit code {result.returncode}"
    return said.removeprefix(f"{PROGRAM}: ")
