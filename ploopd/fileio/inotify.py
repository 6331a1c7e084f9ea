"""inotify(7): what happens in directories.  Blocking calls that do not block."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntFlag

from ploopd.fileio.libc import last_error, libc

_EVENT = struct.Struct("=iIII")
_BUFFER = 1 << 16


class Happened(IntFlag):
    """What to watch for, and what has happened.  Source: <linux/inotify.h>."""

    MODIFY = 0x2
    CREATE = 0x100
    IGNORED = 0x8000
    ONLY_DIRECTORY = 0x1000000
    DIRECTORY = 0x40000000


@dataclass(frozen=True, slots=True)
class Change:
    """`name` in the directory that `watch` stands for."""

    watch: int
    what: Happened
    name: str


class Inotify:
    """One inotify instance; readable when there is something to `read`."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._fd = int(libc().inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        if self._fd < 0:
            raise last_error("inotify_init1")

    def fileno(self) -> int:
        return self._fd

    def add(self, path: str | os.PathLike[str], what: Happened) -> int:
        """Watch `path`; the number that its changes carry.  Raises OSError."""
        watch = int(libc().inotify_add_watch(self._fd, os.fsencode(path), int(what)))
        if watch < 0:
            raise last_error("inotify_add_watch")
        return watch

    def remove(self, watch: int) -> None:
        """Do not watch any more; nothing happens if it has gone by itself."""
        libc().inotify_rm_watch(self._fd, watch)

    def read(self) -> Iterator[Change]:
        """What has happened since the last call; nothing if nothing has."""
        try:
            data = os.read(self._fd, _BUFFER)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EINTR):
                return
            raise
        at = 0
        while at < len(data):
            watch, what, _, length = _EVENT.unpack_from(data, at)
            at += _EVENT.size
            name = data[at : at + length].split(b"\0", 1)[0]
            at += length
            yield Change(watch, Happened(what), os.fsdecode(name))

    def close(self) -> None:
        os.close(self._fd)
