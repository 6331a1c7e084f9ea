"""Link cuts under a disk on MooseFS; see `tests.torture.link_cuts`."""

from __future__ import annotations

from pathlib import Path

from tests.torture import link_cuts
from tests.torture.programme import Result
from tests.torture.storages import MooseFs as Storage

name = Storage.name
goal = 20
what = (
    f"MooseFS ({Storage.patience}): its client's link is cut under verified load of depth 32 "
    "and comes back; an operator or ploopd replaces the image by the same path or a copy"
)


def missing() -> str | None:
    return link_cuts.missing_for(name)


def run(seed: int, directory: Path) -> Result:
    """One file system, four cuts."""
    return link_cuts.play_batch(name, seed, directory)
