"""Logging that never stops the daemon.

A terminal where somebody pressed Ctrl-S, or a pipe that nobody reads, blocks whoever writes to it.
The event loop must not be that one: records go through a bounded queue to a thread, and what does
not fit is counted and dropped.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import TextIO

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
CAPACITY = 10_000
"""Records that may wait to be written."""

FLUSH_SECONDS = 2.0
"""How long the end of the program waits for them."""


class BackgroundHandler(logging.Handler):
    """Writes formatted records to `stream` from a thread of its own."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(CAPACITY)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the record; never blocks."""
        try:
            if self._dropped:
                self._lines.put_nowait(f"event=log-dropped records={self._dropped}")
                self._dropped = 0
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what is queued, for FLUSH_SECONDS at most."""
        try:
            self._lines.put(None, timeout=FLUSH_SECONDS)
        except queue.Full:
            pass
        else:
            self._thread.join(FLUSH_SECONDS)
        super().close()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                # The reader is gone, or the stream was closed at exit: nobody is left to be told.
                return


def start_logging(level: str, stream: TextIO) -> BackgroundHandler:
    """Send the root logger to `stream`; the caller closes the handler at the end."""
    handler = BackgroundHandler(stream)
    handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(level.upper())
    return handler
