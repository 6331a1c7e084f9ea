"""Standby episodes in virtual time: see tests/support/virtual."""

from __future__ import annotations

from pathlib import Path

from tests.support.virtual.play import play_in_parallel
from tests.torture.programme import Result

name = "virtual"
goal = 1_000_000
what = "standby episodes in virtual time against a model of order, exactly-once and durability"

BATCH = 20_000
FIRST = 1_000_000
"""`make test` plays the seeds from 0."""


def missing() -> str | None:
    """It needs nothing."""
    return None


def run(seed: int, directory: Path) -> Result:
    """The episodes of `BATCH` seeds; a contradiction is told with its shortest story."""
    first = FIRST + seed * BATCH
    totals = play_in_parallel(range(first, first + BATCH))
    return Result(episodes=totals["episodes"])
