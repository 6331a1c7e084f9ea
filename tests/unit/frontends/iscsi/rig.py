"""A target in memory with its engine, and an initiator connected to it without a network."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from itertools import count

from ploopd.fileio.buffers import BufferPool
from ploopd.frontends.iscsi.config import IscsiConfig, Limits
from ploopd.frontends.iscsi.connection import Connection, TargetNode
from ploopd.scsi.logical_unit import LogicalUnit
from ploopd.scsi.target import Target
from tests.support.iscsi_client import TARGET, Client
from tests.support.iscsi_transport import EngineTransport
from tests.support.memory_device import MemoryDevice

SIZE = 16 << 20
SMALL_LIMITS = Limits(output_arena=1 << 20, receive_buffer=2 << 20)


@dataclass
class Rig:
    """`devices` become LUN 0, 1, …; `now` is the clock that every engine sees."""

    config: IscsiConfig = field(
        default_factory=lambda: IscsiConfig(iqn=TARGET, limits=SMALL_LIMITS)
    )
    devices: list[MemoryDevice] = field(default_factory=lambda: [MemoryDevice(SIZE)])
    now: float = 1000.0
    dirty: list[Connection] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.buffers = BufferPool()
        self.target = Target(TARGET)
        for lun, device in enumerate(self.devices):
            unit = LogicalUnit(
                device,
                identity=uuid.UUID(int=lun + 1),
                buffers=self.buffers,
                clock=lambda: self.now,
            )
            self.target.add_unit(lun, unit)
        numbers = count(1)
        self.node = TargetNode(
            config=self.config,
            targets={TARGET: self.target},
            random=lambda length: next(numbers).to_bytes(length, "big"),
            buffers=self.buffers,
            addresses=[("127.0.0.1", 3260)],
        )

    @property
    def device(self) -> MemoryDevice:
        return self.devices[0]

    def engine(self) -> Connection:
        return Connection(
            self.node,
            peer=("192.0.2.1", 40000),
            local=("192.0.2.9", 3260),
            now=self.now,
            on_dirty=self.dirty.append,
        )

    def client(self, *, step: int = 1 << 30, target: str | None = TARGET, **kwargs: str) -> Client:
        """An initiator that has not logged in."""
        transport = EngineTransport(self.engine(), clock=lambda: self.now, step=step)
        return Client(transport, target=target, **kwargs)

    def logged_in(self, *, step: int = 1 << 30, **overrides: str) -> Client:
        """An initiator in full feature phase, its unit attentions taken; keys as overrides."""
        client = self.client(step=step)
        client.login(overrides=overrides)
        for lun in range(len(self.devices)):
            client.clear_attention(lun)
        return client

    def pass_time(self, client: Client, seconds: float) -> None:
        """Let the clock go on and the engine look at it, second by second."""
        engine = engine_of(client)
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + 1.0, end)
            engine.on_timeout(self.now)


def engine_of(client: Client) -> Connection:
    transport = client.transport
    assert isinstance(transport, EngineTransport)
    assert isinstance(transport.engine, Connection)
    return transport.engine


def quiet(client: Client) -> bool:
    """Whether the target has nothing to say."""
    return not client._inbox and not engine_of(client).data_to_send()
