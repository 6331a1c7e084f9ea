"""inotify(7) by the C library: what `inotifywait` does, with the time of each event."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

IN_MODIFY = 0x02
_EVENT = struct.Struct("=iIII")


@dataclass(frozen=True, slots=True, kw_only=True)
class Noticed:
    """An event: its mask, and when it was read (`time.monotonic`)."""

    mask: int
    time: float


class Inotify:
    """Watches one path."""

    def __init__(self, path: Path, mask: int = IN_MODIFY) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0 or libc.inotify_add_watch(self.fd, os.fsencode(path), mask) < 0:
            raise OSError(ctypes.get_errno(), "inotify", os.fspath(path))

    def __enter__(self) -> Inotify:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.fd)

    def wait(self, timeout: float) -> list[Noticed]:
        """The events that have come, after waiting for the first."""
        ready, _, _ = select.select([self.fd], [], [], timeout)
        now = time.monotonic()
        if not ready:
            return []
        data, found, at = os.read(self.fd, 65536), [], 0
        while at < len(data):
            _, mask, _, length = _EVENT.unpack_from(data, at)
            found.append(Noticed(mask=mask, time=now))
            at += _EVENT.size + length
        return found
