"""The events of all devices, kept for a while and passed on to whoever follows them.

Nothing here waits: an event is put into a bounded history and into the bounded queue of every
follower.  One that does not take its events in time loses the oldest ones and is told how many.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from ploopd.control.messages import DeviceEvent
from ploopd.errors import BusyError
from ploopd.gate.events import Event, EventBus

HISTORY = 256
"""Events that are kept."""

QUEUE = 256
"""Events that wait for one follower."""

MAX_FOLLOWERS = 32


class Follower:
    """One subscriber's queue."""

    def __init__(self, device: str | None, capacity: int = QUEUE) -> None:
        self._device = device
        self._waiting: deque[DeviceEvent] = deque(maxlen=capacity)
        self._arrived = trio.Event()
        self._lost = 0

    def offer(self, event: DeviceEvent) -> None:
        """Queue an event if it is one of the wanted device; never blocks."""
        if self._device not in (None, event.device):
            return
        if len(self._waiting) == self._waiting.maxlen:
            self._lost += 1
        self._waiting.append(event)
        self._arrived.set()

    async def take(self) -> tuple[list[DeviceEvent], int]:
        """Wait for events; returns all that are there, and how many were lost before them."""
        await self._arrived.wait()
        self._arrived = trio.Event()
        taken, lost = list(self._waiting), self._lost
        self._waiting.clear()
        self._lost = 0
        return taken, lost


class EventLog:
    """Subscribes to `bus` from the start; `wall_clock` gives the seconds since 1970."""

    def __init__(
        self, bus: EventBus, *, wall_clock: Callable[[], float] = time.time, capacity: int = HISTORY
    ) -> None:
        self._wall_clock = wall_clock
        self._history: deque[DeviceEvent] = deque(maxlen=capacity)
        self._followers: set[Follower] = set()
        self._sequence = 0
        bus.subscribe(self._add)

    def _add(self, event: Event) -> None:
        self._sequence += 1
        kept = DeviceEvent(
            sequence=self._sequence,
            time=self._wall_clock(),
            event=event.kind.value,
            device=event.device,
            details=dict(event.details),
        )
        self._history.append(kept)
        for follower in self._followers:
            follower.offer(kept)

    def history(self, device: str | None = None) -> list[DeviceEvent]:
        """What has been, oldest first; with `device` only what concerns that one."""
        return [event for event in self._history if device in (None, event.device)]

    @contextmanager
    def follow(self, device: str | None = None) -> Iterator[Follower]:
        """Events from now on.  Raises `BusyError` when there are too many followers."""
        if len(self._followers) >= MAX_FOLLOWERS:
            raise BusyError("too many programs follow the events", value=MAX_FOLLOWERS)
        follower = Follower(device)
        self._followers.add(follower)
        try:
            yield follower
        finally:
            self._followers.discard(follower)
