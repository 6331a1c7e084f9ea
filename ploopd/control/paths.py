"""Where the control socket is.

`/run/ploopd/control.sock` for root; for anybody else `$XDG_RUNTIME_DIR/ploopd/control.sock`, or
`/tmp/ploopd-UID/control.sock` where there is no such directory.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ploopd.errors import DeniedError, open_error

SOCKET_NAME = "control.sock"


def default_control_path() -> Path:
    """The path that daemon and client use when they are not told another one."""
    if os.geteuid() == 0:
        return Path("/run/ploopd") / SOCKET_NAME
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isabs(runtime):
        return Path(runtime) / "ploopd" / SOCKET_NAME
    return Path(f"/tmp/ploopd-{os.geteuid()}") / SOCKET_NAME  # noqa: S108 - checked below


def check_private_directory(directory: Path) -> None:
    """Raises `DeniedError` unless `directory` is ours alone.

    In /tmp anybody could have made it first, and would then be the daemon that clients talk to.
    """
    try:
        status = directory.lstat()
    except OSError as error:
        raise open_error(error, directory) from error
    if not stat.S_ISDIR(status.st_mode):
        raise DeniedError("is not a directory", path=directory, hint="name another --control")
    if status.st_uid != os.geteuid():
        raise DeniedError(
            "belongs to another user",
            path=directory,
            field="uid",
            value=status.st_uid,
            hint="name another --control",
        )
    if status.st_mode & 0o022:
        raise DeniedError(
            "can be written by others",
            path=directory,
            field="mode",
            value=oct(stat.S_IMODE(status.st_mode)),
            hint=f"chmod 700 {directory}",
        )
