"""Playing many episodes, and telling about the one that failed."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from tests.support.virtual.choices import Below, Recorded, Replayed, seeded, shrink
from tests.support.virtual.episode import Episode


class ContradictionError(AssertionError):
    """An episode contradicted the model: its seed, and the shortest story that does so too."""


def play(seeds: Iterable[int]) -> Counter[str]:
    """Play the episodes of these seeds; returns totals.  Raises `ContradictionError`."""
    totals: Counter[str] = Counter()
    for seed in seeds:
        episode = Episode(seeded(seed))
        try:
            episode.play()
        except Exception as error:
            raise ContradictionError(explain(seed)) from error
        count(totals, episode)
    return totals


def play_in_parallel(seeds: range, *, batch: int = 2500) -> Counter[str]:
    """The same in as many processes as there are processors."""
    batches = [seeds[start : start + batch] for start in range(0, len(seeds), batch)]
    totals: Counter[str] = Counter()
    context = multiprocessing.get_context("spawn")  # a fork would copy the test run's threads
    with context.Pool(len(os.sched_getaffinity(0))) as pool:
        for part in pool.imap_unordered(play, batches):
            totals += part
    return totals


def count(totals: Counter[str], episode: Episode) -> None:
    totals["episodes"] += 1
    totals["commands"] += len(episode.commands)
    totals["released"] += episode.released
    totals["replaced"] += episode.replaced
    totals["cancelled"] += episode.cancelled
    totals["expired"] += episode.expired


def problem(below: Below, story: list[str] | None = None) -> str:
    """What is wrong with the episode of these decisions; empty for nothing."""
    try:
        Episode(below, story).play()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def explain(seed: int) -> str:
    """The story of a seed that fails, made as short as it goes."""
    recorded = Recorded(seeded(seed))
    first = problem(recorded)
    if not first:
        return f"seed {seed} fails only sometimes"

    def fails(choices: Sequence[int]) -> bool:
        return bool(problem(Replayed(choices)))

    choices = shrink(recorded.taken, bounded(fails, 4000))
    story: list[str] = []
    last = problem(Replayed(choices), story)
    return "\n".join([f"seed {seed}: {first}", f"choices {choices}: {last}", *story])


def bounded(fails: Callable[[Sequence[int]], bool], most: int) -> Callable[[Sequence[int]], bool]:
    """`fails` for the first calls; then nothing does, which ends the shrinking."""
    left = most

    def limited(choices: Sequence[int]) -> bool:
        nonlocal left
        left -= 1
        return left >= 0 and fails(choices)

    return limited
