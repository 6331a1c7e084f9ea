"""The journal over a disk that has lost everything unsynced, against a model that counts bytes.

Ranges are of all sizes, so that all tables of the index are used; the disk of the model has one
cell for each 64th of a bucket at the boundaries that matter, and nothing in between.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from ploopd.storage.journal import Journal

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
EDGES = sorted(
    {
        base + delta
        for base in (0, 64 * KIB, 128 * KIB, 4 * MIB, 8 * MIB, 256 * MIB, GIB, 16 * GIB, 64 * GIB)
        for delta in (-8 * KIB, -512, 0, 512, 4 * KIB, 64 * KIB)
        if base + delta >= 0
    }
)
"""Where ranges may begin and end."""
LARGEST_WRITE = 256 * KIB


@dataclass
class Model:
    """`cells[i]`: what the bytes between EDGES[i] and the next one were last set to; `stable`: what
    of it was synced."""

    cells: list[int] = field(default_factory=lambda: [0] * len(EDGES))
    stable: list[int] = field(default_factory=lambda: [0] * len(EDGES))
    journal: Journal = field(default_factory=lambda: Journal(1 << 40))
    marks: list[tuple[int, list[int]]] = field(default_factory=list)
    serial: int = 0

    def change(self, first: int, last: int, *, write: bool) -> None:
        offset, length = EDGES[first], EDGES[last] - EDGES[first]
        value = 0
        if write and length <= LARGEST_WRITE:
            self.serial = self.serial % 255 + 1
            value = self.serial
            self.journal.wrote(offset, memoryview(bytes([value]) * length))
        else:
            self.journal.zeroed(offset, length, unmap=True)
        self.cells[first:last] = [value] * (last - first)

    def mark(self) -> None:
        self.marks.append((self.journal.mark(), list(self.cells)))

    def drop(self, pick: int) -> None:
        if self.marks:
            mark, self.stable = self.marks[pick % len(self.marks)]
            self.journal.drop(mark)
            self.marks = [each for each in self.marks if each[0] > mark]

    def check(self) -> None:
        """The bytes after each edge and before it, and ranges over several edges."""
        recorded = [(key[0], key[0] + key[1]) for key, _ in self.journal.records()]
        for index, (start, end) in enumerate(pairwise(EDGES)):
            for at in {start, end - 512}:
                found = bytearray([self.stable[index]]) * 512
                overlaps = self.journal.overlaps(at, 512)
                assert overlaps or not any(low < at + 512 and at < high for low, high in recorded)
                self.journal.overlay(at, memoryview(found))
                assert found == bytes([self.cells[index]]) * 512, hex(at)
        self.check_wide(LARGEST_WRITE)

    def check_wide(self, largest: int) -> None:
        for first in range(0, len(EDGES) - 3, 2):
            last = first + 3
            length = EDGES[last] - EDGES[first]
            if length > largest:
                continue
            found, expected = bytearray(), bytearray()
            for index in range(first, last):
                size = EDGES[index + 1] - EDGES[index]
                found += bytes([self.stable[index]]) * size
                expected += bytes([self.cells[index]]) * size
            self.journal.overlay(EDGES[first], memoryview(found))
            assert found == expected


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(["write", "write", "zero"]),
            st.integers(0, len(EDGES) - 2),
            st.one_of(st.integers(1, 6), st.integers(1, len(EDGES) - 1)),
        ),
        st.tuples(st.sampled_from(["mark", "drop"]), st.integers(0, 5), st.just(0)),
    ),
    max_size=60,
)


def play(steps: list[tuple[str, int, int]]) -> None:
    model = Model()
    for step, first, count in steps:
        if step == "mark":
            model.mark()
        elif step == "drop":
            model.drop(first)
        else:
            model.change(first, min(first + count, len(EDGES) - 1), write=step == "write")
    model.check()


@settings(deadline=None, max_examples=150)
@given(STEPS)
def test_every_byte_is_as_the_last_change_has_left_it(steps: list[tuple[str, int, int]]) -> None:
    play(steps)


def test_many_random_steps() -> None:
    for seed in range(150):
        chance = random.Random(seed)
        steps = []
        for _ in range(chance.randrange(10, 120)):
            step = chance.choices(["write", "zero", "mark", "drop"], [6, 4, 1, 1])[0]
            count = chance.choice([1, 1, 2, 3, len(EDGES)])
            steps.append((step, chance.randrange(len(EDGES) - 1), chance.randint(1, count)))
        play(steps)


def test_nothing_is_left_of_what_was_dropped_or_cleared() -> None:
    journal = Journal(1 << 40)
    for ends in ("drop", "clear"):
        journal.wrote(0, memoryview(bytes(200 * KIB)))
        journal.zeroed(4096, 64 * GIB, unmap=True)
        journal.wrote(GIB, memoryview(bytes(512)))
        assert journal.overlaps(GIB, 512)
        assert journal.overlaps(63 * GIB, 512)
        journal.drop(journal.mark()) if ends == "drop" else journal.clear()
        assert not any(journal.overlaps(edge, 64 * KIB) for edge in EDGES)


def test_many_records_and_huge_ones_do_not_make_a_read_slow() -> None:
    """Counted in buckets and ranges looked at, not in time."""
    journal = Journal(1 << 40)
    for index in range(20_000):
        journal.wrote(index * 4096, memoryview(bytes(4096)))
        journal.zeroed(GIB + index * 16 * MIB, 16 * MIB, unmap=True)
    began = time.perf_counter()
    buffer = memoryview(bytearray(4096))
    for index in range(1000):
        at = GIB + index * 64 * MIB
        assert journal.overlaps(at, 4096)
        journal.overlay(at, buffer)
        assert not journal.overlaps(GIB - 4096, 4096)
    assert time.perf_counter() - began < 1.0, "all 40,000 would take a minute"
