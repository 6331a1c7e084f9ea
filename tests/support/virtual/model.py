"""What must be true of an episode: the commands, what became of them, and what the gate may do.

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

from ploopd.errors import ParkTimeoutError, StorageError
from ploopd.gate.events import Event, EventKind
from ploopd.gate.filter import Gate
from ploopd.gate.limits import ParkLimits
from ploopd.gate.state import GateState
from scst_shim import QueueFlags, StandbyCheck, StandbyState
from tests.support.virtual.choices import Below
from tests.support.virtual.commands import BLOCK, BLOCKS, NEVER, Command, allowed_values
from tests.support.virtual.storage import STANDBY_ERRNOS, LaneRun, Run, StoredDisk

PARK_MAX = (20.0, 20.0, None, 3.0)
REQUESTS = (10_000, 10_000, 6)
BYTES = (64 << 20, 64 << 20, 4 * BLOCK)


class Model:
    """See the module's first lines; every method raises AssertionError where it is contradicted.

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
        self.exhausted = 0
        self.faulted = False
        self.delivering = 0
        self.expiring = False
        self.disowning = False
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
        self.device = StoredDisk(self, [0] * BLOCKS, [0] * BLOCKS, below(16))
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

    def clock(self) -> float:
        return self.now

    def event(self, event: Event) -> None:
        if event.kind is EventKind.SPACE_EXHAUSTED:
            assert not self.full, "a full storage is said twice"
            self.full = True
            self.exhausted += 1
        elif event.kind is EventKind.SPACE_RETURNED:
            assert self.full, "room has returned to a storage that was not full"
            self.full = False
        if self.story is not None:
            self.story.append(f"  {event}")

    def say(self, text: str) -> None:
        if self.story is not None:
            self.story.append(f"{self.now:5.1f} {text}")

    @property
    def supported(self) -> bool:
        return self.bound and self.key

    # -- between two steps, and at the end ------------------------------------------------

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

    # -- answers --------------------------------------------------------------------------

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
        self.after(command)

    def after(self, command: Command) -> None:
        """A completion may act on the gate."""

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

    # -- what devices are given, and answer ----------------------------------------------

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

    def running(self, run: Run | LaneRun) -> None:
        run.command.running = True
        self.executing += 1

    def dropped(self, run: Run) -> None:
        """The device has cancelled a run that it had not begun."""
        if not run.void:
            run.command.running = False
            self.executing -= 1

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
