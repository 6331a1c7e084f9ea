"""The merged map against the obvious dictionary."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ploopd.storage.mapping import TOP, UNMAPPED, ClusterMap, Run, Segment

SIZE = 32 << 10
table = st.lists(st.integers(0, 40), min_size=1, max_size=30)


def array(entries: list[int]) -> np.ndarray:
    return np.array(entries, dtype=np.uint32)


def expected(top: list[int], lower: list[list[int]]) -> list[tuple[int, int]]:
    """(level, host) of each cluster, by walking the chain for each."""
    found = []
    for index in range(len(top)):
        for level, entries in enumerate([top, *lower], TOP):
            if index < len(entries) and entries[index]:
                found.append((level, entries[index]))
                break
        else:
            found.append((UNMAPPED, 0))
    return found


def build(top: list[int], lower: list[list[int]]) -> ClusterMap:
    built = ClusterMap.from_top(array(top), size=len(top) * SIZE, cluster_size=SIZE)
    for level, entries in enumerate(lower, TOP + 1):
        built.add_delta(level, array(entries))
    return built


@given(table, st.lists(table, max_size=4))
def test_topmost_entry_wins_and_lower_deltas_may_be_shorter(
    top: list[int], lower: list[list[int]]
) -> None:
    built = build(top, lower)
    assert list(zip(built.level_view, built.view, strict=True)) == expected(top, lower)


@given(table, st.lists(table, max_size=3), st.data())
def test_runs_cover_the_range_and_point_at_the_right_bytes(
    top: list[int], lower: list[list[int]], data: st.DataObject
) -> None:
    built = build(top, lower)
    offset = data.draw(st.integers(0, len(top) * SIZE // 512 - 1)) * 512
    length = data.draw(st.integers(1, (len(top) * SIZE - offset) // 512)) * 512
    where = expected(top, lower)
    at = offset
    last: Run | None = None
    for run in built.runs(offset, length):
        assert run.offset == at
        for position in range(run.offset, run.offset + run.length, 512):
            level, host = where[position // SIZE]
            assert run.level == level
            if level:
                assert run.host + position - run.offset == host * SIZE + position % SIZE
        if last is not None and last.level == run.level:
            assert run.level != UNMAPPED
            assert last.host + last.length != run.host, "neighbours were not merged"
        at += run.length
        last = run
    assert at == offset + length


@given(table, st.lists(table, max_size=3), st.data())
def test_segments_are_the_runs_of_whole_clusters(
    top: list[int], lower: list[list[int]], data: st.DataObject
) -> None:
    built = build(top, lower)
    first = data.draw(st.integers(0, len(top) - 1))
    count = data.draw(st.integers(1, len(top) - first))
    segments = list(built.segments(first, count))
    runs = list(built.runs(first * SIZE, count * SIZE))
    assert [
        Run(s.level, s.host * SIZE, s.first * SIZE, s.clusters * SIZE) for s in segments
    ] == runs


def test_segments_are_merged_across_chunks() -> None:
    count = (1 << 16) * 2 + 5
    entries = np.zeros(count, dtype=np.uint32)
    entries[10 : (1 << 16) + 10] = np.arange(100, 100 + (1 << 16))
    built = ClusterMap.from_top(entries, size=count * SIZE, cluster_size=SIZE)
    assert list(built.segments(0, count)) == [
        Segment(UNMAPPED, 0, 0, 10),
        Segment(TOP, 100, 10, 1 << 16),
        Segment(UNMAPPED, 0, (1 << 16) + 10, count - (1 << 16) - 10),
    ]


@given(table, st.integers(0, 35 * SIZE))
def test_raw_base_shows_wherever_nothing_is_above_it(top: list[int], file_size: int) -> None:
    built = build(top, [])
    padded = built.add_raw(2, file_size)
    whole, rest = divmod(file_size, SIZE)
    for index, entry in enumerate(top):
        if entry:
            level = TOP, entry
        elif index < whole:
            level = 2, index
        elif index == whole and rest:
            level = 3, index
        else:
            level = UNMAPPED, 0
        assert (built.level_view[index], built.view[index]) == level
    assert padded == (3 in built.level_view)


def test_raw_disk_is_where_it_is() -> None:
    built = ClusterMap.linear(size=3 * SIZE + 512, cluster_size=SIZE)
    assert list(built.runs(0, 3 * SIZE + 512)) == [Run(TOP, 0, 0, 3 * SIZE + 512)]
    assert built.cluster_length(3) == 512


def test_changes_are_seen_at_once() -> None:
    built = build([0, 0, 7], [[5, 0, 0]])
    built.set(0, 9)
    built.clear(2)
    assert list(zip(built.level_view, built.view, strict=True)) == [(TOP, 9), (0, 0), (0, 0)]
    assert built.in_top() == 1


@given(st.lists(st.booleans(), min_size=1, max_size=300), st.data())
def test_next_mapped(mapped: list[bool], data: st.DataObject) -> None:
    built = build([int(each) for each in mapped], [])
    first = data.draw(st.integers(0, len(mapped)))
    wanted = next((i for i in range(first, len(mapped)) if mapped[i]), len(mapped))
    assert built.next_mapped(first, len(mapped)) == wanted


def test_entries_beyond_the_disk_are_left_out() -> None:
    built = ClusterMap.from_top(array([1, 2, 3, 4]), size=2 * SIZE, cluster_size=SIZE)
    assert list(built.view) == [1, 2]
    longer = ClusterMap.from_top(array([1]), size=2 * SIZE, cluster_size=SIZE)
    assert list(longer.view) == [1, 0]
