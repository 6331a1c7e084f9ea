"""What systemd is told about the daemon: ready, reloading, stopping, alive, and one line of status.

Source: sd_notify(3), systemd.service(5) `Type=notify` and `WatchdogSec=`.  Without NOTIFY_SOCKET
nothing is sent.  The watchdog is fed by the event loop itself, so that a loop that is stuck is
noticed.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping

import trio

log = logging.getLogger(__name__)

_FEEDS = 3
"""How often in each period the watchdog is fed."""


class Notifier:
    """Sends state to the service manager; never blocks and never fails."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._socket: socket.socket | None = None
        self.watchdog_seconds = _watchdog_seconds(environ) if self._address else None
        """How long systemd waits for a sign of life; None does not wait."""

    def __enter__(self) -> Notifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def ready(self, status: str) -> None:
        """Every LUN can be used, or the configuration has been read again."""
        self._send("READY=1", f"STATUS={_line(status)}")

    def reloading(self) -> None:
        """The configuration is being read again; `ready` follows."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now}")

    def stopping(self) -> None:
        """The end has begun."""
        self._send("STOPPING=1", "STATUS=stopping")

    def status(self, text: str) -> None:
        """The line that `systemctl status` shows."""
        self._send(f"STATUS={_line(text)}")

    async def feed(self) -> None:
        """Feed the watchdog until cancelled; returns at once where there is none."""
        if self.watchdog_seconds is None:
            return
        while True:
            self._send("WATCHDOG=1")
            await trio.sleep(self.watchdog_seconds / _FEEDS)

    def _send(self, *assignments: str) -> None:
        if self._address is None:
            return
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
        try:
            self._socket.sendto("\n".join(assignments).encode(), self._address)
        except OSError as error:
            # Nobody is there, or its queue is full: the disks are what matters.
            log.debug("event=notify-failed error=%r", str(error))


def _address(text: str) -> str | None:
    """The socket's address: a path, or `@name` in the abstract namespace."""
    if text.startswith("@"):
        return "\0" + text[1:]
    return text if text.startswith("/") else None


def _watchdog_seconds(environ: Mapping[str, str]) -> float | None:
    owner = environ.get("WATCHDOG_PID", "")
    if owner and owner != str(os.getpid()):
        return None
    microseconds = environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 1e6 if microseconds.isdecimal() and int(microseconds) else None


def _line(text: str) -> str:
    return " ".join(text.splitlines())
