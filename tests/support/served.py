"""A device over a real image with an engine around it, for tests of devices and recovery."""

from __future__ import annotations

import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from ploopd.device_table import DeviceTable
from ploopd.devices import Device, DeviceOptions, Environment
from ploopd.errors import StorageError
from ploopd.fileio.oslayer import REAL, OsLayer
from ploopd.gate.events import Event
from ploopd.storage.device import Pending
from scst_shim import StandbyCheck
from tests.support.volumes import running_engine

DEADLINE = 30.0


@dataclass(eq=False)
class Served:
    """A table of devices in an event loop of their own, with the events they reported."""

    table: DeviceTable
    events: list[Event] = field(default_factory=list)

    async def add(self, path: Path, options: DeviceOptions | None = None) -> Device:
        device = await self.table.add(str(path), options)
        device.bind()
        return device


@asynccontextmanager
async def serving(layer: OsLayer = REAL) -> AsyncIterator[Served]:
    """Devices can be added; what is left is closed at the end."""
    check = StandbyCheck()
    check.enable()
    async with running_engine() as engine, trio.open_nursery() as nursery:
        env = Environment(engine=engine, buffers=engine.buffers, check=check, layer=layer)
        table = DeviceTable(env)
        await nursery.start(table.run)
        served = Served(table)
        env.events.subscribe(served.events.append)
        try:
            yield served
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(DEADLINE):
                await table.close()
            nursery.cancel_scope.cancel()


async def call(device: Device, operation: str, *arguments: object, **options: object) -> None:
    """One slow operation through the gate; raises what `done` is given."""
    ended = trio.Event()
    results: list[StorageError | None] = []

    def done(error: StorageError | None) -> None:
        results.append(error)
        ended.set()

    method = getattr(device.gate, operation)
    pending: Pending = method(*arguments, done, **options)
    assert pending is not None
    device.gate.kick()
    with trio.fail_after(DEADLINE):
        await ended.wait()
    assert len(results) == 1
    if results[0] is not None:
        raise results[0]


async def write(device: Device, offset: int, data: bytes, *, inline: bool = True) -> None:
    view = memoryview(data)
    if not (inline and device.gate.try_write(offset, view)):
        await call(device, "write", offset, view)


async def read(device: Device, offset: int, length: int, *, inline: bool = True) -> bytes:
    view = memoryview(bytearray(length))
    if not (inline and device.gate.try_read(offset, view)):
        await call(device, "read", offset, view)
    return bytes(view)


async def flush(device: Device) -> None:
    await call(device, "flush")


async def quiet(device: Device) -> None:
    """Until the device is in standby and nothing is in execution."""
    with trio.fail_after(DEADLINE):
        while (  # noqa: ASYNC110 - a counter that nobody announces
            device.gate.standby_text != "on" or device.gate.executing_count
        ):
            await trio.sleep(0.005)


class VerifiedLoad:
    """Writers on stripes of their own that check all they read; the content is known at the end."""

    BLOCK = 4096

    def __init__(self, device: Device, *, seed: int = 1, depth: int = 16) -> None:
        self.device = device
        self.content = bytearray(device.size)
        self.random = random.Random(seed)
        self.depth = depth
        self.operations = 0
        self.stop = False

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for stripe in range(self.depth):
                nursery.start_soon(self._stripe, stripe)

    async def _stripe(self, stripe: int) -> None:
        blocks = range(stripe, self.device.size // self.BLOCK, self.depth)
        while not self.stop:
            offset = self.random.choice(blocks) * self.BLOCK
            end = offset + self.BLOCK
            choice = self.random.random()
            if choice < 0.6:
                data = self.random.randbytes(self.BLOCK)
                await write(self.device, offset, data, inline=choice < 0.3)
                self.content[offset:end] = data
            elif choice < 0.95:
                found = await read(self.device, offset, self.BLOCK, inline=choice < 0.8)
                assert found == self.content[offset:end], f"block at {offset} differs"
            else:
                await flush(self.device)
            self.operations += 1
            await trio.lowlevel.checkpoint()

    async def verify(self) -> None:
        """The whole disk, through the gate."""
        step = 1 << 18
        for offset in range(0, self.device.size, step):
            found = await read(self.device, offset, min(step, self.device.size - offset))
            assert found == self.content[offset : offset + len(found)], f"differs after {offset}"


def copy_of(path: Path) -> Path:
    """A copy beside it."""
    copy = path.with_name(f"copy-of-{path.name}")
    shutil.copyfile(path, copy)
    return copy
