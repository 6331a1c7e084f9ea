"""Five hundred parked writes are aborted, and none of them ever lands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.aborts import CAUSES, WAYS, Chapter, rounds
from tests.support.faultfs import FaultFs

pytestmark = [pytest.mark.functional, pytest.mark.fuse, pytest.mark.slow, pytest.mark.timeout(120)]

ROUNDS = 24


def test_no_aborted_write_ever_lands(
    storage: FaultFs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ABORT TASK, resets, logout, a lost connection; parked, or hanging in the storage."""
    plans = rounds(20261122, range(ROUNDS))
    assert {plan.way for plan in plans} == set(WAYS)
    assert {plan.cause for plan in plans} == set(CAUSES)
    aborted = sum(
        Chapter(storage, tmp_path, seed=seed, journal=journal).play(some)
        for seed, journal, some in ((1, "auto", plans[:12]), (2, "off", plans[12:]))
    )
    with capsys.disabled():
        print(f"\n  {aborted} parked writes aborted in {ROUNDS} rounds: none has landed")
    assert aborted >= 500
