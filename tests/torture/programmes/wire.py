"""Standby episodes on the wire, as `tests/functional/test_wire_episodes.py` plays sixty of them."""

from __future__ import annotations

from pathlib import Path

from tests.support import oracles
from tests.support.faultfs import FaultFs
from tests.support.wire import EPISODES, Chapter, plans
from tests.torture.programme import Result

name = "wire"
goal = 1000
what = (
    "Standby in and out under a verified load of depth 32 over iSCSI: EBUSY, ENOTCONN and EIO from "
    "data, BAT, copy-on-write and fsync, also from a storage that loses its cache; the top "
    "replaced by itself or by a copy"
)


def missing() -> str | None:
    absent = oracles.have("qemu-img")
    return f"{absent[0]} is not installed" if absent else oracles.missing_for_fuse()


def run(seed: int, directory: Path) -> Result:
    """One chapter: a new daemon with a journal, without, or with one and a lossy storage; in turn
    with threads instead of io_uring, without a write cache, and with O_DIRECT."""
    source = directory / "source"
    source.mkdir()
    journal, lossy = (("auto", False), ("off", False), ("on", True))[seed % 3]
    options = ((), ("--io", "threads"), ("--write-cache", "off"), ("--cache", "none"))[seed % 4]
    # Batches go on where the last one stopped, so that all kinds of episodes come in turn.
    numbers = range(seed * EPISODES, (seed + 1) * EPISODES)
    with FaultFs(source, directory / "mount") as storage:
        chapter = Chapter(
            storage, directory, seed=seed, journal=journal, lossy=lossy, options=options
        )
        summary = chapter.play(plans(seed, numbers))
    first = summary.first_completions()
    return Result(
        episodes=len(summary.seen),
        worst={"first completion ms": first[-1], "its median ms": first[len(first) // 2]},
    )
