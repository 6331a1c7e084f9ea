"""Busy ranges against the definition of overlap."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ploopd.gate.parking import Op, Request
from ploopd.gate.ranges import BusyRanges
from tests.unit.gate.test_release import Owner

spans = st.tuples(
    st.integers(0, 400).map(lambda n: n * 4096),
    st.one_of(st.integers(1, 40).map(lambda n: n * 512), st.integers(1, 10).map(lambda n: n << 20)),
)


def change(number: int, offset: int, length: int) -> Request:
    return Request(
        Owner(), number, Op.WRITE, offset, length, None, lambda _: None, False, False, 0.0
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(spans, st.booleans()), max_size=20), st.lists(spans, max_size=6))
def test_overlap_is_found_exactly(
    script: list[tuple[tuple[int, int], bool]], questions: list[tuple[int, int]]
) -> None:
    ranges, busy = BusyRanges(), []
    for number, ((offset, length), ends) in enumerate(script):
        request = change(number, offset, length)
        ranges.add(request)
        busy.append(request)
        if ends:
            ranges.remove(busy.pop(0))
        for at, size in questions:
            wanted = any(e.offset < at + size and at < e.offset + e.length for e in busy)
            assert ranges.overlaps(at, size) is wanted
    assert ranges.count == len(busy)
    for request in busy:
        ranges.remove(request)
    assert not any(ranges.overlaps(at, size) for at, size in questions)
    assert not ranges._granules
    assert not ranges._wide
