"""Park limits, and events as subscribers and the log see them."""

from __future__ import annotations

import logging

import pytest

from ploopd.errors import UsageError
from ploopd.gate.events import Event, EventBus, EventKind
from ploopd.gate.limits import ParkLimits


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_requests", 0), ("max_bytes", 0), ("park_max", 0.0), ("park_max", -1.0)],
)
def test_absurd_limits_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(UsageError, match=field):
        ParkLimits(**{field: value})  # type: ignore[arg-type]


def test_limits_count_requests_and_bytes_but_allow_one_request_of_any_size() -> None:
    limits = ParkLimits(max_requests=2, max_bytes=100)
    assert limits.allows(2, 100)
    assert not limits.allows(3, 0)
    assert not limits.allows(2, 101)
    assert limits.allows(1, 1000)


def test_an_event_is_one_line_of_names_and_values() -> None:
    event = Event(
        kind=EventKind.STANDBY_ENTERED,
        device="disk",
        time=1.0,
        details={"path": "/a b", "errno": "EIO", "elapsed": 0.25, "offset": 4096, "detail": ""},
    )
    assert str(event) == (
        "event=standby-entered device=disk path='/a b' errno=EIO elapsed=0.250 offset=4096 "
        "detail=''"
    )


def test_newlines_in_values_do_not_make_lines() -> None:
    event = Event(kind=EventKind.PARKED, device="d", time=0.0, details={"path": "a\nevent=x"})
    assert "\n" not in str(event)


def test_the_bus_logs_and_tells_until_unsubscribed(caplog: pytest.LogCaptureFixture) -> None:
    bus, seen = EventBus(), []
    unsubscribe = bus.subscribe(seen.append)
    event = Event(kind=EventKind.LATCHED, device="disk", time=0.0)
    with caplog.at_level(logging.INFO):
        bus.publish(event)
    unsubscribe()
    unsubscribe()
    bus.publish(event)
    assert seen == [event]
    assert caplog.records[0].levelno == logging.ERROR
    assert caplog.records[0].getMessage() == "event=latched-read-only device=disk"
