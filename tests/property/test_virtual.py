"""Standby episodes in virtual time, by the hundred thousand: see tests/support/virtual."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.virtual.choices import Recorded, Replayed, seeded, shrink
from tests.support.virtual.play import play_in_parallel, problem

EPISODES = int(os.environ.get("PLOOPD_EPISODES", "100000"))
"""How many; `python -m tests.torture virtual` plays more of them."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_episode_contradicts_the_model() -> None:
    totals = play_in_parallel(range(EPISODES))
    assert totals["episodes"] == EPISODES
    # Or the episodes would prove nothing:
    for what in ("released", "replaced", "cancelled"):
        assert totals[what] > EPISODES, what
    assert totals["expired"] > EPISODES // 4


@settings(max_examples=1500, deadline=None)
@given(choices=st.lists(st.integers(0, 255), max_size=300))
def test_no_story_that_hypothesis_can_think_of_contradicts_the_model(choices: list[int]) -> None:
    assert not problem(Replayed(choices))


def test_an_episode_is_a_function_of_its_seed() -> None:
    stories = []
    for _ in range(2):
        recorded, story = Recorded(seeded(7)), list[str]()
        assert not problem(recorded, story)
        stories.append((recorded.taken, story))
    assert stories[0] == stories[1]
    assert len(stories[0][1]) > 20
    replayed: list[str] = []
    assert not problem(Replayed(stories[0][0]), replayed)
    assert replayed == stories[0][1]


def test_a_failing_list_is_made_as_short_and_low_as_one_step_can() -> None:
    def fails(choices: Sequence[int]) -> bool:
        return sum(choices) >= 300 and 7 in choices

    found = shrink(list(range(200)), fails)
    assert fails(found)
    for index, choice in enumerate(found):
        assert not fails([*found[:index], *found[index + 1 :]])
        assert choice == 7 or not fails([*found[:index], choice - 1, *found[index + 1 :]])
