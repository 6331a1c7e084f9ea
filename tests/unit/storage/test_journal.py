"""The log of acknowledged changes: order, what a sync drops, what rewriting costs, accounting."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ploopd.storage.journal import RECORD_OVERHEAD, Journal, Zeroed

BLOCK = 4096


def block(byte: int, length: int = BLOCK) -> memoryview:
    return memoryview(bytes([byte]) * length)


def test_records_come_back_in_the_order_of_the_changes() -> None:
    journal = Journal(1 << 20)
    journal.wrote(BLOCK, block(1))
    journal.zeroed(0, 2 * BLOCK, unmap=True)
    journal.mark()
    journal.wrote(0, block(2))
    journal.zeroed(BLOCK, BLOCK, unmap=False)
    assert list(journal.records()) == [
        ((BLOCK, BLOCK), bytearray(block(1))),
        ((0, 2 * BLOCK), Zeroed.UNMAP),
        ((0, BLOCK), bytearray(block(2))),
        ((BLOCK, BLOCK), Zeroed.ZEROES),
    ]


def test_the_data_is_copied() -> None:
    journal = Journal(1 << 20)
    buffer = bytearray(b"a" * 512)
    journal.wrote(0, memoryview(buffer))
    buffer[:] = b"b" * 512
    assert list(journal.records()) == [((0, 512), bytearray(b"a" * 512))]


def test_a_range_that_is_changed_again_moves_to_the_end_and_costs_nothing_more() -> None:
    journal = Journal(1 << 20)
    for round_ in range(1000):
        journal.wrote(0, block(round_ % 251))
        journal.wrote(512, block(7, 1024))
    assert len(journal) == 2
    assert journal.used == journal.held == BLOCK + 1024 + 2 * RECORD_OVERHEAD
    journal.wrote(0, block(9))
    assert [key for key, _ in journal.records()] == [(512, 1024), (0, BLOCK)]
    journal.zeroed(0, BLOCK, unmap=False)
    assert journal.used == 1024 + 2 * RECORD_OVERHEAD
    journal.wrote(0, block(9))
    assert journal.data_bytes == BLOCK + 1024


def test_a_sync_drops_what_was_recorded_before_it_began_and_nothing_else() -> None:
    journal = Journal(1 << 20)
    journal.wrote(0, block(1))
    first = journal.mark()
    journal.wrote(0, block(2))
    second = journal.mark()
    journal.wrote(BLOCK, block(3))
    journal.drop(first)
    assert [content[0] for _, content in journal.records() if isinstance(content, bytearray)] == [
        2,
        3,
    ]
    journal.drop(second)
    journal.drop(first)  # an older sync that ends later
    assert [key for key, _ in journal.records()] == [(BLOCK, BLOCK)]
    journal.drop(journal.mark())
    assert not journal
    assert journal.used == 0


def test_memory_of_dropped_records_is_used_again_within_the_limit() -> None:
    """Writes of one length, then of another: never more memory than the limit."""
    limit = 64 * (BLOCK + RECORD_OVERHEAD)
    journal = Journal(limit)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for round_ in range(40):
        length = BLOCK if round_ % 4 else 2 * BLOCK
        tracemalloc.reset_peak()
        for index in range(limit // (length + RECORD_OVERHEAD)):
            journal.wrote(index * length, memoryview(bytes([round_]) * length))
            kept = dict(journal.records())
            assert kept[(index * length, length)] == bytearray([round_]) * length
            del kept
        _, peak = tracemalloc.get_traced_memory()
        assert peak - before <= limit + 8 * BLOCK
        journal.drop(journal.mark())
    tracemalloc.stop()


def test_reservations_count_and_are_forgotten_by_clear() -> None:
    journal = Journal(10_000)
    journal.reserve(9_000)
    assert not journal.fits(1_001)
    assert journal.fits(1_000)
    assert not journal
    assert journal.held == 0
    journal.wrote(0, block(1, 512))
    journal.release(9_000)
    assert journal.used == 512 + RECORD_OVERHEAD
    journal.reserve(100)
    journal.clear()
    assert journal.used == 0
    assert not journal


@pytest.mark.parametrize("step", [512, 8192, 32768, 65536])
def test_the_overhead_that_is_counted_is_what_python_takes_at_most(step: int) -> None:
    """Small records are the worst case, two in each bucket: the bound is one of memory, not of
    data."""
    journal = Journal(64 << 20)
    view = memoryview(bytes(512))
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for index in range(11_000):  # tables have just grown
        journal.wrote(step * index, view)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before <= journal.used


def written_latest(journal: Journal, stable: bytearray) -> bytearray:
    """`stable` with what the records come to, each byte written once."""
    result, touched = bytearray(stable), bytearray(len(stable))
    for (offset, length), change in reversed(journal.latest()):
        assert not any(touched[offset : offset + length])
        touched[offset : offset + length] = b"\1" * length
        after = bytes(length) if isinstance(change, Zeroed) else change
        result[offset : offset + length] = after
    return result


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.integers(0, 7), st.integers(1, 4)),
            st.tuples(st.just("zero"), st.integers(0, 7), st.integers(1, 4)),
            st.tuples(st.just("mark"), st.just(0), st.just(0)),
            st.tuples(st.just("drop"), st.integers(0, 5), st.just(0)),
        ),
        max_size=40,
    )
)
def test_replaying_what_is_left_over_what_was_dropped_gives_the_disk(
    steps: list[tuple[str, int, int]],
) -> None:
    journal = Journal(1 << 20)
    size = 12 * 512
    disk = bytearray(size)
    stable = bytearray(size)
    marks: list[tuple[int, bytes]] = []
    for number, (step, first, count) in enumerate(steps):
        offset, length = first * 512, count * 512
        if step == "write":
            disk[offset : offset + length] = bytes([number % 255 + 1]) * length
            journal.wrote(offset, memoryview(disk)[offset : offset + length])
        elif step == "zero":
            disk[offset : offset + length] = bytes(length)
            journal.zeroed(offset, length, unmap=bool(number % 2))
        elif step == "mark":
            marks.append((journal.mark(), bytes(disk)))
        elif marks:
            mark, content = marks.pop(min(first, len(marks) - 1))
            journal.drop(mark)
            marks = [each for each in marks if each[0] >= mark]
            stable[:] = content
        assert written_latest(journal, stable) == disk
        costs = [len(c) if isinstance(c, bytearray) else 0 for _, c in journal.records()]
        assert journal.used == journal.held == sum(costs) + RECORD_OVERHEAD * len(costs)
    for (offset, length), change in journal.records():
        after = change if isinstance(change, bytearray) else bytes(length)
        stable[offset : offset + length] = after
    assert stable == disk
