"""A gate over a device in memory, with what they report."""

from __future__ import annotations

import errno

from ploopd.gate.events import Event
from ploopd.gate.filter import Gate
from ploopd.gate.limits import ParkLimits
from scst_shim import QueueFlags, StandbyCheck
from tests.support.memory_device import Completion, MemoryDevice

SIZE = 1 << 20


class Bench:
    """A gate, its device, and what they reported."""

    def __init__(
        self,
        *,
        key: bool = True,
        en: bool = True,
        limits: ParkLimits | None = None,
        completion: Completion = Completion.AT_ONCE,
        inline: bool = True,
        cancellable: bool = False,
    ) -> None:
        self.now = 0.0
        self.events: list[Event] = []
        self.check = StandbyCheck()
        if key:
            self.check.enable()
        self.completion = completion
        self.device = MemoryDevice(
            SIZE, completion=completion, inline=inline, cancellable=cancellable
        )
        self.gate = Gate(
            self.device,
            name="disk",
            fuses=QueueFlags("disk", self.check, warn=lambda _: None),
            clock=lambda: self.now,
            on_event=self.events.append,
            limits=limits,
        )
        if en:
            self.gate.bind()

    def kinds(self) -> list[str]:
        return [event.kind.value for event in self.events]

    def fail(self, op: str | None = None, number: int = errno.EIO) -> None:
        self.device.fail(op, number, times=None)

    def replaced(self) -> MemoryDevice:
        """Replace the device by a copy, as recovery does; returns the copy."""
        self.gate.begin_recovery()
        fresh = MemoryDevice(SIZE, data=bytearray(self.device.data), completion=self.completion)
        self.gate.swap(fresh)
        self.gate.leave_standby()
        return fresh


def data(byte: bytes = b"x", length: int = 512) -> memoryview:
    return memoryview(bytearray(byte * length))
