"""SCSI tasks in standby: a real logical unit over a real gate over a device that fails, with task
management, lost sessions, expiry and replaces at every moment.

What is demanded: every task ends once, with GOOD, BUSY, a unit attention or a miscompare, or is
aborted; a function is answered at once unless something is being executed, and then with that; what
was aborted or answered BUSY is never written afterwards; no task and no buffer is left over.
"""

from __future__ import annotations

import errno
import struct
from functools import partial

from ploopd.gate.filter import Gate
from ploopd.gate.limits import ParkLimits
from ploopd.gate.state import GateState
from ploopd.scsi.logical_unit import LogicalUnit
from ploopd.scsi.nexus import Nexus
from ploopd.scsi.target import Target
from ploopd.scsi.task import Status, Task
from ploopd.scsi.task_management import TaskFunction, TmfResult
from scst_shim import QueueFlags, StandbyCheck
from tests.support.memory_device import Completion, MemoryDevice
from tests.support.virtual.choices import Below
from tests.unit.scsi.harness import IDENTITY, PORT, TARGET, TestBuffers, caw, cdb, cdb10, cdb16

BLOCK = 512
BLOCKS = 16
SIZE = 64 << 10
FUNCTIONS = (
    TaskFunction.ABORT_TASK,
    TaskFunction.ABORT_TASK_SET,
    TaskFunction.CLEAR_TASK_SET,
    TaskFunction.LOGICAL_UNIT_RESET,
    TaskFunction.TARGET_WARM_RESET,
    TaskFunction.I_T_NEXUS_RESET,
)
ERRNOS = (errno.EIO, errno.EBUSY, errno.ENOTCONN)
ALLOWED_KEYS = (0x06, 0x0E)
"""UNIT ATTENTION, MISCOMPARE."""


class Stage(MemoryDevice):
    """Refuses data of commands that are over."""

    dead: set[int]

    def _apply(
        self, op: str, offset: int, length: int, buffer: memoryview | None, unmap: bool
    ) -> None:
        if op == "write" and buffer is not None:
            assert buffer[0] not in self.dead, f"command {buffer[0]} was written after its end"
        super()._apply(op, offset, length, buffer, unmap)


class Session:
    """One I_T nexus and its tasks."""

    def __init__(self, number: int, nexus: Nexus) -> None:
        self.number = number
        self.nexus = nexus
        self.open: dict[int, Task] = {}


class TaskEpisode:
    """See the module's first lines; `play` raises AssertionError."""

    def __init__(self, below: Below) -> None:
        self.below = below
        self.now = 0.0
        self.number = 0
        self.dead: set[int] = set()
        self.ended: dict[int, str] = {}
        self.waiting: list[list[TmfResult]] = []
        self.statuses: dict[int, int] = {}
        self.buffers = TestBuffers()
        check = StandbyCheck()
        check.enable()
        self.device = self.stage(None)
        self.gate = Gate(
            self.device,
            name="disk",
            fuses=QueueFlags("disk", check),
            clock=self.clock,
            on_event=lambda _: None,
            limits=ParkLimits(max_requests=(1000, 5)[below(2)]),
        )
        self.gate.bind()
        self.unit = LogicalUnit(
            self.gate, identity=IDENTITY, buffers=self.buffers, clock=self.clock
        )
        self.target = Target(TARGET)
        self.target.add_unit(0, self.unit)
        self.sessions = [self.login(number) for number in range(2)]
        self.gone: list[Session] = []
        self.actions = (
            *[self.complete] * 8,
            *[self.submit] * 9,
            *[self.fail] * 2,
            *[self.manage] * 2,
            *[self.recover] * 2,
            self.wait,
            self.lose_session,
        )

    def clock(self) -> float:
        return self.now

    def stage(self, old: MemoryDevice | None) -> Stage:
        data = bytearray(SIZE) if old is None else bytearray(old.data)
        modes = self.below(4)
        device = Stage(
            SIZE,
            cluster_size=16 << 10,
            completion=Completion.MANUAL,
            inline=bool(modes & 1),
            cancellable=bool(modes & 2),
            data=data,
        )
        device.dead = self.dead
        return device

    def login(self, number: int) -> Session:
        return Session(number, self.target.open_nexus(f"iqn.2026-11.org.example:{number}", PORT))

    # -- the play --------------------------------------------------------------------------

    def play(self) -> None:
        below, actions = self.below, self.actions
        for _ in range(20 + below(40)):
            actions[below(len(actions))]()
        for _ in range(400):
            self.device.heal()
            if self.gate.state is not GateState.ACTIVE:
                self.replace(disown=False)
            elif not self.device.complete(1):
                break
        assert not self.gate.parked_count, "parked for ever"
        for session in (*self.sessions, *self.gone):
            assert not session.open, f"left over: {session.open}"
            assert not session.nexus.tasks
        assert len(self.unit.tasks) == 0
        assert self.buffers.out == [], "a buffer was not given back"
        assert all(self.waiting), "a function was never answered"
        assert len(self.ended) == self.number

    # -- initiators ------------------------------------------------------------------------

    def submit(self) -> None:
        if self.number >= 250:
            return
        session = self.sessions[self.below(2)]
        self.number += 1
        number = self.number
        command, data = self.command(number)
        task = Task(
            tag=number,
            lun=0,
            cdb=command,
            on_complete=partial(self.completed, session),
            on_aborted=partial(self.aborted, session),
            attribute=(1, 1, 1, 1, 2, 3)[self.below(6)],
        )
        session.open[number] = task
        if session.nexus.prepare(task):
            task.data_out = memoryview(data)
            session.nexus.execute(task)
            session.nexus.kick()

    def command(self, number: int) -> tuple[bytes, bytes]:
        """A CDB and its data, all of whose bytes are the command's number."""
        blocks = 1 + self.below(3)
        lba = self.below(BLOCKS - blocks)
        data = bytes([number]) * (blocks * BLOCK)
        match self.below(11):
            case 0 | 1 | 2:
                return cdb10(0x2A, lba, blocks, flags=8 * self.below(2)), data
            case 3 | 4:
                return cdb10(0x28, lba, blocks), b""
            case 5:
                return cdb10(0x35, 0, 0), b""
            case 6:
                return cdb16(0x93, lba, blocks), data[:BLOCK]
            case 7:
                descriptors = struct.pack(">QI4xQI4x", lba, blocks, 0, 1)
                unmap = struct.pack(">HH4x", 6 + len(descriptors), len(descriptors)) + descriptors
                return cdb(f"420000000000 00{len(unmap):04x}00"), unmap
            case 8:
                expected = bytes(self.gate_data(lba))
                return caw(lba, 1), expected + data[:BLOCK]
            case 9:
                return cdb10(0x2E, lba, blocks), data
            case _:
                return cdb("00"), b""

    def gate_data(self, lba: int) -> bytearray:
        return self.device.data[lba * BLOCK : (lba + 1) * BLOCK]

    def completed(self, session: Session, task: Task) -> None:
        self.over(session, task, "completed")
        self.statuses[task.status] = self.statuses.get(task.status, 0) + 1
        if task.status == Status.CHECK_CONDITION:
            assert task.sense[2] & 0xF in ALLOWED_KEYS, f"{task.cdb.hex()}: {task.sense.hex()}"
        else:
            assert task.status in (Status.GOOD, Status.BUSY), f"{task.cdb.hex()}: {task.status}"
        if task.status != Status.GOOD:
            self.dead.add(task.tag)
        task.release()

    def aborted(self, session: Session, task: Task) -> None:
        self.over(session, task, "aborted")
        self.dead.add(task.tag)

    def over(self, session: Session, task: Task, how: str) -> None:
        assert task.tag not in self.ended, f"{task.tag} has {self.ended[task.tag]} and {how}"
        self.ended[task.tag] = how
        del session.open[task.tag]

    def manage(self) -> None:
        """A task management function; at once if nothing is in execution."""
        session = self.sessions[self.below(2)]
        function = FUNCTIONS[self.below(len(FUNCTIONS))]
        tags = list(session.open)
        tag = tags[self.below(len(tags))] if tags else None
        answers: list[TmfResult] = []
        self.waiting.append(answers)
        session.nexus.task_management(function, 0, tag, answers.append)
        session.nexus.kick()
        assert len(answers) == 1 or self.device.outstanding, f"{function.name} waits for nothing"

    def lose_session(self) -> None:
        """A connection drops; the initiator logs in again."""
        index = self.below(2)
        session = self.sessions[index]
        answers: list[TmfResult] = []
        self.waiting.append(answers)
        session.nexus.close(lambda: answers.append(TmfResult.COMPLETE))
        assert answers or self.device.outstanding, "a lost session waits for nothing"
        assert not (answers and session.open), "tasks outlive their session"
        self.gone.append(session)
        self.sessions[index] = self.login(session.number)

    # -- storage, clock, operator ----------------------------------------------------------

    def complete(self) -> None:
        count = len(self.device.outstanding)
        if count:
            self.device.complete(1, index=self.below(count))

    def fail(self) -> None:
        count = len(self.device.outstanding)
        if count:
            fault = (None, ERRNOS[self.below(3)])
            self.device.fail(*fault, applied=self.below(2) == 1)
            self.device.complete(1, index=self.below(count))
            self.device.heal()
            assert self.gate.state is not GateState.ACTIVE

    def wait(self) -> None:
        self.now += (1.0, 25.0)[self.below(2)]
        self.gate.expire(self.now)

    def recover(self) -> None:
        choice = self.below(6)
        if self.gate.state is GateState.STANDBY:
            self.replace(disown=choice > 2)
        elif choice == 5:
            self.gate.enter_standby("test")

    def replace(self, *, disown: bool) -> None:
        gate = self.gate
        gate.begin_recovery()
        while self.device.outstanding and not disown:
            self.device.complete(1)
        gate.disown()
        self.device = self.stage(self.device)
        gate.swap(self.device)
        gate.leave_standby()
