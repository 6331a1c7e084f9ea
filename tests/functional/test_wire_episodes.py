"""Sixty standby episodes under a load of depth 32, and what they must never do."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.faultfs import FaultFs
from tests.support.wire import ERRNOS, FAILING, WAYS, Chapter, Plan, plans

pytestmark = [pytest.mark.functional, pytest.mark.fuse, pytest.mark.slow, pytest.mark.timeout(180)]

PROMISED_MS = 100.0
"""From the release of parked requests to the first answer."""


def sixty() -> list[Plan]:
    return plans(20261122, range(60))


def test_the_sixty_are_of_every_kind() -> None:
    seen = {(plan.errno, plan.failing) for plan in sixty()}
    assert seen == {(number, failing) for number in ERRNOS for failing in FAILING}
    assert {(plan.failing, plan.way) for plan in sixty()} == {
        (failing, way) for failing in FAILING for way in WAYS
    }


@pytest.mark.parametrize(
    ("number", "journal", "lossy"),
    [
        pytest.param(errno.EBUSY, "auto", False, id="EBUSY"),
        pytest.param(errno.ENOTCONN, "off", False, id="ENOTCONN-no-journal"),
        pytest.param(errno.EIO, "auto", True, id="EIO-and-a-lost-cache"),
    ],
)
def test_nothing_but_latency(
    number: int,
    journal: str,
    lossy: bool,
    storage: FaultFs,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """0 errors at the initiator, 0 blocks that are not what they must be, no answer twice."""
    mine = [plan for plan in sixty() if plan.errno == number]
    chapters = [mine[:10], mine[10:]]
    for place, some in enumerate(chapters):
        seed = number * 10 + place
        chapter = Chapter(storage, tmp_path, seed=seed, journal=journal, lossy=lossy)
        summary = chapter.play(some)
        with capsys.disabled():
            print(f"\n  {errno.errorcode[number]}: {summary}")
        record_property("episodes", str(summary))
        assert len(summary.seen) == len(some)
        assert all(each.parked for each in summary.seen)
        # A clock on a busy machine: the best quarter must keep the promise.
        assert summary.first_completions()[len(some) // 4] <= PROMISED_MS
