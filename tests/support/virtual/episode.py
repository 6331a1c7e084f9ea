"""One episode: a random walk of initiators, storage, clock and operator around one gate.

The model demands, after every step:

* one answer per command, none after a successful cancel, no execution after either;
* BUSY only for commands that are not in execution, and only after `park_max` or beyond the limits;
* an error only where the two fuses, the latch or the errno say so;
* overlapping changes are in execution one after the other in their order of arrival, and so are all
  released commands whose order can be seen;
* what is read, what is left at the end, and what would be left by a power cut, is explained by the
  answers: `commands.allowed_values`;
* counts, state and the standby text agree with what happened; in the end nothing is left over.
"""

from __future__ import annotations

import errno
from functools import partial

from ploopd.errors import BusyError, ParkTimeoutError, StorageError
from ploopd.gate.events import Event, EventKind
from ploopd.gate.filter import Gate
from ploopd.gate.limits import ParkLimits
from ploopd.gate.state import GateState
from scst_shim import QueueFlags, StandbyCheck, StandbyState
from tests.support.virtual.choices import Below
from tests.support.virtual.commands import (
    BLOCK,
    BLOCKS,
    CHANGES,
    MOST_COMMANDS,
    NEVER,
    WIDE,
    Command,
    allowed_values,
)
from tests.support.virtual.storage import (
    NOTHING,
    OTHER_ERRNOS,
    STANDBY_ERRNOS,
    Run,
    StoredDisk,
    successor,
)

OPS = (*["write"] * 5, *["read"] * 3, "flush", "flush", "write_zeroes", "discard")
PARK_MAX = (20.0, 20.0, None, 3.0)
REQUESTS = (10_000, 10_000, 6)
BYTES = (64 << 20, 64 << 20, 4 * BLOCK)
WAITS = (0.1, 1.0, 4.0, 25.0)


class Episode:
    """See the module's first lines; `play` raises AssertionError where the model is contradicted.

    `story` collects what happened if it is a list.
    """

    def __init__(self, below: Below, story: list[str] | None = None) -> None:
        self.below = below
        self.story = story
        self.now = 0.0
        self.tick = 0
        self.commands: list[Command] = []
        self.open: list[Command] = []
        self.executing = 0
        self.waiting = 0
        self.latched = False
        self.full = False
        self.faulted = False
        self.delivering = 0
        self.expiring = False
        self.disowning = False
        self.issuing = True
        self.stage = 0
        self.volume_open = True
        self.release = 0
        self.released = 0
        self.replaced = 0
        self.cancelled = 0
        self.expired = 0
        self.texts: list[StandbyState] = []
        self.limits = ParkLimits(
            max_requests=REQUESTS[below(3)],
            max_bytes=BYTES[below(3)],
            park_max=PARK_MAX[below(4)],
        )
        self.old: list[StoredDisk] = []
        self.device = StoredDisk(self, [0] * BLOCKS, [0] * BLOCKS, below(8))
        self.at_once = below(3) == 2
        self.check = StandbyCheck()
        self.check.enable()
        self.flags = QueueFlags("disk", self.check, warn=lambda _: None)
        self.gate = Gate(
            self.device,
            name="disk",
            fuses=self.flags,
            clock=self.clock,
            on_event=self.event,
            limits=self.limits,
        )
        self.bound = self.key = True
        self.gate.bind()
        self.flags.watcher.subscribe(self.texts.append)
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

    def clock(self) -> float:
        return self.now

    def event(self, event: Event) -> None:
        if event.kind is EventKind.SPACE_EXHAUSTED:
            assert not self.full, "a full storage is said twice"
            self.full = True
        elif event.kind is EventKind.SPACE_RETURNED:
            assert self.full, "room has returned to a storage that was not full"
            self.full = False
        if self.story is not None:
            self.story.append(f"  {event}")

    def say(self, text: str) -> None:
        if self.story is not None:
            self.story.append(f"{self.now:5.1f} {text}")

    # -- the play --------------------------------------------------------------------------

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
        runs = [run for run in self.device.outstanding if run.kicked]
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
            elif run := next((run for run in self.device.outstanding if run.kicked), None):
                self.result(run, 0)
            elif not self.open:
                return
            else:
                break
            self.look()
        raise AssertionError(f"left over: {self.open}")

    def look(self) -> None:
        """What must be true between any two steps."""
        gate = self.gate
        assert gate.executing_count == self.executing, "executing_count"
        waiting = len(self.open) - self.executing
        assert gate.parked_count == waiting, "parked_count"
        assert (gate.latched is not None) == self.latched, "latched"
        assert (gate.full is not None) == self.full, "full"
        text, state = gate.standby_text, gate.state
        if not (self.bound and self.key):
            assert text == "not supported"
            assert not waiting or state is not GateState.STANDBY, "nobody will release them"
        elif state is GateState.STANDBY:
            assert text == "on"
        elif state is GateState.ACTIVE:
            assert text == "off"
        if state is GateState.ACTIVE and waiting:
            assert self.executing, "parked requests wait for nothing"

    def verdict(self) -> None:
        """The model's last word."""
        gate, commands, device = self.gate, self.commands, self.device
        assert gate.parked_count == gate.parked_bytes == gate.executing_count == 0, "counts"
        assert gate.next_deadline() is None, "next_deadline"
        for command in commands:
            assert command.answered != command.cancelled, f"{command} was left behind"
        for block in range(BLOCKS):
            value = device.content[block]
            allowed = allowed_values(commands, block)
            assert value in allowed, f"block {block} is {value}, not {allowed}"
            value = device.stable[block]
            allowed = allowed_values(commands, block, crash=True)
            assert value in allowed, f"block {block} is {value} after a power cut, not {allowed}"
        for before, after in zip(self.texts, self.texts[1:], strict=False):
            assert before is not after, "the standby text changed to itself"
        assert StandbyState.ON in self.texts, "never in standby"

    # -- initiators ------------------------------------------------------------------------

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

    def cancel(self) -> None:
        """An abort, now and then of a command that has ended already."""
        below = self.below
        pool = self.open or self.commands
        if not pool:
            return
        command = pool[below(len(pool))]
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

    def answer(self, command: Command, error: StorageError | None) -> None:
        """A command has ended."""
        self.tick += 1
        self.say(f"answer {command.number}: {error or 'good'}")
        assert not command.answered, f"{command} was answered twice"
        assert command.ended == NEVER, f"{command} was answered after a cancel"
        assert not command.running, f"{command} was answered while it was in execution"
        command.answered = True
        command.error = error
        command.ended = self.tick
        self.open.remove(command)
        if error is None:
            self.explain(command)
        else:
            self.justify(command, error)
        if command.follow == 10:
            self.issue()
        elif command.follow == 11:
            self.cancel()

    def explain(self, command: Command) -> None:
        """Is success true?"""
        issued = command.issued
        if command.changes:
            assert command.touched, f"{command} was never carried out"
            assert command.durable or not command.fua, f"{command}: FUA is not durable"
        elif command.op == "flush":
            for each in self.commands:
                if each.changes and each.succeeded and each.ended < issued and not each.lost:
                    assert each.durable, f"{command} did not flush {each}"
        else:
            buffer = command.buffer
            assert buffer is not None
            for index in range(command.end - command.first):
                value, block = buffer[index * BLOCK], command.first + index
                allowed = allowed_values(self.commands, block, before=issued)
                assert value in allowed, f"{command} has read {value} in {block}, not {allowed}"

    def justify(self, command: Command, error: StorageError) -> None:
        """Is this error allowed?"""
        number = error.errno
        if isinstance(error, ParkTimeoutError):
            park_max = self.limits.park_max
            if self.expiring and park_max is not None and self.now >= command.issued_at + park_max:
                self.expired += 1
                return
            parked = [each for each in self.open if not each.running]
            held = sum(each.length for each in (*parked, command) if each.buffer is not None)
            allowed = self.limits.allows(len(parked) + 1, held)
            assert not allowed, f"{command}: BUSY too early or within the limits"
        elif number == errno.ECANCELED:
            assert command.asked, f"{command}: aborted by nobody"
        elif number == errno.EROFS:
            assert self.latched, f"{command}: read-only without a latch"
            assert command.changes, f"{command}: read-only"
        elif number == self.delivering:
            assert not self.parks(number), f"{command}: {error}"
        else:
            assert number == errno.EIO, f"{command}: {error}"
            assert self.gate.state is GateState.STANDBY, f"{command}: {error}"
            assert not self.supported, f"{command}: {error}"

    # -- storage ---------------------------------------------------------------------------

    def begins(self, device: StoredDisk, command: Command | None, op: str) -> Command:
        """A device is given a command (None: a flush, the oldest that waits)."""
        if command is None:
            command = next(each for each in self.open if each.op == op and not each.running)
        assert device is self.device, f"{command} goes to a device that was replaced"
        assert command.ended == NEVER, f"{command} was begun after its end"
        assert not command.running, f"{command} is in execution twice"
        assert not (self.latched and command.changes), f"{command} changes a latched device"
        assert self.gate.state is GateState.ACTIVE, f"{command} was begun in standby"
        for other in self.open:
            if other.number >= command.number:
                break
            if (command.changes and other.changes and command.overlaps(other)) or (
                0 < command.release == other.release and command.conflicts(other)
            ):
                raise AssertionError(f"{command} has overtaken {other}")
        return command

    def running(self, run: Run) -> None:
        run.command.running = True
        self.executing += 1

    def dropped(self, run: Run) -> None:
        """The device has cancelled a run that it had not begun."""
        if not run.void:
            run.command.running = False
            self.executing -= 1

    def meets(self, run: Run) -> int | None:
        """What comes back before the call returns, if anything: an errno, or 0."""
        if run.device.sick:
            return run.device.sick if self.at_once else None
        return 0 if self.at_once and self.below(3) == 0 else None

    def inline(self, device: StoredDisk, command: Command, number: int) -> None:
        """A device has done a command now, or failed to."""
        if number:
            self.judged(number)

    def delivers(self, run: Run, number: int) -> None:
        if not run.void:
            run.command.running = False
            self.executing -= 1
            if number:
                self.judged(number)

    def judged(self, number: int) -> None:
        """The gate is about to hear of an error."""
        self.delivering = number
        if self.parks(number):
            self.faulted = True
        elif number != errno.ENOSPC:
            self.latched = True

    def parks(self, number: int) -> bool:
        """Whether an errno means standby now: after a failure every errno is that failure."""
        after = self.faulted and number not in (0, errno.ENOSPC)
        return self.supported and (after or number in STANDBY_ERRNOS)

    @property
    def supported(self) -> bool:
        return self.bound and self.key

    def result(self, run: Run, number: int, effect: int = NOTHING) -> None:
        """A run comes back, and the gate must do the right thing with it."""
        command, void, parks = run.command, run.void, self.parks(number)
        self.say(f"{'late ' if void else ''}result {command.number}: {number}")
        before = self.tick
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
            told = self.full or number != errno.ENOSPC or command.follow > 9
            assert told, "nobody was told of a full storage"
        self.delivering = 0

    def pick(self) -> Run | None:
        runs = [run for run in self.device.outstanding if run.kicked]
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

    # -- the clock and the operator --------------------------------------------------------

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
        self.device = successor(self.device, below(8), lost)
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
