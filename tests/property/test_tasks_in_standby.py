"""SCSI tasks while the device goes into standby and comes back: see tests/support/virtual/tasks."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ploopd.scsi.logical_unit import LogicalUnit
from ploopd.scsi.task import Status, Task
from tests.support.virtual.choices import Replayed, seeded
from tests.support.virtual.tasks import TaskEpisode

EPISODES = 2000


def play(seeds: range) -> None:
    for seed in seeds:
        TaskEpisode(seeded(seed)).play()


@pytest.mark.timeout(600)
def test_every_task_ends_once_and_nothing_lands_after_its_end() -> None:
    statuses: Counter[int] = Counter()
    how: Counter[str] = Counter()
    for seed in range(EPISODES):
        episode = TaskEpisode(seeded(seed))
        try:
            episode.play()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        statuses.update(episode.statuses)
        how.update(episode.ended.values())
    assert how["aborted"] > EPISODES
    for status in (Status.GOOD, Status.BUSY, Status.CHECK_CONDITION):
        assert statuses[status] > EPISODES // 10, status.name


@settings(max_examples=300, deadline=None)
@given(choices=st.lists(st.integers(0, 255), max_size=300))
def test_no_story_that_hypothesis_can_think_of_does_either(choices: list[int]) -> None:
    TaskEpisode(Replayed(choices)).play()


def test_a_unit_that_answers_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An abort that is answered while the write is still being executed."""

    def wrong(unit: LogicalUnit, task: Task, ended: object) -> None:
        abort(unit, task, lambda: None)
        ended()  # type: ignore[operator]
        unit.finish_aborted(task)

    abort = LogicalUnit.abort
    monkeypatch.setattr(LogicalUnit, "abort", wrong)
    with pytest.raises((AssertionError, KeyError, ValueError)):
        play(range(300))
