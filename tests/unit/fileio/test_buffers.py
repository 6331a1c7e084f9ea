"""Buffers: alignment, length, reuse and its bound."""

from __future__ import annotations

import ctypes

import pytest

from ploopd.fileio.buffers import PAGE, BufferPool


@pytest.mark.parametrize("length", [1, 512, 4095, 4096, 4097, 65536, 100_000, (1 << 20) + 1])
def test_a_buffer_is_page_aligned_and_exactly_long(length: int) -> None:
    buffer = BufferPool().take(length)
    assert buffer.address % PAGE == 0
    assert len(buffer.view) == buffer.length == length
    buffer.view[-1:] = b"\x5a"
    assert ctypes.string_at(buffer.address + length - 1, 1) == b"\x5a"


def test_released_memory_is_taken_again() -> None:
    pool = BufferPool()
    first = pool.take(3000)
    address = first.address
    first.release()
    assert pool.cached == PAGE
    assert pool.take(4096).address == address
    assert pool.cached == 0


def test_releasing_twice_does_not_give_the_memory_to_two() -> None:
    pool = BufferPool()
    buffer = pool.take(4096)
    buffer.release()
    buffer.release()
    assert pool.outstanding == 0
    assert pool.take(4096).address != pool.take(4096).address


def test_no_more_than_the_limit_is_kept() -> None:
    pool = BufferPool(cache_limit=3 * PAGE)
    for buffer in [pool.take(PAGE) for _ in range(10)]:
        buffer.release()
    assert pool.cached == 3 * PAGE


def test_an_empty_buffer_is_refused() -> None:
    with pytest.raises(ValueError, match="0 bytes"):
        BufferPool().take(0)
