"""How many files the daemon may have open."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.support import oracles
from tests.support.images import MIB, TOP_GUID, guid, write_delta, write_descriptor
from tests.support.serve import ServeProcess

pytestmark = pytest.mark.functional

DELTAS = 100
SIZE = DELTAS * MIB


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit (util-linux)")
def test_a_long_chain_needs_more_than_the_soft_limit(tmp_path: Path) -> None:
    """The limit of a login shell (here less) is for programs that use select(); ploopd does not."""
    generator = random.Random(9)
    content = bytearray(SIZE)
    rows = []
    for level in range(DELTAS):
        data = generator.randbytes(512)
        write_delta(tmp_path / f"{level}.hds", SIZE, {level: data})
        content[level * MIB : level * MIB + len(data)] = data
        last = level == DELTAS - 1
        rows.append((TOP_GUID if last else guid(level + 1), "Compressed", f"{level}.hds"))
    write_descriptor(tmp_path, SIZE, rows)
    expected = tmp_path / "expected.raw"
    expected.write_bytes(content)
    limit = ("prlimit", "--nofile=64:4096")
    with ServeProcess(tmp_path, directory=tmp_path, prefix=limit) as server:
        found = oracles.read_through_iscsi(str(server.url), tmp_path / "found.raw")
    oracles.assert_same_content(found, expected)
