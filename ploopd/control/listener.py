"""Claims the control socket's path for this process.

A socket file at which nobody listens is a dead daemon's and is taken over; one at which somebody
listens is left alone.  Looking and binding happen under a lock on the directory, so that two
daemons that start together cannot both take the same file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ploopd.control.paths import check_private_directory, default_control_path
from ploopd.errors import BusyError, ExitCode, PloopError, UsageError, open_error

_BACKLOG = 32
_LONGEST_PATH = 107  # sockaddr_un.sun_path without its NUL
_LOCK_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSocket:
    """A bound, listening socket.  `inode` tells its file from one that somebody put there later.

    `instead_of` is the default path when a live daemon holds that one.
    """

    socket: socket.socket
    path: Path
    inode: int
    instead_of: Path | None = None

    def close(self) -> None:
        """Stop listening and take the socket file away."""
        with contextlib.suppress(FileNotFoundError):
            if self.path.lstat().st_ino == self.inode:
                self.path.unlink()
        self.socket.close()


def claim_control_socket(path: Path | None) -> ControlSocket:
    """Bind `path`, or the default path when it is None.

    When another daemon lives at the default path, `control-PID.sock` beside it is taken instead.
    At a path that was asked for explicitly this is an error: exit code 15.
    """
    if path is not None:
        return _claim(path, None)
    default = default_control_path()
    try:
        default.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise open_error(error, default.parent) from error
    check_private_directory(default.parent)
    try:
        return _claim(default, None)
    except PloopError as error:
        if error.exit_code != ExitCode.ADDRESS_IN_USE:
            raise
    return _claim(default.with_name(f"control-{os.getpid()}.sock"), default)


def _claim(path: Path, instead_of: Path | None) -> ControlSocket:
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise UsageError(
            f"a socket's path has {_LONGEST_PATH} bytes at most",
            path=path,
            hint="name a shorter --control",
        )
    with _directory_lock(path):
        _remove_stale(path)
        listener = _bind(path)
    return ControlSocket(
        socket=listener, path=path, inode=path.lstat().st_ino, instead_of=instead_of
    )


@contextlib.contextmanager
def _directory_lock(path: Path) -> Iterator[None]:
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise open_error(error, path.parent) from error
    deadline = time.monotonic() + _LOCK_SECONDS
    try:
        while not _try_flock(directory):
            if time.monotonic() > deadline:
                raise BusyError("the directory is locked by another process", path=path.parent)
            time.sleep(0.02)
        yield
    finally:
        os.close(directory)


def _try_flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_stale(path: Path) -> None:
    """Take a dead daemon's socket away; refuse anything else that is there."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UsageError(
            "exists and is not a socket", path=path, hint="name another path with --control"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise _in_use(path) from error
    raise _in_use(path)


def _bind(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.bind(os.fspath(path))
        # Nobody can connect between bind and listen, so there is no moment with a wider mode.
        os.chmod(path, 0o600)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise open_error(error, path) from error
    return listener


def _in_use(path: Path) -> PloopError:
    return PloopError(
        "another ploopd listens here",
        path=path,
        hint="name another socket with --control",
        exit_code=ExitCode.ADDRESS_IN_USE,
    )
