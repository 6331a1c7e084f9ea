"""One target, one unit, commands in one line: what the tests of this package share."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from ploopd.scsi.logical_unit import LogicalUnit
from ploopd.scsi.nexus import Nexus
from ploopd.scsi.target import Target
from ploopd.scsi.task import Task
from ploopd.scsi.task_management import TaskFunction, TmfResult
from tests.support.memory_device import Completion, MemoryDevice

IDENTITY = uuid.UUID("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
INITIATOR = "iqn.2026-11.org.example:host,i,0x00023d000001"
TARGET = "iqn.2026-11.org.example:disk"
PORT = f"{TARGET},t,0x0001"
BLOCK = 512


class TestBuffer:
    """Plain memory that knows whether it was given back."""

    __test__ = False

    def __init__(self, pool: TestBuffers, length: int) -> None:
        self.view = memoryview(bytearray(b"\xee" * length))
        self._pool = pool

    def release(self) -> None:
        self._pool.out.remove(self)


class TestBuffers:
    """A pool that counts: `out` is empty when everything was released."""

    __test__ = False

    def __init__(self) -> None:
        self.out: list[TestBuffer] = []
        self.largest = 0

    def take(self, length: int) -> TestBuffer:
        buffer = TestBuffer(self, length)
        self.largest = max(self.largest, length)
        self.out.append(buffer)
        return buffer


class ManualClock:
    """A clock that moves only when told, or by `step` at each look."""

    def __init__(self, step: float = 0.0) -> None:
        self.now = 0.0
        self.step = step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def cdb(text: str) -> bytes:
    """A CDB from hexadecimal digits, padded to 16 bytes."""
    return bytes.fromhex(text).ljust(16, b"\0")


def cdb10(opcode: int, lba: int, blocks: int, *, flags: int = 0, group: int = 0) -> bytes:
    return struct.pack(">BBIBHB", opcode, flags, lba, group, blocks, 0).ljust(16, b"\0")


def cdb12(opcode: int, lba: int, blocks: int, *, flags: int = 0) -> bytes:
    return struct.pack(">BBIIBB", opcode, flags, lba, blocks, 0, 0).ljust(16, b"\0")


def cdb16(opcode: int, lba: int, blocks: int, *, flags: int = 0) -> bytes:
    return struct.pack(">BBQIBB", opcode, flags, lba, blocks, 0, 0)


def caw(lba: int, blocks: int, *, flags: int = 0) -> bytes:
    return struct.pack(">BBQ3xBBB", 0x89, flags, lba, blocks, 0, 0)


@dataclass
class Answer:
    """How a command ended; `data` is a copy of its data-in."""

    task: Task
    data: bytes = b""
    prepared: bool = True

    @property
    def status(self) -> int:
        return self.task.status

    @property
    def key(self) -> int:
        return self.task.sense[2] & 0xF if self.task.sense[0] & 0x7E == 0x70 else -1

    @property
    def asc(self) -> int:
        return self.task.sense[12] << 8 | self.task.sense[13]

    @property
    def sense(self) -> tuple[int, int]:
        """(sense key, ASC and ASCQ) of fixed format sense data."""
        assert self.status == 0x02, f"status {self.status:#x}"
        assert self.task.sense[0] & 0x7F == 0x70
        return self.task.sense[2], self.asc

    @property
    def pointer(self) -> tuple[int, int | None]:
        """(byte, bit) of the field pointer; the bit is None if not given."""
        first, byte = struct.unpack_from(">BH", self.task.sense, 15)
        assert first & 0x80, "no field pointer"
        return byte, first & 7 if first & 8 else None

    @property
    def information(self) -> int | None:
        valid = self.task.sense[0] & 0x80
        return int.from_bytes(self.task.sense[3:7], "big") if valid else None


@dataclass
class Initiator:
    """One I_T nexus with synchronous commands on one LUN."""

    nexus: Nexus
    lun: int = 0
    tag: int = 0
    finished: list[Task] = field(default_factory=list)
    aborted: list[Task] = field(default_factory=list)

    def start(
        self,
        command: bytes,
        data: bytes = b"",
        *,
        attribute: int = 1,
        expected: int | None = None,
        lun: int | None = None,
    ) -> Task:
        """Send a command; its end is seen in `finished`."""
        self.tag += 1
        task = Task(
            tag=self.tag,
            lun=(self.lun if lun is None else lun) << 48,
            cdb=command,
            on_complete=self.finished.append,
            on_aborted=self.aborted.append,
            attribute=attribute,
            expected_out=expected,
        )
        if self.nexus.prepare(task):
            task.data_out = memoryview(bytes(data))
            self.nexus.execute(task)
            self.nexus.kick()
        return task

    def send(
        self,
        command: bytes,
        data: bytes = b"",
        *,
        expected: int | None = None,
        lun: int | None = None,
    ) -> Answer:
        """Send a command that ends at once."""
        task = self.start(command, data, expected=expected, lun=lun)
        assert self.finished[-1:] == [task], f"not finished: {task.state}"
        assert self.finished.count(task) == 1
        answer = Answer(task, bytes(task.data_in))
        task.release()
        return answer

    def good(self, command: bytes, data: bytes = b"", *, expected: int | None = None) -> bytes:
        """Send a command that must end with GOOD; its data-in."""
        answer = self.send(command, data, expected=expected)
        assert answer.status == 0, answer.task.sense.hex(" ")
        return answer.data

    def manage(
        self, function: TaskFunction, tag: int | None = None, lun: int | None = None
    ) -> list[TmfResult]:
        """Send a task management function; the list gets its answer."""
        answers: list[TmfResult] = []
        field = (self.lun if lun is None else lun) << 48
        self.nexus.task_management(function, field, tag, answers.append)
        return answers


@dataclass
class Bench:
    """A target with one thin unit of `size` bytes over a MemoryDevice."""

    device: MemoryDevice
    buffers: TestBuffers
    unit: LogicalUnit
    target: Target

    def login(self, name: str = INITIATOR, port: str = PORT, *, settle: bool = True) -> Initiator:
        """A new nexus; with `settle` its power-on unit attention is out of the way."""
        initiator = Initiator(self.target.open_nexus(name, port))
        if settle:
            assert initiator.send(cdb("00")).sense == (6, 0x2900)
        return initiator


def make_bench(
    size: int = 4 << 20,
    *,
    cluster_size: int = 1 << 20,
    completion: Completion = Completion.AT_ONCE,
    thin: bool = True,
    read_only: bool = False,
    write_cache: bool = True,
    clock: Callable[[], float] | None = None,
    defer: Callable[[Callable[[], object]], object] | None = None,
) -> Bench:
    device = MemoryDevice(
        size, cluster_size=cluster_size, completion=completion, cancellable=True, thin=thin
    )
    buffers = TestBuffers()
    unit = LogicalUnit(
        device,
        identity=IDENTITY,
        buffers=buffers,
        clock=clock if clock is not None else ManualClock(),
        thin=thin,
        read_only=read_only,
        write_cache=write_cache,
        defer=defer,
    )
    target = Target(TARGET)
    target.add_unit(0, unit)
    return Bench(device, buffers, unit, target)
