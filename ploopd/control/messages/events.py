"""What happens to devices, as it happens."""

from __future__ import annotations

from ploopd.control.messages.base import Message


class EventsParameters(Message, frozen=True, kw_only=True):
    """Of which device; None is of all."""

    device: str | None = None


class DeviceEvent(Message, frozen=True, kw_only=True):
    """Something that happened to a device.

    `sequence` counts the daemon's events, `time` is in seconds since 1970, `event` the name of what
    happened, `details` text and numbers that say more.
    """

    sequence: int
    time: float
    event: str
    device: str
    details: dict[str, str | int | float]


class EventsReply(Message, frozen=True, kw_only=True):
    """Events, oldest first; `lost` is how many are missing before the first of them."""

    events: list[DeviceEvent]
    lost: int = 0
