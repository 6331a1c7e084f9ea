"""The commands of an episode, and what the model knows about each."""

from __future__ import annotations

from dataclasses import dataclass, field

from ploopd.errors import StorageError
from ploopd.gate.parking import Request
from ploopd.storage.lane import LaneRequest

BLOCK = 32 << 10
"""Bytes of one block of the model.  A command covers the beginning of each of its blocks, and its
length in the last one is its number: that is how a device knows which command it is given."""

BLOCKS = 8
"""Blocks that the model looks at; the disk is larger, for very wide commands."""

WIDE = 130
"""Blocks of a very wide command."""

DISK_BLOCKS = 160
MOST_COMMANDS = 60
NEVER = 1 << 60
CHANGES = frozenset({"write", "write_zeroes", "discard"})


@dataclass(eq=False, slots=True)
class Command:
    """One command on blocks [first, end); `value` is what it leaves there.

    `issued`, `ended` (answered or cancelled) are ticks of the model.  `touched`: some device has
    carried it out at least in part.  `durable`: wholly, and it was flushed.  `lost`: the storage
    may have forgotten it.  `asked`: somebody has tried to cancel it.  `lane`: what it is in the
    lane, while it is there.
    """

    number: int
    op: str
    first: int
    end: int
    value: int
    fua: bool
    follow: int
    issued: int
    issued_at: float
    buffer: memoryview | None = field(repr=False)
    changes: bool = False
    handle: Request | None = field(default=None, repr=False)
    lane: LaneRequest | None = field(default=None, repr=False)
    ended: int = NEVER
    answered: bool = False
    error: StorageError | None = None
    cancelled: bool = False
    asked: bool = False
    running: bool = False
    touched: bool = False
    durable: bool = False
    lost: bool = False
    release: int = 0

    def __str__(self) -> str:
        fua = " fua" if self.fua else ""
        return f"command {self.number} ({self.op} {self.first}..{self.end}{fua})"

    @property
    def offset(self) -> int:
        return self.first * BLOCK

    @property
    def length(self) -> int:
        return (self.end - self.first - 1) * BLOCK + (self.number + 1) * 512

    @property
    def succeeded(self) -> bool:
        return self.answered and self.error is None

    def overlaps(self, other: Command) -> bool:
        return self.first < other.end and other.first < self.end

    def conflicts(self, other: Command) -> bool:
        """Whether their order can be seen."""
        if "flush" in (self.op, other.op):
            return self.op == other.op or self.changes or other.changes
        return (self.changes or other.changes) and self.overlaps(other)


def number_of(length: int) -> int:
    """Which command has this length."""
    return length % BLOCK // 512 - 1


def allowed_values(
    commands: list[Command], block: int, *, before: int = NEVER, crash: bool = False
) -> set[int]:
    """What a block may hold: the changes in their order of arrival, each certain, possible or
    without effect.

    `before`: only those that had ended before this tick are certain.  `crash`: only what was made
    durable is certain.
    """
    values = {0}
    for command in commands:
        if not (command.changes and command.first <= block < command.end):
            continue
        certain = (
            command.answered
            and command.error is None
            and command.ended < before
            and not command.lost
            and (command.durable or not crash)
        )
        if certain:
            values = {command.value}
        elif command.touched:
            values.add(command.value)
    return values
