"""Kills at every step of a replace; `tests/crash/test_kill_replace.py` has one load for them."""

from __future__ import annotations

from pathlib import Path

from tests.support import oracles
from tests.support.killed_replace import MOST_CALLS, WAYS, kill_after_each
from tests.torture.programme import Result

name = "killreplace"
goal = 200
what = (
    "kill -9 under a verified load after each system call of a replace that changes a file, with a "
    "new name or the old one: the old chain or the new one is there, with every flushed write"
)


def missing() -> str | None:
    absent = oracles.have("qemu-img", "strace")
    return f"{absent[0]} is not installed" if absent else None


def run(seed: int, directory: Path) -> Result:
    """All calls of one way; an episode is a kill."""
    way = list(WAYS)[seed % len(WAYS)]
    return Result(episodes=kill_after_each(directory, way, range(1, MOST_CALLS), seed=seed))
