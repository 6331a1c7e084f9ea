"""Aborted parked writes, as `tests/functional/test_aborted_writes.py` aborts five hundred."""

from __future__ import annotations

from pathlib import Path

from tests.support import oracles
from tests.support.aborts import WAYS, Chapter, rounds
from tests.support.faultfs import FaultFs
from tests.torture.programme import Result

name = "aborts"
goal = 10_000
what = (
    "Writes that are parked, or hang in the storage, and are aborted: ABORT TASK, task set, LUN "
    "and target resets, logout, a dropped connection; none of them may ever land"
)
ROUNDS = 3 * len(WAYS)


def missing() -> str | None:
    absent = oracles.have("qemu-img")
    return f"{absent[0]} is not installed" if absent else oracles.missing_for_fuse()


def run(seed: int, directory: Path) -> Result:
    """One daemon; an episode is an aborted write."""
    source = directory / "source"
    source.mkdir()
    journal = ("auto", "off")[seed % 2]
    with FaultFs(source, directory / "mount") as storage:
        chapter = Chapter(storage, directory, seed=seed, journal=journal)
        return Result(episodes=chapter.play(rounds(seed, range(ROUNDS))))
