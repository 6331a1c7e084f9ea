"""Who holds a lock, as far as the kernel tells: for the error message only.

/proc/locks names the process for POSIX locks and flock, not for open file description locks; those
are found in the /proc/PID/fdinfo of whoever has the file open, as far as we may read it.

Source: proc(5), /proc/locks and /proc/pid/fdinfo.
"""

from __future__ import annotations

import os
from pathlib import Path

_PROC = Path("/proc")


def describe_holder(fd: int, byte: int | None) -> str | None:
    """ "process 123 (qemu-io)" for a lock on `byte` of the file (None: its flock), or None."""
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in _lines(_PROC / "locks"):
        pid = _holder(line.split(), wanted, byte)
        if pid is not None and pid > 0:
            return _named(pid)
    pid = _holder_by_descriptor(wanted, byte, fd)
    return None if pid is None else _named(pid)


def _holder(fields: list[str], wanted: str, byte: int | None) -> int | None:
    """The process of a line "1: OFDLCK ADVISORY READ -1 fe:00:42 100 101" if it is the one."""
    if len(fields) != 8 or fields[5] != wanted:
        return None
    kind, pid, first, last = fields[1], fields[4], fields[6], fields[7]
    if byte is None:
        return int(pid) if kind == "FLOCK" else None
    if kind == "FLOCK" or int(first) > byte or (last != "EOF" and int(last) < byte):
        return None
    return int(pid)


def _holder_by_descriptor(wanted: str, byte: int | None, own_fd: int) -> int | None:
    """Looks only at what the kernel tells of the descriptors: a file that is asked itself, on a
    dead storage, may never answer."""
    own = (os.getpid(), own_fd)
    for process in _numbered(_PROC):
        for descriptor in _numbered(process / "fdinfo"):
            if (int(process.name), int(descriptor.name)) == own:
                continue
            for line in _lines(descriptor):
                label, _, rest = line.partition("\t")
                if label == "lock:" and _holder(rest.split(), wanted, byte) is not None:
                    return int(process.name)
    return None


def _numbered(directory: Path) -> list[Path]:
    try:
        return [entry for entry in directory.iterdir() if entry.name.isdigit()]
    except OSError:
        return []


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _named(pid: int) -> str:
    if pid == os.getpid():
        return "this process"
    names = _lines(_PROC / str(pid) / "comm")
    return f"process {pid} ({names[0]})" if names else f"process {pid}"
