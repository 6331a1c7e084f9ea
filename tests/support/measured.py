"""A load that remembers when its answers came, and the events of a server's log, on one clock."""

from __future__ import annotations

import re
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

from tests.support.initiator import Answer, Kind
from tests.support.load import Load

_EVENT = re.compile(r"^(?P<time>\d\S+ \S+) .*\bevent=(?P<kind>\S+)(?P<details>.*)$", re.MULTILINE)
_DETAIL = re.compile(r"(\w+)=('[^']*'|\S+)")


class MeasuredLoad(Load):
    """`answered`: when each command's answer came (`time.time`); `latency`: seconds since it was
    sent.  `verified`: blocks whose content was compared."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.answered = array("d")
        self.latency = array("d")
        self.verified = 0

    def _take(self, answer: Answer) -> None:
        if answer.kind is Kind.COMMAND:
            request = self._requests[answer.tag]
            self.latency.append(time.monotonic() - request.started)
            self.answered.append(time.time())
        super()._take(answer)
        if answer.kind is Kind.COMMAND and request.kind in ("read", "recover"):
            self.verified += len(request.blocks)

    def first_after(self, moment: float) -> float | None:
        """Seconds from `moment` to the first answer after it."""
        return next((each - moment for each in self.answered if each >= moment), None)


def run_during(load: Load, play: Callable[[], None], *, stall: float = 60.0) -> None:
    """Keep the load running while `play` runs in a thread; raises what either of them raises."""
    with ThreadPoolExecutor(1) as pool:
        playing = pool.submit(play)

        def tick() -> None:
            if playing.done():
                playing.result()

        load.run(until=playing.done, tick=tick, stall=stall)
        playing.result()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedEvent:
    """One `event=…` of ploopd's log; `time` on the clock of `time.time`."""

    time: float
    kind: str
    details: dict[str, str]


def logged_events(log: str, kind: str | None = None) -> Iterator[LoggedEvent]:
    """The events that a log names, all or those of one kind."""
    for match in _EVENT.finditer(log):
        if kind is None or match["kind"] == kind:
            moment = datetime.strptime(match["time"], "%Y-%m-%d %H:%M:%S,%f")
            details = {name: value.strip("'") for name, value in _DETAIL.findall(match["details"])}
            yield LoggedEvent(time=moment.timestamp(), kind=match["kind"], details=details)
