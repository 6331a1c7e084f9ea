"""A real gate over a storage that fails on demand, scripted files, and its automatic recovery."""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import trio
import trio.testing

from ploopd.control.automation import Automation, DeviceFiles, Recoverer, RecoveryPolicy
from ploopd.control.hook import HookResult
from ploopd.control.verification import Fingerprint
from ploopd.devices import Device
from ploopd.errors import PloopError, StorageError
from ploopd.gate.events import Event, EventBus, EventKind
from ploopd.gate.filter import Gate
from scst_shim import QueueFlags, StandbyCheck
from tests.support.memory_device import MemoryDevice

SIZE = 1 << 20


class NoJitter(random.Random):
    """The middle of every range."""

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


class Files:
    """What each file answers; records what is asked at which second."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.verdicts: dict[str, PloopError | None] = {}
        self.failures: dict[str, PloopError] = {}
        self.prints: dict[str, Fingerprint] = {}
        self.asked: list[tuple[float, str, str]] = []
        self.seconds = 0.0
        self.closed_by_us: list[bool] = []

    def _log(self, what: str, path: str) -> None:
        self.asked.append((round(trio.current_time() - self.rig.began, 3), what, path))

    async def fingerprint(self, path: str) -> Fingerprint | None:
        await trio.lowlevel.checkpoint()
        return self.prints.get(path, (1, 1, 1, 1))

    async def verify(self, path: str, *, closed_by_us: bool) -> None:
        self._log("verify", path)
        self.closed_by_us.append(closed_by_us)
        await trio.lowlevel.checkpoint()
        verdict = self.verdicts.get(path)
        if verdict is not None:
            raise verdict

    async def replace(self, path: str) -> None:
        self._log("replace", path)
        gate, device = self.rig.gate, self.rig.device
        device.replacing = True
        gate.begin_recovery()
        gate.report(EventKind.REPLACE_STARTED, image=path)
        finished = False
        try:
            await trio.sleep(self.seconds)
            device.volume_open = False
            if path in self.failures:
                raise self.failures[path]
            finished = True
        finally:
            device.replacing = False
            if not finished:
                gate.fail_recovery(PloopError("did not work"))
        device.volume_open = True
        device.volume.layers[0].path = path
        gate.leave_standby()


class Rig:
    """A device whose storage fails on demand, and its recoverer."""

    def __init__(self, policy: RecoveryPolicy) -> None:
        self.began = trio.current_time()
        self.bus = EventBus()
        self.events: list[Event] = []
        self.bus.subscribe(self.events.append)
        check = StandbyCheck()
        check.enable()
        self.gate = Gate(
            MemoryDevice(SIZE),
            name="disk",
            fuses=QueueFlags("disk", check, warn=lambda _: None),
            clock=trio.current_time,
            on_event=self.bus.publish,
        )
        self.gate.bind()
        self.device = SimpleNamespace(
            name="disk",
            gate=self.gate,
            env=SimpleNamespace(events=self.bus),
            replacing=False,
            volume_open=True,
            has_descriptor=False,
            volume=SimpleNamespace(layers=[SimpleNamespace(level=0, path="/a")]),
        )
        self.files = Files(self)
        self.hooks: list[tuple[float, Mapping[str, str]]] = []
        self.hook_seconds = 0.0
        self.hook_stopped = 0
        device = cast(Device, self.device)
        files = cast(DeviceFiles, self.files)
        control = Path("/run/c.sock")
        self.recoverer = Recoverer(device, policy, control, NoJitter(), self.hook, files)
        self.automation = Automation(control)
        self.automation._recoverers["disk"] = self.recoverer

    async def hook(
        self, command: Sequence[str], variables: Mapping[str, str], limit: float
    ) -> HookResult:
        self.hooks.append((round(trio.current_time() - self.began, 3), dict(variables)))
        try:
            await trio.sleep(self.hook_seconds)
        except trio.Cancelled:
            self.hook_stopped += 1
            raise
        return HookResult(status=3, elapsed=0.0, stderr="no luck", timed_out=False)

    def fail(self) -> None:
        self.gate.judge(StorageError(errno.EIO, "write", path="/a", offset=4096))

    def operator(self) -> object:
        return self.automation.operator(cast(Device, self.device))

    def hold(self) -> None:
        """What `standby enter` does."""
        self.gate.enter_standby("entered by ploopctl")
        self.automation.hold(cast(Device, self.device))

    def kinds(self) -> list[EventKind]:
        return [event.kind for event in self.events]


@asynccontextmanager
async def rig(**policy: object) -> AsyncIterator[Rig]:
    made = Rig(RecoveryPolicy(**{"mode": "reopen", **policy}))  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.recoverer.run)
        await trio.testing.wait_all_tasks_blocked()
        yield made
        nursery.cancel_scope.cancel()
