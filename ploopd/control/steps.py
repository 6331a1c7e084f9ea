"""The steps of a recovery, what is told of them, and how long each may take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum


class Step(Enum):
    """The steps in their order; the values are what an operator sees.

    GROW belongs to a resize, RECORD to everything else.
    """

    CHECK = "check"
    STOP = "stop admission"
    DRAIN = "drain"
    CLOSE = "close old"
    GROW = "grow"
    OPEN = "open new"
    REPLAY = "replay"
    PROBE = "probe"
    RECORD = "record"
    SWAP = "swap"
    RELEASE = "release"


RECOVERY_STEPS = tuple(step for step in Step if step is not Step.GROW)
"""Those of a replace or a reload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """A step that was done: `elapsed` seconds since the call, `detail` what is worth telling.

    `planned`: it was not done, `detail` says what it would do.
    """

    step: Step
    elapsed: float
    detail: str = ""
    planned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaceReport:
    """A recovery that succeeded, or that would (`dry_run`).

    `image`: the file now served in the place of `previous`, after a reload what the device was
    opened from.  `level`: which delta that is, 0 is the top; None for all of them.  `guid`: its
    GUID, if a descriptor names it.
    """

    device: str
    image: str
    previous: str
    steps: Sequence[StepRecord]
    level: int | None = 0
    guid: str | None = None
    dry_run: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """Seconds that each step may take before it is given up."""

    check: float = 10.0
    drain: float = 5.0
    close: float = 5.0
    grow: float = 300.0
    open: float = 60.0
    replay: float = 60.0
    probe: float = 10.0
    record: float = 10.0


OnStep = Callable[[StepRecord], None]
