"""What `inotifywait` does, with the time of each event."""

from __future__ import annotations

import select
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ploopd.fileio import inotify
from ploopd.fileio.inotify import Happened


@dataclass(frozen=True, slots=True, kw_only=True)
class Noticed:
    """An event: its mask, and when it was read (`time.monotonic`)."""

    mask: int
    time: float


class Inotify:
    """Watches one path."""

    def __init__(self, path: Path, what: Happened = Happened.MODIFY) -> None:
        self._instance = inotify.Inotify()
        self._instance.add(path, what)

    def __enter__(self) -> Inotify:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._instance.close()

    def wait(self, timeout: float) -> list[Noticed]:
        """The events that have come, after waiting for the first."""
        select.select([self._instance], [], [], timeout)
        now = time.monotonic()
        return [Noticed(mask=int(change.what), time=now) for change in self._instance.read()]
