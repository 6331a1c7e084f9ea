"""Claims the control socket's path for this process.

Whoever holds the flock on `PATH.lock` owns `PATH`.  The kernel drops that lock when its process
dies, so the socket file of a dead daemon is told from a live one's without guessing, and two
daemons that start together cannot both take it over.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from ploopd.control.paths import check_private_directory, default_control_path
from ploopd.errors import ExitCode, PloopError, UsageError, open_error

_BACKLOG = 32
_LONGEST_PATH = 107  # sockaddr_un.sun_path without its NUL


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSocket:
    """A bound, listening socket and what must be removed at the end.

    `instead_of` is the default path when a live daemon holds that one.
    """

    socket: socket.socket
    path: Path
    lock_fd: int
    instead_of: Path | None = None

    def close(self) -> None:
        """Stop listening and take the socket file away; the lock file stays, for the next one."""
        self.path.unlink(missing_ok=True)
        self.socket.close()
        os.close(self.lock_fd)


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
    lock_fd = _lock(path)
    try:
        _remove_stale(path)
        listener = _bind(path)
    except BaseException:
        os.close(lock_fd)
        raise
    return ControlSocket(socket=listener, path=path, lock_fd=lock_fd, instead_of=instead_of)


def _lock(path: Path) -> int:
    lock_path = path.with_name(path.name + ".lock")
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        lock_fd = os.open(lock_path, flags, 0o600)
    except OSError as error:
        raise open_error(error, lock_path) from error
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock_fd)
        raise _in_use(path) from error
    return lock_fd


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
