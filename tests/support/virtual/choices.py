"""Where an episode's decisions come from: a seed, or a list of numbers that can be made shorter."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

Below = Callable[[int], int]
"""`below(n)` is the next decision: a number from 0 to n - 1.  0 is always the dullest choice."""


def seeded(seed: int) -> Below:
    """Decisions of one seed."""
    number = random.Random(seed).random
    return lambda n: int(number() * n)


class Recorded:
    """Decisions of another source, remembered in `taken`."""

    def __init__(self, source: Below) -> None:
        self._source = source
        self.taken: list[int] = []

    def __call__(self, n: int) -> int:
        choice = self._source(n)
        self.taken.append(choice)
        return choice


class Replayed:
    """Decisions from a list; the dullest ones when it has ended."""

    def __init__(self, choices: Sequence[int]) -> None:
        self._choices = iter(choices)

    def __call__(self, n: int) -> int:
        return next(self._choices, 0) % n


def shrink(choices: Sequence[int], fails: Callable[[Sequence[int]], bool]) -> list[int]:
    """A shorter list of smaller numbers that still fails: pieces are left out, then lowered."""
    best = list(choices)
    changed = True
    while changed:
        changed = False
        size = len(best)
        while size:
            start = 0
            while start < len(best):
                shorter = best[:start] + best[start + size :]
                if fails(shorter):
                    best, changed = shorter, True
                else:
                    start += size
            size //= 2
        for index, choice in enumerate(best):
            for lower in sorted({0, choice // 2, max(0, choice - 1)}):
                if lower < choice and fails(lowered := [*best[:index], lower, *best[index + 1 :]]):
                    best, changed = lowered, True
                    break
    return best
