"""The storage of an episode: a block device that does what the episode's choices say.

It tells the episode what it begins and what it does; it keeps, block by block, what a reader sees
(`content`) and what would be left after a power cut (`stable`).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Protocol

from ploopd.errors import StorageError
from ploopd.storage.device import Done, Extent
from ploopd.storage.lane import LaneRequest
from tests.support.virtual.commands import BLOCK, BLOCKS, DISK_BLOCKS, Command, number_of

ALL = 0
"""How much of a failing operation takes effect: everything, nothing, the first block."""
NOTHING, FIRST = 1, 2


class Story(Protocol):
    """The episode, as its devices see it."""

    commands: list[Command]
    device: StoredDisk

    def begins(self, device: StoredDisk, command: Command | None, op: str) -> Command: ...

    def running(self, run: Run | LaneRun) -> None: ...

    def lane_ended(self, run: LaneRun) -> None: ...

    def promote(self, run: LaneRun) -> None: ...

    def dropped(self, run: Run) -> None: ...

    def delivers(self, run: Run, number: int) -> None: ...

    def meets(self, run: Run) -> int | None: ...

    def inline(self, device: StoredDisk, command: Command, number: int) -> None: ...


class Run:
    """One execution of a command.  `void`: disowned by the gate; `begun`: it was in the lane."""

    __slots__ = ("begun", "command", "device", "done", "kicked", "op", "void")

    def __init__(
        self,
        device: StoredDisk,
        command: Command,
        op: str,
        done: Done,
        *,
        kicked: bool,
        begun: bool = False,
    ) -> None:
        self.begun = begun
        self.device = device
        self.command = command
        self.op = op
        self.done = done
        self.kicked = kicked
        self.void = False

    def cancel(self) -> bool:
        device = self.device
        if self.begun or not device.cancellable or self not in device.outstanding:
            return False
        device.outstanding.remove(self)
        device.story.dropped(self)
        return True


class LaneRun(LaneRequest):
    """One execution of a command in the lane."""

    __slots__ = ("command", "kicked", "op", "story")

    def __init__(self, story: Story, command: Command) -> None:
        self.story = story
        self.command = command
        self.op = command.op
        self.offset = command.offset
        self.length = command.length
        self.writing = command.op == "write"
        self.kicked = False

    def completed(self) -> None:
        self.story.lane_ended(self)

    def promote(self) -> None:
        self.story.promote(self)


class StoredLane:
    """The lane of a `StoredDisk`: it takes two requests at a time."""

    usable = True
    first = False

    def __init__(self, device: StoredDisk) -> None:
        self.device = device
        self.runs: list[LaneRun] = []

    def begin(self, request: LaneRequest) -> bool:
        assert isinstance(request, LaneRun)
        if len(self.runs) > 1:
            return False
        device = self.device
        device.story.begins(device, request.command, request.op)
        request.kicked = not device.needs_kick
        self.runs.append(request)
        device.story.running(request)
        return True

    def ended(self, request: LaneRequest) -> None:
        assert isinstance(request, LaneRun)
        self.runs.remove(request)

    def adopt(self, request: LaneRequest, buffer: memoryview, done: Done) -> Run:
        assert isinstance(request, LaneRun)
        self.runs.remove(request)
        command, device = request.command, self.device
        run = Run(device, command, request.op, done, kicked=request.kicked, begun=True)
        device.outstanding.append(run)
        return run

    def empty(self) -> None:
        for run in tuple(self.runs):
            run.promote()

    def __len__(self) -> int:
        return len(self.runs)


class StoredDisk:
    """See the module's first lines.

    `sick`: the errno of every operation, 0 while it works.  `inline`: try_* calls do something.
    `cancellable`: what is outstanding has not begun.  `needs_kick`: nothing happens without `kick`.
    `lane`: only some have one.
    """

    __slots__ = (
        "cancellable",
        "content",
        "inline",
        "lane",
        "needs_kick",
        "outstanding",
        "read_only",
        "sick",
        "stable",
        "story",
        "volatile",
    )

    def __init__(self, story: Story, content: list[int], stable: list[int], modes: int) -> None:
        self.story = story
        self.content = content
        self.stable = stable
        self.volatile: list[Command] = []
        self.outstanding: list[Run] = []
        self.sick = 0
        self.inline = bool(modes & 1)
        self.cancellable = bool(modes & 2)
        self.needs_kick = bool(modes & 4)
        if modes & 8:
            self.lane = StoredLane(self)
        self.read_only = False

    @property
    def size(self) -> int:
        return DISK_BLOCKS * BLOCK

    @property
    def cluster_size(self) -> int:
        return 1 << 20

    # -- what takes no time ----------------------------------------------------------------

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        return self._now("read", offset, buffer)

    def try_write(self, offset: int, buffer: memoryview) -> bool:
        return self._now("write", offset, buffer)

    def _now(self, op: str, offset: int, buffer: memoryview) -> bool:
        if not self.inline:
            return False
        command = self._command(op, offset, len(buffer), buffer)
        self.story.begins(self, command, op)
        if self.sick:
            self.apply(command, NOTHING)
            self.story.inline(self, command, self.sick)
            raise StorageError(self.sick, op, path="virtual", offset=offset)
        self.apply(command, ALL)
        self.story.inline(self, command, 0)
        return True

    # -- what takes time -------------------------------------------------------------------

    def read(self, offset: int, buffer: memoryview, done: Done) -> Run:
        return self._start("read", offset, len(buffer), buffer, done)

    def write(self, offset: int, buffer: memoryview, done: Done, *, fua: bool = False) -> Run:
        run = self._start("write", offset, len(buffer), buffer, done)
        assert run.command.fua == fua, f"{run.command} lost its FUA"
        return run

    def write_zeroes(
        self, offset: int, length: int, done: Done, *, unmap: bool = False, fua: bool = False
    ) -> Run:
        run = self._start("write_zeroes", offset, length, None, done)
        assert run.command.fua == fua, f"{run.command} lost its FUA"
        return run

    def discard(self, offset: int, length: int, done: Done) -> Run:
        return self._start("discard", offset, length, None, done)

    def flush(self, done: Done) -> Run:
        return self._start("flush", 0, 0, None, done)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return iter(())

    def kick(self) -> None:
        if self.needs_kick:
            for run in self.ready(kicked=False):
                run.kicked = True

    def ready(self, *, kicked: bool = True) -> list[Run | LaneRun]:
        """What may come back now."""
        runs: list[Run | LaneRun] = [*self.outstanding]
        if hasattr(self, "lane"):
            runs += self.lane.runs
        return [run for run in runs if run.kicked is kicked]

    def _start(
        self, op: str, offset: int, length: int, buffer: memoryview | None, done: Done
    ) -> Run:
        command = None if op == "flush" else self._command(op, offset, length, buffer)
        command = self.story.begins(self, command, op)
        run = Run(self, command, op, done, kicked=not self.needs_kick)
        self.outstanding.append(run)
        self.story.running(run)
        outcome = self.story.meets(run)
        if outcome is not None:
            self.finish(run, outcome, NOTHING)
        return run

    def _command(self, op: str, offset: int, length: int, buffer: memoryview | None) -> Command:
        """The command that these arguments belong to; they must be its own, unchanged."""
        command = self.story.commands[number_of(length)]
        assert (command.op, command.offset, command.length) == (op, offset, length), command
        if op == "write":
            assert buffer is not None
            assert buffer[0] == buffer[length - 512] == command.value, f"{command}: other data"
        return command

    # -- results ---------------------------------------------------------------------------

    def finish(self, run: Run, number: int, effect: int) -> None:
        """End a run with an errno (0: success); `effect`: how much of a failed one happens."""
        self.outstanding.remove(run)
        if number == 0 and not run.void:
            run.command.lost = False
        self.apply(run.command, ALL if number == 0 else effect, late=run.void)
        self.story.delivers(run, number)
        error = StorageError(number, run.op, path="virtual") if number else None
        run.done(error)

    def apply(self, command: Command, effect: int, *, late: bool = False) -> None:
        op = command.op
        if effect == NOTHING or self is not self.story.device:
            return  # what happens to a device that was replaced is seen by nobody
        if op == "flush":
            if effect == ALL:
                self.stable[:] = self.content
                for each in self.volatile:
                    each.durable = True
                self.volatile.clear()
            return
        first, end = command.first, min(command.end, BLOCKS)
        if op == "read":
            buffer = command.buffer
            if late or buffer is None:  # memory that nobody looks at any more
                return
            for index in range(end - first if effect == ALL else 1):
                buffer[index * BLOCK] = self.content[first + index]
            return
        command.touched = True
        if effect == FIRST:
            end = min(end, first + 1)
        self.content[first:end] = [command.value] * (end - first)
        if effect != ALL:
            return
        if command.fua:
            self.stable[first:end] = self.content[first:end]
            command.durable = True
        else:
            self.volatile.append(command)


def successor(old: StoredDisk, modes: int, lost: list[bool]) -> StoredDisk:
    """A device that takes the place of `old`, with its content; where `lost` says so, a block is
    as it was at the last flush."""
    content = [old.stable[block] if lost[block] else old.content[block] for block in range(BLOCKS)]
    fresh = StoredDisk(old.story, content, list(old.stable), modes)
    if any(lost):
        for command in old.volatile:
            command.lost = True
    else:
        fresh.volatile = list(old.volatile)
    return fresh


STANDBY_ERRNOS = (errno.EIO, errno.EBUSY, errno.ENOTCONN)
OTHER_ERRNOS = (errno.ENOSPC, errno.ESTALE)
