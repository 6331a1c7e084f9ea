"""Logging that never stops the daemon.

A terminal where somebody pressed Ctrl-S, or a pipe that nobody reads, blocks whoever writes to it.
The event loop must not be that one: records go through a bounded queue to a thread, and what does
not fit is counted and dropped.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
from typing import TextIO

from ploopd.journal_log import SOCKET, datagram, is_journal

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
CAPACITY = 10_000
"""Records that may wait to be written."""

FLUSH_SECONDS = 2.0
"""How long the end of the program waits for them."""

Item = tuple[str, bytes]
"""A record as text, and as the journal takes it if that is where it goes."""


class BackgroundHandler(logging.Handler):
    """Writes formatted records to `stream` from a thread of its own."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._items: queue.Queue[Item | None] = queue.Queue(CAPACITY)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the record; never blocks."""
        try:
            if self._dropped:
                self._items.put_nowait(self.render(_dropped(self._dropped)))
                self._dropped = 0
            self._items.put_nowait(self.render(record))
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what is queued, for FLUSH_SECONDS at most."""
        try:
            self._items.put(None, timeout=FLUSH_SECONDS)
        except queue.Full:
            pass
        else:
            self._thread.join(FLUSH_SECONDS)
        super().close()

    def render(self, record: logging.LogRecord) -> Item:
        """What `deliver` takes."""
        return self.format(record), b""

    def deliver(self, item: Item) -> None:
        """Write one record; in the thread."""
        self._stream.write(item[0] + "\n")
        self._stream.flush()

    def _write(self) -> None:
        while (item := self._items.get()) is not None:
            try:
                self.deliver(item)
            except (OSError, ValueError):
                # The reader is gone, or the stream was closed at exit: nobody is left to be told.
                return


class JournalHandler(BackgroundHandler):
    """Sends records with their fields to systemd's journal; `stream` is where its stderr leads."""

    def __init__(self, stream: TextIO, address: str = SOCKET) -> None:
        self._address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        super().__init__(stream)

    def render(self, record: logging.LogRecord) -> Item:
        text = self.format(record)
        return text, datagram(record, text)

    def deliver(self, item: Item) -> None:
        try:
            self._socket.sendto(item[1], self._address)
        except OSError:
            # The journal restarts; the stream that it has given us still leads to it.
            super().deliver(item)

    def close(self) -> None:
        super().close()
        self._socket.close()


def _dropped(count: int) -> logging.LogRecord:
    text = f"event=log-dropped records={count}"
    return logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, None, None)


def start_logging(level: str, stream: TextIO) -> BackgroundHandler:
    """Send the root logger to `stream`, or with fields to the journal if that is where it leads;
    the caller closes the handler at the end."""
    handler: BackgroundHandler
    if is_journal(stream):
        handler = JournalHandler(stream)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = BackgroundHandler(stream)
        handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    set_level(level)
    return handler


def set_level(level: str) -> None:
    """Log what is of this level or above: debug, info, warning, error."""
    logging.getLogger().setLevel(level.upper())
