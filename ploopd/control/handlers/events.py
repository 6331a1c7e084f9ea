"""Events: what has been, and with `more` what happens from then on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from ploopd.control import messages
from ploopd.control.context import ControlContext
from ploopd.control.server import Operation, Send

_BATCH = 64 << 10
"""Bytes of the events of one reply, about; one event is a few hundred."""

_SINGLE = 512 << 10
"""Bytes of the only reply to a call without `more`: the newest events that fit."""


def operations(context: ControlContext) -> list[Operation]:
    """What this module serves."""

    async def show(parameters: messages.EventsParameters, _send: Send) -> messages.EventsReply:
        history = context.event_log.history(_device(context, parameters))
        newest = next(_batches(history[::-1], _SINGLE), [])[::-1]
        return messages.EventsReply(events=newest, lost=len(history) - len(newest))

    async def follow(parameters: messages.EventsParameters, send: Send) -> messages.EventsReply:
        device = _device(context, parameters)
        with context.event_log.follow(device) as follower:
            # No checkpoint between the two: every event is in one of them and none in both.
            events, lost = context.event_log.history(device), 0
            while True:
                for batch in _batches(events, _BATCH):
                    await send(messages.EventsReply(events=batch, lost=lost))
                    lost = 0
                events, lost = await follower.take()

    return [Operation(method=messages.EVENTS, handler=show, follower=follow)]


def _device(context: ControlContext, parameters: messages.EventsParameters) -> str | None:
    """One that has gone is known for as long as there are events of it."""
    name = parameters.device
    if name is None or context.event_log.history(name):
        return name
    return context.find(name).name


def _batches(
    events: Sequence[messages.DeviceEvent], limit: int
) -> Iterator[list[messages.DeviceEvent]]:
    """The events in lists of about `limit` bytes of JSON, of one event at least."""
    batch: list[messages.DeviceEvent] = []
    size = 0
    for event in events:
        length = _length(event)
        if batch and size + length > limit:
            yield batch
            batch, size = [], 0
        batch.append(event)
        size += length
    if batch:
        yield batch


def _length(event: messages.DeviceEvent) -> int:
    try:
        return len(msgspec.json.encode(event))
    except UnicodeEncodeError:  # sent with escapes, which are longer
        return 4 * sum(len(str(value)) for value in event.details.values()) + 256
