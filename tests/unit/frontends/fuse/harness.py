"""A device in memory as the FUSE front end sees one, with real gate and logical unit."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from ploopd.frontends.fuse.disk import Disk, Operation, Value
from ploopd.gate.events import Event
from ploopd.gate.filter import Gate
from ploopd.gate.limits import ParkLimits
from ploopd.scsi.logical_unit import LogicalUnit
from ploopd.storage.stack import LayerInfo
from scst_shim import QueueFlags, StandbyCheck
from tests.support.memory_device import Completion, MemoryDevice
from tests.unit.scsi.harness import ManualClock, TestBuffers

MIB = 1 << 20


def layer(level: int, *, kind: str = "ploop", path: str = "/images/disk.hds") -> LayerInfo:
    return LayerInfo(
        path=path,
        kind=kind,
        io="nowait",
        guid=None,
        version=0 if kind == "raw" else 2,
        level=level,
        size=4 * MIB,
        inode=(1, 100 + level),
    )


@dataclass
class Files:
    """What the tree asks a volume for."""

    layers: list[LayerInfo]
    mapped: int = 0

    def mapped_bytes(self) -> int:
        return self.mapped


class FakeDevice:
    """A served device over a `MemoryDevice`: everything above the storage is the real thing."""

    def __init__(
        self,
        name: str = "disk",
        *,
        size: int = 4 * MIB,
        completion: Completion = Completion.AT_ONCE,
        limits: ParkLimits | None = None,
        write_cache: bool = True,
        read_only: bool = False,
        layers: list[LayerInfo] | None = None,
    ) -> None:
        self.name = name
        self.clock = ManualClock()
        self.check = StandbyCheck()
        self.check.enable()
        self.flags = QueueFlags(name, self.check)
        self.memory = MemoryDevice(
            size, completion=completion, read_only=read_only, cancellable=True
        )
        self.buffers = TestBuffers()
        self.events: list[Event] = []
        self.gate = Gate(
            self.memory,
            name=name,
            fuses=self.flags,
            clock=self.clock,
            on_event=self.events.append,
            limits=limits,
        )
        self.unit = LogicalUnit(
            self.gate,
            identity=uuid.UUID("6ba7b810-9dad-41d1-80b4-00c04fd430c8"),
            buffers=self.buffers,
            clock=self.clock,
            write_cache=write_cache,
            read_only=read_only,
        )
        self.volume = Files(layers or [layer(0)])
        self.bind()

    @property
    def size(self) -> int:
        return self.gate.size

    def bind(self) -> None:
        self.gate.bind()

    def unbind(self) -> None:
        self.gate.unbind()


@dataclass
class Answers:
    """Calls `Disk` and keeps what it answers, reads copied."""

    device: FakeDevice
    got: list[tuple[int, bytes | int | None]] = field(default_factory=list)
    timers: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.disk = Disk(self.device, later=lambda after, call: self.timers.append((after, call)))

    def __call__(self, number: int, value: Value) -> None:
        self.got.append((number, bytes(value) if isinstance(value, memoryview) else value))

    def read(self, offset: int, size: int) -> Operation | None:
        return self.disk.read(offset, size, self)

    def write(self, offset: int, data: bytes, *, stable: bool = False) -> Operation | None:
        return self.disk.write(offset, memoryview(data), self, stable=stable)

    def run_timers(self) -> None:
        timers, self.timers = self.timers, []
        for _, call in timers:
            call()
