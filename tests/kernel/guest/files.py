"""Files that fill a mounted file system, and are looked at again later."""

from __future__ import annotations

import random
from pathlib import Path

from tests.kernel.guest.run import sh
from tests.support import oracles


def fill(directory: Path, seed: int, total: int) -> dict[str, str]:
    """Files of many sizes, synced; returns their digests by name."""
    generator = random.Random(seed)
    digests = {}
    written = 0
    while written < total:
        length = generator.choice([100, 5000, 70_000, 3_000_000])
        path = directory / f"d{generator.randint(0, 5)}" / f"f{written}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(generator.randbytes(length))
        digests[str(path.relative_to(directory))] = oracles.digest(path)
        written += length
    sh("sync", "-f", directory)
    return digests


def assert_tree(directory: Path, digests: dict[str, str]) -> None:
    found = {name: oracles.digest(directory / name) for name in digests}
    assert found == digests
