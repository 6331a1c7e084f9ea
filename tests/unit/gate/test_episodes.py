"""Random standby episodes in virtual time, checked by a model of order and exactly-once."""

from __future__ import annotations

import os

import pytest

from tests.support.episodes import play

EPISODES = int(os.environ.get("PLOOPD_EPISODES", "400"))
"""How many; tests/property/test_virtual.py plays many more, without an event loop."""


@pytest.mark.timeout(600)
def test_no_episode_contradicts_the_model() -> None:
    entered = play(range(EPISODES))
    assert entered > EPISODES // 4  # or the episodes would prove nothing
