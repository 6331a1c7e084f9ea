"""What a device reports about standby: events for subscribers and one log line each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

_log = logging.getLogger(__name__)


class EventKind(Enum):
    """The names under which events are published."""

    DEVICE_ADDED = "device-added"
    DEVICE_REMOVED = "device-removed"
    STANDBY_ENTERED = "standby-entered"
    STANDBY_LEFT = "standby-left"
    PARKED = "parked"
    PARK_LIMIT = "park-limit"
    PARK_EXPIRED = "park-expired"
    REPLACE_STARTED = "replace-started"
    REPLACE_STEP = "replace-step"
    REPLACE_FAILED = "replace-failed"
    RECOVERED = "recovered"
    DISOWNED = "disowned"
    RELEASED = "released"
    LATCHED = "latched-read-only"
    LATCH_CLEARED = "latch-cleared"
    SPACE_EXHAUSTED = "space-exhausted"
    SPACE_RETURNED = "space-returned"
    HELD = "held"
    CANDIDATE_REFUSED = "candidate-refused"
    RECOVERY_COMMAND = "recovery-command"
    JOURNAL_LOST = "journal-lost"
    RESIZED = "resized"


_LEVELS: Mapping[EventKind, int] = {
    EventKind.STANDBY_ENTERED: logging.WARNING,
    EventKind.PARK_LIMIT: logging.WARNING,
    EventKind.PARK_EXPIRED: logging.WARNING,
    EventKind.DISOWNED: logging.WARNING,
    EventKind.SPACE_EXHAUSTED: logging.WARNING,
    EventKind.CANDIDATE_REFUSED: logging.WARNING,
    EventKind.REPLACE_FAILED: logging.ERROR,
    EventKind.LATCHED: logging.ERROR,
    EventKind.JOURNAL_LOST: logging.ERROR,
}


_REPLACING = frozenset(
    {EventKind.REPLACE_STARTED, EventKind.REPLACE_STEP, EventKind.REPLACE_FAILED}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened to `device` at `time` (seconds of the daemon's clock).

    `details`: names and values that say more; values are str, int or float.
    """

    kind: EventKind
    device: str
    time: float
    details: Mapping[str, str | int | float] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line: event=… device=… and the details; text with spaces is quoted."""
        pairs = [("event", self.kind.value), ("device", self.device), *self.details.items()]
        return " ".join(f"{name}={_quoted(value)}" for name, value in pairs)


def _quoted(value: str | int | float) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    return repr(text) if not text or any(c.isspace() or c in "\"'=" for c in text) else text


Subscriber = Callable[[Event], None]


class EventBus:
    """Hands events to the log and to subscribers.

    A subscriber is called at once, in the event loop's thread, and must neither block nor raise.
    """

    def __init__(self) -> None:
        self._subscribers: list[Subscriber] = []
        self.quiet: set[str] = set()
        """Devices whose failing replacements are expected, and not worth a line each."""

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call `subscriber(event)` from now on; returns the way to stop that."""
        self._subscribers.append(subscriber)

        def unsubscribe() -> None:
            if subscriber in self._subscribers:
                self._subscribers.remove(subscriber)

        return unsubscribe

    def publish(self, event: Event) -> None:
        """Log `event` and tell every subscriber."""
        level = _LEVELS.get(event.kind, logging.INFO)
        if event.kind in _REPLACING and event.device in self.quiet:
            level = logging.DEBUG
        _log.log(level, "%s", event, extra={"ploopd_event": event})
        for subscriber in tuple(self._subscribers):
            subscriber(event)
