"""A kernel made of files and memory, and a daemon around the server."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from ploopd.errors import BusyError, NotFoundError, PloopError, UsageError
from ploopd.frontends.tcmu.attachment import Served
from ploopd.frontends.tcmu.names import Reference
from ploopd.frontends.tcmu.server import TcmuServer
from ploopd.frontends.tcmu.uio import Kernel, SharedMemory, UioDevice
from ploopd.scsi.logical_unit import LogicalUnit
from tests.support.fake_tcmu import FakeKernel
from tests.unit.scsi.harness import Bench, cdb10

SIZE = 16 << 20
READ = cdb10(0x28, 0, 8)[:10]


class Wakeable:
    """/dev/uioN of a FakeKernel: one end of a socket pair wakes the handler, the other counts."""

    def __init__(self, fake: FakeKernel) -> None:
        self.fake = fake
        self.kernel_end, self.end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.end.setblocking(False)
        self.kernel_end.setblocking(False)
        self.closed = False
        self.gone = False

    def fileno(self) -> int:
        return self.end.fileno()

    def view(self) -> memoryview:
        return memoryview(self.fake.memory)

    def acknowledge(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            self.gone = self.gone or self.end.recv(4) == b"gone"
        if self.gone:
            self.kernel_end.send(b"\1\0\0\0")  # POLLHUP stays
        return not self.gone

    def tell(self) -> None:
        self.end.send(b"\0\0\0\0")

    def tells(self) -> int:
        """How often the kernel was told since the last call."""
        count = 0
        with contextlib.suppress(BlockingIOError):
            while self.kernel_end.recv(4):
                count += 1
        return count

    def close(self) -> None:
        self.closed = True
        self.end.close()


class Machine(Kernel):
    """Files below `root` like /sys; devices are FakeKernels."""

    def __init__(self, root: Path) -> None:
        super().__init__(sys=root, boot_id_file=root / "boot_id")
        self.fakes: dict[int, FakeKernel] = {}
        self.files: list[Wakeable] = []
        self.taken: set[int] = set()
        (root / "boot_id").write_text("boot-1\n")

    def add(self, minor: int, config: str = "disk", *, size: int = SIZE) -> FakeKernel:
        entry = self.sys / f"class/uio/uio{minor}"
        entry.mkdir(parents=True)
        (entry / "name").write_text(f"tcm-user/0/b{minor}/ploop/{config}\n")
        directory = self.sys / f"kernel/config/target/core/user_0/b{minor}"
        for group in ("attrib", "action"):
            (directory / group).mkdir(parents=True)
        for name, value in (
            ("enable", 1),
            ("attrib/dev_size", size),
            ("attrib/cmd_time_out", 30),
            ("attrib/tmr_notification", 0),
            ("attrib/nl_reply_supported", -1),
            ("attrib/emulate_write_cache", 0),
            ("action/block_dev", ""),
            ("action/reset_ring", ""),
        ):
            (directory / name).write_text(f"{value}\n")
        self.fakes[minor] = fake = FakeKernel()
        return fake

    def value(self, minor: int, name: str) -> str:
        path = self.sys / f"kernel/config/target/core/user_0/b{minor}" / name
        return path.read_text().split("\n")[0]

    def set(self, minor: int, name: str, value: int) -> None:
        path = self.sys / f"kernel/config/target/core/user_0/b{minor}" / name
        path.write_text(f"{value}\n")

    def remove(self, minor: int) -> None:
        entry = self.sys / f"class/uio/uio{minor}"
        (entry / "name").unlink()
        entry.rmdir()

    def open(self, device: UioDevice) -> SharedMemory:
        if device.minor in self.taken:
            raise BusyError("is open in another process", path=f"/dev/uio{device.minor}")
        assert self.made(device), "the kernel may free this memory"
        file = Wakeable(self.fakes[device.minor])
        self.files.append(file)
        return file

    def action(self, device: UioDevice, name: str, value: int) -> bool:
        if name == "reset_ring":
            fake = self.fakes[device.minor]
            fake.outstanding.clear()
            fake.head = fake.words[16] = fake.harvested = 0
        return super().action(device, name, value)


@dataclass
class Disk:
    """What the server sees of a device."""

    name: str
    bench: Bench
    bound: int = 0
    parking: bool = False
    problem: PloopError | None = None
    resized: trio.Event = field(default_factory=trio.Event)

    @property
    def size(self) -> int:
        return self.bench.device.size

    @property
    def unit(self) -> LogicalUnit:
        return self.bench.unit

    def bind(self) -> None:
        self.bound += 1

    def unbind(self) -> None:
        self.bound -= 1

    async def grow(self, size: int) -> None:
        await trio.lowlevel.checkpoint()
        if self.problem is not None:
            raise self.problem
        self.resize(size)

    async def wait_resized(self) -> None:
        await self.resized.wait()

    def resize(self, size: int) -> None:
        """Also by somebody else."""
        self.bench.device.size = size
        self.unit.capacity_changed()
        self.resized.set()
        self.resized = trio.Event()


@dataclass
class Daemon:
    """Devices by name; remembers who asked for what."""

    disks: dict[str, Disk] = field(default_factory=dict)
    released: list[str] = field(default_factory=list)
    problem: PloopError | None = None

    async def acquire(self, reference: Reference) -> Served:
        if self.problem is not None:
            raise self.problem
        try:
            return self.disks[str(reference)]
        except KeyError:
            raise NotFoundError("no such device", field="device", value=str(reference)) from None

    async def release(self, device: Served) -> None:
        self.released.append(device.name)

    async def change_medium(self, device: Served, reference: Reference) -> None:
        raise UsageError("not here")


@dataclass
class Rig:
    machine: Machine
    daemon: Daemon
    state: Path
    nursery: trio.Nursery
    server: TcmuServer

    def restart(self) -> None:
        self.server = TcmuServer(self.daemon, self.state, kernel=self.machine)

    @property
    def disk(self) -> Disk:
        return self.daemon.disks["disk"]

    @property
    def file(self) -> Wakeable:
        return self.machine.files[-1]

    async def until(self, condition: Callable[[], object], seconds: float = 30) -> None:
        with trio.fail_after(seconds):
            while not condition():  # noqa: ASYNC110 (it watches files and memory)
                await trio.sleep(0.2)
