"""What the audience sees: one line per second, and what happens between them."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import TextIO

from ploopd.control import messages
from ploopd.control.client import ControlClient
from ploopd.errors import PloopError
from ploopd.units import format_size
from tests.demo.summary import percentile
from tests.support.measured import MeasuredLoad
from tests.support.serve import ServeProcess

_HEAD = "   time  standby  parked     IOPS    p50 ms    p99 ms    max ms"
_INDENT = " " * 9


class Screen:
    """Writes lines; may be used by several threads."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lock = threading.Lock()
        self._began = time.monotonic()

    def show(self, text: str = "") -> None:
        with self._lock:
            self._out.write(f"{_INDENT}{text}".rstrip() + "\n")
            self._out.flush()

    def say(self, text: str) -> None:
        """Something happens now."""
        with self._lock:
            self._out.write(f"{self._now():5.0f} s  {text}\n")
            self._out.flush()

    def row(self, standby: str, parked: int, rate: float, latencies: list[float]) -> None:
        """The line of a second."""
        cells = f"{standby:>7}  {parked:6,}  {rate:7,.0f}"
        if latencies:
            for share in (0.5, 0.99, 1.0):
                cells += f"  {1000 * percentile(latencies, share):8,.1f}"
        self.say(cells)

    def _now(self) -> float:
        return time.monotonic() - self._began

    def introduce(self, server: ServeProcess, depth: int, size: int) -> None:
        """What is going to be seen, and how to look at it from another terminal."""
        for line in (
            "A disk outlives its storage",
            "",
            f"disk    {format_size(size)}, {server.images[0]}",
            f"served  {server.url}",
            f"load    {depth} requests at once; what is read is compared with what was written",
            "look at it from another terminal:",
            f"  export PLOOPD_CONTROL={server.control}",
            "  .venv/bin/ploopctl device show disk",
            "",
        ):
            self.show(line)
        self._began = time.monotonic()
        with self._lock:
            self._out.write(_HEAD + "\n")
            self._out.flush()

    def table(self, rows: list[tuple[str, str]]) -> None:
        self.show()
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self.show(f"{name:<{width}}  {value}")
        self.show()


class Watcher:
    """A thread that shows a line each second until `stop`; `most_parked` is what it saw."""

    def __init__(
        self, load: MeasuredLoad, server: ServeProcess, screen: Screen, began: float
    ) -> None:
        self.load = load
        self.server = server
        self.screen = screen
        self.most_parked = 0
        self._began = began
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _watch(self) -> None:
        try:
            with ControlClient(self.server.control, timeout=5) as client:
                self._rows(client)
        except PloopError as error:
            self.screen.say(f"ploopd does not answer: {error}")

    def _rows(self, client: ControlClient) -> None:
        seen, second = 0, 1
        while not self._stopped.wait(max(0.0, self._began + second - time.time())):
            details = client.call(
                messages.SHOW_DEVICE,
                messages.ShowReply,
                messages.DeviceName(name="disk"),
                waiting="the state of the disk",
            ).device
            self.most_parked = max(self.most_parked, details.parked_requests)
            count = len(self.load.latency)
            latencies = list(self.load.latency[seen:count])
            self.screen.row(details.standby, details.parked_requests, len(latencies), latencies)
            seen, second = count, second + 1
