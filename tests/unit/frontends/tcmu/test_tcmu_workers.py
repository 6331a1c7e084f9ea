"""The kernel may never come back from an access to its configuration: the loop makes none."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from ploopd.errors import PloopError
from ploopd.frontends.tcmu.server import TcmuServer
from ploopd.frontends.tcmu.uio import Kernel
from tests.unit.frontends.tcmu.rig import SIZE, Daemon, Disk, Machine, Rig
from tests.unit.scsi.harness import make_bench

ACCESSES = frozenset(
    name
    for name, value in vars(Kernel).items()
    if callable(value) and not name.startswith("_") and name not in ("boot_id", "directory")
)

pytestmark = pytest.mark.trio


class Watched(Machine):
    """Notes who was in it in the loop's thread; of `stuck` nobody comes back before `let_go`."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.used: set[str] = set()
        self.in_the_loop: set[str] = set()
        self.stuck = ""
        self.let_go = threading.Event()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return self.watched(name, found) if name in ACCESSES else found

    def watched(self, name: str, access: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            self.used.add(name)
            if threading.current_thread() is threading.main_thread():
                self.in_the_loop.add(name)
            elif name == self.stuck:
                self.let_go.wait(30)
            return access(*arguments)

        return call


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    machine = Watched(tmp_path)
    daemon = Daemon({"disk": Disk("disk", make_bench(SIZE))})
    async with trio.open_nursery() as nursery:
        state = tmp_path / "state"
        yield Rig(machine, daemon, state, nursery, TcmuServer(daemon, state, kernel=machine))
        nursery.cancel_scope.cancel()
    machine.let_go.set()


async def test_every_access_is_in_a_worker(rig: Rig, clock: trio.testing.MockClock) -> None:
    machine = rig.machine
    assert isinstance(machine, Watched)
    rig.machine.add(1).command(b"\x28" + bytes(9))  # of a handler that died: a reset
    rig.machine.add(2, size=SIZE * 2)  # refused
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.disk.bound)
    await trio.sleep(5)  # refusals, a second look, the write cache
    await rig.server.shutdown(5)
    assert {"devices", "open", "attribute", "set_attribute", "action"} <= machine.used
    assert machine.in_the_loop == set()


@pytest.mark.parametrize(
    ("access", "what"),
    [
        ("attribute", "the kernel's configuration of b1 (uio1)"),
        ("open", "opening the kernel's device b1 (uio1)"),
        ("action", "the kernel's configuration of b1 (uio1)"),
    ],
)
async def test_what_does_not_come_back_is_told_and_tried_again(
    access: str, what: str, rig: Rig, clock: trio.testing.MockClock
) -> None:
    machine = rig.machine
    assert isinstance(machine, Watched)
    machine.stuck = access
    rig.machine.add(1)
    await rig.nursery.start(rig.server.serve)
    with pytest.raises(PloopError) as told:
        await rig.server.wait_attached("b1", 60)
    assert str(told.value) == f"{what} took longer than 10 s"
    machine.stuck = ""
    machine.let_go.set()
    await rig.until(lambda: rig.disk.bound, 60)
    assert rig.server.failure("b1") is None


async def test_looking_for_devices_goes_on_after_one_look_that_hangs(
    rig: Rig, clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    machine = rig.machine
    assert isinstance(machine, Watched)
    machine.stuck = "devices"
    rig.machine.add(1)
    await rig.nursery.start(rig.server.serve)
    assert "looking for the kernel's devices took longer than 10 s" in caplog.text
    machine.stuck = ""
    machine.let_go.set()
    await rig.until(lambda: rig.disk.bound, 60)
