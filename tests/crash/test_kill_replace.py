"""kill -9 after the single steps of a replace: what is opened next is the old or the new chain."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import oracles
from tests.support.killed_replace import MOST_CALLS, kill_after_each

pytestmark = [pytest.mark.functional, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def strace() -> None:
    if oracles.have("strace"):
        pytest.skip("strace is not installed: apt-get install strace")


@pytest.mark.parametrize(("way", "stride"), [("new name", 1), ("old name kept", 3)])
def test_killed_after_every_step_the_chain_is_the_old_or_the_new_one(
    way: str, stride: int, tmp_path: Path
) -> None:
    """`stride`: of how many calls one is chosen; `make torture` kills after each, both ways."""
    assert kill_after_each(tmp_path, way, range(1, MOST_CALLS, stride), seed=0) > 4
