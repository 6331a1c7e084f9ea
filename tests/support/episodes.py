"""Standby episodes in virtual time: random clients, storage, faults and operators, with a model.

The model knows when each command was issued, begun by a device and answered.  It demands: one
answer per command (none after a successful cancel); no error but BUSY and aborts; nothing begun
after the answer or a cancel; changes that overlap, and released commands that conflict, run one
after the other in their original order; and every block read, or left at the end, holds a value
that some order of the commands explains.
"""

from __future__ import annotations

import errno
import importlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import trio
import trio.testing

from ploopd.errors import BusyError, ParkTimeoutError, StorageError
from ploopd.gate.events import Event
from ploopd.gate.filter import Gate
from ploopd.gate.limits import ParkLimits
from ploopd.gate.parking import Attempt
from ploopd.gate.state import GateState
from ploopd.storage.device import Done
from scst_shim import QueueFlags, StandbyCheck
from tests.support.memory_device import Completion, MemoryDevice, Operation

BLOCK = 512
BLOCKS = 12
NEVER = 1 << 60
CHANGES = ("write", "write_zeroes", "discard")


@dataclass(eq=False, slots=True)
class Command:
    """One command: blocks [first, first + count); `value` is what it writes, 0 for zeros.

    `issued` and `ended` (answered or cancelled) are ticks of the model's clock.  `begun`: some
    device has begun it.
    """

    number: int
    op: str
    first: int
    count: int
    value: int
    issued: int
    buffer: bytearray = field(repr=False)
    ended: int = NEVER
    answers: int = 0
    error: StorageError | None = None
    cancelled: bool = False
    begun: bool = False
    running: bool = False

    def conflicts(self, other: Command) -> bool:
        if "flush" in (self.op, other.op):
            return self.op in CHANGES or other.op in CHANGES
        apart = self.first + self.count <= other.first or other.first + other.count <= self.first
        return not apart and (self.op in CHANGES or other.op in CHANGES)

    def changes(self, block: int) -> bool:
        return self.op in CHANGES and self.first <= block < self.first + self.count


class WatchedDevice(MemoryDevice):
    """Tells the episode which command begins and ends; a command is known by its completion."""

    episode: Episode

    def _start(
        self,
        op: str,
        offset: int,
        length: int,
        buffer: memoryview | None,
        done: Done,
        *,
        fua: bool = False,
        unmap: bool = False,
    ) -> Operation:
        attempt = done.__self__  # type: ignore[attr-defined]
        assert isinstance(attempt, Attempt)
        answer = attempt.request.done
        assert isinstance(answer, partial)
        command: Command = answer.args[0]
        self.episode.begin(command)

        def finished(error: StorageError | None) -> None:
            if not attempt.void:
                command.running = False
            done(error)

        return super()._start(op, offset, length, buffer, finished, fua=fua, unmap=unmap)


class Episode:
    """One random story; `run` raises AssertionError where the model is contradicted."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.tick = 0
        self.commands: list[Command] = []
        self.pending: dict[Command, object] = {}
        self.events: list[Event] = []
        self.hung: list[Operation] = []
        self.disowned = False
        self.released: set[Command] = set()
        self.devices: list[WatchedDevice] = []
        check = StandbyCheck()
        check.enable()
        limits = ParkLimits(
            max_requests=self.random.choice([10_000, 10_000, 10_000, 6]),
            park_max=self.random.choice([None, 20.0, 20.0, 3.0]),
        )
        self.gate = Gate(
            self.new_device(None),
            name="disk",
            fuses=QueueFlags("disk", check),
            clock=trio.current_time,
            on_event=self.events.append,
            limits=limits,
        )
        self.gate.bind()

    @property
    def device(self) -> WatchedDevice:
        """The one that is served."""
        return self.devices[-1]

    def new_device(self, old: WatchedDevice | None) -> WatchedDevice:
        """A device with the content of `old`."""
        device = WatchedDevice(
            BLOCK * BLOCKS,
            cluster_size=4 * BLOCK,
            completion=Completion.MANUAL,
            inline=self.random.random() < 0.5,
            cancellable=self.random.random() < 0.5,
            data=bytearray(BLOCK * BLOCKS) if old is None else bytearray(old.data),
        )
        device.episode = self
        self.devices.append(device)
        return device

    # -- the actors ------------------------------------------------------------------------

    async def run(self) -> None:
        """Play the episode and check it."""
        async with trio.open_nursery() as nursery:
            for actor in (self.storage, self.timer, self.trouble, self.operator):
                nursery.start_soon(actor)
            await self.client()
            await self.settle()
            nursery.cancel_scope.cancel()
        self.check()

    async def client(self) -> None:
        for number in range(self.random.randint(6, 28)):
            if self.random.random() < 0.4:
                await trio.sleep(self.random.choice([0.0, 0.01, 0.3, 2.0]))
            self.issue(number)
            if self.random.random() < 0.15:
                self.cancel(self.random.choice(self.commands))

    async def storage(self) -> None:
        """Completes operations in any order; those that hang come back late."""
        while True:
            await trio.sleep(self.random.choice([0.001, 0.02, 0.1]))
            for device in self.devices:
                ready = [each for each in device.outstanding if each not in self.hung]
                if ready:
                    operation = self.random.choice(ready)
                    device.complete(1, index=device.outstanding.index(operation))
                elif self.hung and self.random.random() < 0.01:
                    self.hung.pop(0)

    async def timer(self) -> None:
        while True:
            await trio.sleep(0.5)
            self.gate.expire(trio.current_time())

    async def trouble(self) -> None:
        for _ in range(self.random.randint(1, 2)):
            await trio.sleep(self.random.choice([0.0, 0.1, 1.0, 5.0]))
            kind = self.random.choice(["fail", "fail", "hang", "both"])
            if kind != "hang":
                self.device.fail(
                    self.random.choice(["write", "read", "flush", None]),
                    self.random.choice([errno.EIO, errno.EBUSY, errno.ENOTCONN]),
                    times=self.random.choice([1, None]),
                    applied=self.random.random() < 0.3,
                )
            if kind != "fail":
                self.hung += self.device.outstanding

    async def operator(self) -> None:
        """Recovers the device when it is in standby; replaces it sometimes when it is not."""
        while True:
            await trio.sleep(self.random.choice([0.1, 1.0, 10.0]))
            if self.gate.state is GateState.STANDBY:
                if self.random.random() < 0.2 and not self.disowned:
                    self.device.heal()
                    self.leave()
                else:
                    await self.replace()
            elif self.random.random() < 0.1:
                await self.replace()

    async def replace(self) -> None:
        gate = self.gate
        try:
            gate.begin_recovery()
        except BusyError:
            return
        if not await gate.drain(self.random.choice([0.0, 0.5, 3.0])):
            self.disowned = True
            for command in self.commands:
                command.running = False
        if self.random.random() < 0.2:
            gate.fail_recovery(StorageError(errno.EIO, "open"))
            return
        await trio.sleep(self.random.choice([0.0, 0.05]))
        self.disowned = False
        gate.swap(self.new_device(self.device))
        self.leave()

    def leave(self) -> None:
        self.released = {
            each
            for each in self.commands
            if not each.answers and not each.cancelled and not each.running
        }
        self.gate.leave_standby()

    async def settle(self) -> None:
        """Until every command has been answered, on a storage that works."""
        for _ in range(200):
            self.device.heal()
            self.hung = [each for each in self.hung if each not in self.device.outstanding]
            await trio.sleep(1.0)
            if self.gate.state is GateState.ACTIVE and all(
                each.answers or each.cancelled for each in self.commands
            ):
                return
            if self.gate.state is GateState.STANDBY:
                await self.replace()
        raise AssertionError(f"seed {self.seed}: commands were left over")

    # -- the client's commands -------------------------------------------------------------

    def issue(self, number: int) -> None:
        op = self.random.choice(["write"] * 5 + ["read"] * 3 + ["flush", "write_zeroes", "discard"])
        count = self.random.randint(1, 4)
        first = self.random.randint(0, BLOCKS - count)
        value = number + 1 if op == "write" else 0
        self.tick += 1
        command = Command(number, op, first, count, value, self.tick, bytearray(count * BLOCK))
        self.commands.append(command)
        buffer, gate = memoryview(command.buffer), self.gate
        answer = partial(self.answer, command)
        offset = first * BLOCK
        match op:
            case "write":
                buffer[:] = value.to_bytes(8, "little") * (len(buffer) // 8)
                tried = len(self.device.log)
                if gate.try_write(offset, buffer):
                    self.begin(command)
                    command.running = False
                    answer(None)
                else:  # a write that failed inline may have happened
                    command.begun = len(self.device.log) > tried
                    self.pending[command] = gate.write(offset, buffer, answer)
            case "read":
                if gate.try_read(offset, buffer):
                    answer(None)
                else:
                    self.pending[command] = gate.read(offset, buffer, answer)
            case "flush":
                self.pending[command] = gate.flush(answer)
            case "write_zeroes":
                length = count * BLOCK
                self.pending[command] = gate.write_zeroes(offset, length, answer)
            case "discard":
                self.pending[command] = gate.discard(offset, count * BLOCK, answer)
        gate.kick()

    def cancel(self, command: Command) -> None:
        request = self.pending.get(command)
        if request is None or command.answers or command.cancelled:
            return
        self.tick += 1
        command.ended = self.tick  # those behind it may begin before the method returns
        if request.cancel():  # type: ignore[attr-defined]
            command.cancelled = True
            command.running = False
        elif not command.answers:
            command.ended = NEVER

    def answer(self, command: Command, error: StorageError | None) -> None:
        self.tick += 1
        command.answers += 1
        assert command.answers == 1, f"seed {self.seed}: {command} was answered twice"
        assert not command.cancelled, f"seed {self.seed}: {command} was answered after a cancel"
        command.error = error
        command.ended = self.tick
        busy = isinstance(error, ParkTimeoutError)
        aborted = error is not None and error.errno == errno.ECANCELED
        assert error is None or busy or aborted, f"seed {self.seed}: {error}"
        if command.op == "read" and error is None:
            for index in range(command.count):
                words = set(memoryview(command.buffer)[index * BLOCK :][:BLOCK].cast("Q"))
                assert len(words) == 1, f"seed {self.seed}: torn block"
                self.explain(command.first + index, words.pop(), command.issued, self.tick)

    # -- the model -------------------------------------------------------------------------

    def begin(self, command: Command) -> None:
        """A device begins `command`."""
        assert command.ended == NEVER, f"seed {self.seed}: {command} was begun after its end"
        for other in self.commands:
            if other.number >= command.number or other.ended != NEVER:
                continue
            changes = command.op in CHANGES and other.op in CHANGES
            if changes or {command, other} <= self.released:
                late = not command.conflicts(other)
                assert late, f"seed {self.seed}: {command} has overtaken {other}"
        command.begun = command.running = True

    def explain(self, block: int, value: int, begin: int, end: int) -> None:
        """Some order of the commands makes `block` read `value` between two ticks."""
        writers = [each for each in self.commands if each.changes(block)]
        done = [each for each in writers if each.answers and each.error is None]
        settled = [each for each in done if each.ended < begin]
        if value == 0 and not settled:
            return
        for writer in writers:
            if writer.value != value or writer.issued > end or not writer.begun:
                continue
            if not any(later.issued > writer.ended for later in settled):
                return
        raise AssertionError(f"seed {self.seed}: block {block} reads {value}")

    def check(self) -> None:
        for block in range(BLOCKS):
            words = set(memoryview(self.device.data)[block * BLOCK :][:BLOCK].cast("Q"))
            assert len(words) == 1, f"seed {self.seed}: torn block {block}"
            self.explain(block, words.pop(), self.tick + 1, self.tick + 1)
        assert self.gate.parked_count == self.gate.parked_bytes == 0
        assert self.gate.executing_count == 0
        assert self.gate.standby_text == "off"


def play(seeds: range) -> int:
    """Play the episodes with these seeds, each in its own virtual time; returns how often a device
    went into standby."""

    async def main() -> int:
        entered = 0
        for seed in seeds:
            seed_scheduler(seed)
            episode = Episode(seed)
            await episode.run()
            entered += sum(each.kind.value == "standby-entered" for each in episode.events)
        return entered

    with deterministic():
        return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@contextmanager
def deterministic() -> Iterator[None]:
    """Make trio's scheduler a function of the episode's seed, where this trio knows how."""
    scheduler = importlib.import_module("trio._core._run")
    switch = "_ALLOW_DETERMINISTIC_SCHEDULING"
    known = hasattr(scheduler, switch) and hasattr(scheduler, "_r")
    before = getattr(scheduler, switch, None)
    if known:
        setattr(scheduler, switch, True)
    try:
        yield
    finally:
        if known:
            setattr(scheduler, switch, before)


def seed_scheduler(seed: int) -> None:
    """Let the scheduler's own random choices begin from `seed`."""
    scheduler = importlib.import_module("trio._core._run")
    generator = getattr(scheduler, "_r", None)
    if generator is not None:
        generator.seed(seed)
