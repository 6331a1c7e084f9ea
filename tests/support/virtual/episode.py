"""One episode: a random walk of initiators, storage, clock and operator around one gate."""

from __future__ import annotations

import errno
from functools import partial

from ploopd.errors import BusyError, StorageError
from ploopd.gate.state import GateState
from scst_shim import StandbyState
from tests.support.virtual.choices import Below
from tests.support.virtual.commands import (
    BLOCK,
    BLOCKS,
    CHANGES,
    MOST_COMMANDS,
    NEVER,
    WIDE,
    Command,
)
from tests.support.virtual.model import Model
from tests.support.virtual.storage import (
    ALL,
    NOTHING,
    OTHER_ERRNOS,
    STANDBY_ERRNOS,
    LaneRun,
    Run,
    StoredDisk,
    successor,
)

OPS = (*["write"] * 5, *["read"] * 3, "flush", "flush", "write_zeroes", "discard")
WAITS = (0.1, 1.0, 4.0, 25.0)


class Episode(Model):
    """The actors; `play` raises AssertionError where the model is contradicted."""

    def __init__(self, below: Below, story: list[str] | None = None) -> None:
        super().__init__(below, story)
        self.old: list[StoredDisk] = []
        self.at_once = below(3) == 2
        self.issuing = True
        self.stage = 0
        self.volume_open = True
        self.table = (
            *[self.complete] * 9,
            *[self.issue] * 12,
            *[self.fail] * 3,
            *[self.cancel] * 3,
            *[self.operate] * 5,
            *[self.wait] * 2,
            self.sicken,
            self.toggle,
            self.late,
        )

    # -- the play ----------------------------------------------------------------------------

    def play(self) -> None:
        """The whole episode: some steps, into standby at the latest now, some more, the end."""
        below, table = self.below, self.table
        size = len(table)
        for _ in range(12 + below(16)):
            table[below(size)]()
            self.look()
        if StandbyState.ON not in self.texts:
            self.enter()
        for _ in range(8 + below(12)):
            table[below(size)]()
            self.look()
        self.settle()
        self.verdict()

    def enter(self) -> None:
        """Standby must begin: by a failure if something is in execution, else by an order."""
        self.fuses(True, True)
        if self.gate.state is GateState.RECOVERING:
            self.conclude()
        runs = self.device.ready()
        if runs and self.gate.state is GateState.ACTIVE:
            self.result(runs[0], STANDBY_ERRNOS[self.below(3)])
        if self.gate.state is GateState.ACTIVE:
            self.gate.enter_standby("test")
        self.look()

    def settle(self) -> None:
        """Everything works again: nothing may be left over."""
        self.say("settling")
        self.issuing = False
        self.at_once = False
        for _ in range(200):
            self.device.sick = 0
            if self.gate.state is not GateState.ACTIVE:
                self.conclude()
            elif runs := self.device.ready():
                self.result(runs[0], 0)
            elif not self.open:
                return
            else:
                break
            self.look()
        raise AssertionError(f"left over: {self.open}")

    # -- initiators --------------------------------------------------------------------------

    def issue(self) -> None:
        """A command arrives; reads and writes try the short way first, mostly."""
        below, number = self.below, len(self.commands)
        if number >= MOST_COMMANDS or not self.issuing:
            return
        op = OPS[below(12)]
        first = below(BLOCKS)
        count = min(1 + below(3), BLOCKS - first)
        if op in ("write_zeroes", "discard") and below(8) == 7:
            first, count = 0, WIDE
        fua = op in ("write", "write_zeroes") and below(6) == 5
        if op == "flush":
            first = count = 0
        self.tick += 1
        value = number + 1 if op == "write" else 0
        follow = below(12)
        command = Command(
            number, op, first, first + count, value, fua, follow, self.tick, self.now, None
        )
        command.changes = op in CHANGES
        if op in ("read", "write"):
            buffer = memoryview(bytearray(command.length))
            command.buffer = buffer
            if value:
                for index in range(0, len(buffer), BLOCK):
                    buffer[index] = value
                buffer[len(buffer) - 512] = value
        self.commands.append(command)
        self.open.append(command)
        self.submit(command)

    def submit(self, command: Command) -> None:
        gate, offset, length = self.gate, command.offset, command.length
        answer, buffer = partial(self.answer, command), command.buffer
        self.say(f"issue {command.number}: {command.op} {command.first}..{command.end}")
        if buffer is not None and not command.fua and self.below(4):
            attempt = gate.try_read if command.op == "read" else gate.try_write
            try:
                if attempt(offset, buffer):
                    self.answer(command, None)
                    return
            except StorageError:
                pass  # the long way reports it
            if gate.lane.usable:
                run = LaneRun(self, command)
                if gate.lane.begin(run):
                    command.lane = run
                    gate.kick()
                    return
        match command.op:
            case "read":
                assert buffer is not None
                handle = gate.read(offset, buffer, answer)
            case "write":
                assert buffer is not None
                handle = gate.write(offset, buffer, answer, fua=command.fua)
            case "write_zeroes":
                handle = gate.write_zeroes(offset, length, answer, fua=command.fua)
            case "discard":
                handle = gate.discard(offset, length, answer)
            case _:
                handle = gate.flush(answer)
        command.handle = handle
        gate.kick()

    def after(self, command: Command) -> None:
        if command.follow == 10:
            self.issue()
        elif command.follow == 11:
            self.cancel()

    def cancel(self) -> None:
        """An abort, now and then of a command that has ended already."""
        below = self.below
        pool = self.open or self.commands
        if not pool:
            return
        command = pool[below(len(pool))]
        if command.lane is not None:
            command.lane.promote()  # what aborts a task makes one first
        if command.handle is None:
            return
        if command.ended != NEVER:
            assert command.handle.cancel() is False, f"{command} was cancelled after its end"
            return
        self.tick += 1
        self.say(f"cancel {command.number}")
        command.ended = self.tick  # those behind it may begin before the method returns
        self.open.remove(command)
        if command.handle.cancel():
            assert not command.answered, f"{command} was answered and cancelled"
            assert not command.running, f"{command} is in execution after a cancel"
            command.cancelled = True
            self.cancelled += 1
        else:
            known = command.running or self.disowning
            assert known, f"{command} could not be cancelled while it waited"
            command.asked = True
            command.ended = NEVER
            self.open.append(command)
            self.open.sort(key=lambda each: each.number)

    # -- the lane ----------------------------------------------------------------------------

    def lane_ended(self, run: LaneRun) -> None:
        """What a front end does with a command that has gone through the lane."""
        run.command.lane = None
        self.gate.lane.ended(run)
        self.answer(run.command, None)

    def promote(self, run: LaneRun) -> None:
        """What a front end does with one that must not be in the lane any more."""
        command = run.command
        self.say(f"promote {command.number}")
        command.lane = None
        assert command.buffer is not None
        answer = partial(self.answer, command)
        command.handle = self.gate.lane.adopt(run, command.buffer, answer)

    def lane_result(self, run: LaneRun) -> None:
        """A run of the lane has succeeded."""
        command = run.command
        self.say(f"lane result {command.number}")
        self.device.apply(command, ALL)
        command.running = False
        self.executing -= 1
        run.completed()
        assert command.answered, f"the result of {command} was swallowed"

    # -- storage -----------------------------------------------------------------------------

    def meets(self, run: Run) -> int | None:
        """What comes back before the call returns, if anything: an errno, or 0."""
        if run.device.sick:
            return run.device.sick if self.at_once else None
        return 0 if self.at_once and self.below(3) == 0 else None

    def result(self, run: Run | LaneRun, number: int, effect: int = NOTHING) -> None:
        """A run comes back, and the gate must do the right thing with it."""
        if isinstance(run, LaneRun):
            if number == 0:
                self.lane_result(run)
                return
            run.promote()
            run = next(one for one in self.device.outstanding if one.command is run.command)
        command, void, parks = run.command, run.void, self.parks(number)
        self.say(f"{'late ' if void else ''}result {command.number}: {number}")
        before, full, told = self.tick, self.full, self.exhausted
        run.device.finish(run, number, effect)
        if void:
            assert self.tick == before, f"a disowned result of {command} was heard"
        elif parks:
            assert self.gate.state is not GateState.ACTIVE, "a standby errno was ignored"
            assert not command.succeeded, f"{command} failed and was acknowledged"
            assert command.answered or not command.asked, f"{command} waits after its abort"
        else:
            assert command.answered, f"the result of {command} was swallowed"
            assert (command.error is None) == (number == 0), f"{command}: another result"
            if number == errno.ENOSPC:
                assert full or self.exhausted > told, "nobody was told of a full storage"
        self.delivering = 0

    def pick(self) -> Run | LaneRun | None:
        runs = self.device.ready()
        return runs[self.below(len(runs))] if runs else None

    def complete(self) -> None:
        """The storage answers one command."""
        run = self.pick()
        if run is not None:
            self.result(run, self.device.sick)

    def fail(self) -> None:
        """One command fails, and perhaps happens all the same."""
        run = self.pick()
        if run is not None:
            others = self.below(8) == 7
            number = OTHER_ERRNOS[self.below(2)] if others else STANDBY_ERRNOS[self.below(3)]
            self.result(run, number, self.below(3))

    def sicken(self) -> None:
        """From now on everything fails, or nothing does."""
        device = self.device
        device.sick = 0 if device.sick else STANDBY_ERRNOS[self.below(3)]
        self.say(f"sick {device.sick}")

    def late(self) -> None:
        """Something that was disowned comes back."""
        for device in self.old:
            if device.outstanding:
                run = device.outstanding[self.below(len(device.outstanding))]
                if run.void:
                    number = STANDBY_ERRNOS[self.below(3)] if self.below(3) == 2 else 0
                    self.result(run, number)
                return

    # -- the clock and the operator ----------------------------------------------------------

    def wait(self) -> None:
        """Time passes."""
        self.now += WAITS[self.below(4)]
        self.expiring = True
        self.gate.expire(self.now)
        self.expiring = False
        deadline = self.gate.next_deadline()
        assert deadline is None or deadline > self.now, "a request waits for too long"

    def toggle(self) -> None:
        """A fuse is taken out or put in, or the latch is cleared."""
        match self.below(3):
            case 0:
                self.fuses(not self.bound, self.key)
            case 1:
                self.fuses(self.bound, not self.key)
            case _:
                assert self.gate.clear_latch() == self.latched
                self.latched = False

    def fuses(self, bound: bool, key: bool) -> None:
        if (bound, key) != (self.bound, self.key):
            self.say(f"fuses: en {bound} key {key}")
        if bound != self.bound:
            self.bound = bound
            (self.gate.bind if bound else self.gate.unbind)()
        if key != self.key:
            self.key = key
            (self.check.enable if key else self.check.disable)()

    def operate(self) -> None:
        """The operator does something that makes sense in this state."""
        gate, below = self.gate, self.below
        if gate.state is GateState.RECOVERING:
            self.recover()
        elif gate.state is GateState.STANDBY:
            if self.volume_open and below(4) == 3:
                self.say("leave")
                self.leave()
            else:
                self.begin()
        elif below(8) == 7:
            self.begin()
        elif below(8) == 7 and self.supported:
            self.say("enter")
            gate.enter_standby("test")

    def begin(self) -> None:
        self.say("replace begins")
        self.gate.begin_recovery()
        self.stage = 1
        try:
            self.gate.begin_recovery()
        except BusyError:
            return
        raise AssertionError("a second replace was begun")

    def recover(self) -> None:
        """One step of a replace, which may fail at each."""
        below = self.below
        if self.stage == 1:
            choice = below(5)
            if choice == 4:
                self.give_up(untouched=True)
            elif not self.executing:
                self.stage = 2
            elif choice >= 2:
                self.disown()
        elif below(5) == 4:
            self.volume_open = False
            self.give_up(untouched=False)
        else:
            self.swap()

    def disown(self) -> None:
        """The drain's deadline has passed."""
        self.now += 5.0
        self.say("disown")
        self.gate.lane.empty()
        for run in self.device.outstanding:
            run.void = True
            run.command.running = False
        self.executing = 0
        self.volume_open = False
        self.stage = 2
        if self.device not in self.old:
            self.old.append(self.device)
        self.disowning = True
        self.gate.disown()
        self.disowning = False

    def give_up(self, *, untouched: bool) -> None:
        self.say("replace failed")
        self.stage = 0
        self.line_up()
        self.gate.fail_recovery(BusyError("no"), untouched=untouched)

    def swap(self) -> None:
        """The rest of a replace; the new storage may lack what was never flushed."""
        below = self.below
        lost = [below(2) == 1 for _ in range(BLOCKS)] if below(4) == 3 else [False] * BLOCKS
        self.device = successor(self.device, below(16), lost)
        self.say(f"swap, lost {lost}")
        self.gate.swap(self.device)
        self.volume_open = True
        self.latched = False
        self.stage = 0
        self.replaced += 1
        self.leave()

    def leave(self) -> None:
        self.faulted = False
        self.line_up()
        self.gate.leave_standby()

    def line_up(self) -> None:
        """What waits now is released together, if it is."""
        self.release += 1
        for command in self.open:
            if not command.running:
                command.release = self.release
                self.released += 1

    def conclude(self) -> None:
        """Bring a device that is not active back."""
        if self.gate.state is GateState.STANDBY:
            self.begin()
        if self.stage == 1 and self.executing:
            self.disown()
        self.stage = 2
        self.swap()
