"""NOWAIT reads with back-off; writes to a disk are never inline."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

import pytest

from ploopd.errors import StorageError
from ploopd.fileio.inline import PATIENCE, SKIP_FIRST, SKIP_MOST, NowaitInline
from ploopd.fileio.oslayer import RealOs

VIEW = memoryview(bytearray(512))


class Answers(RealOs):
    """A kernel that answers reads and writes with what a test says."""

    def __init__(self) -> None:
        self.answer: int | OSError = 512
        self.calls = 0
        self.flags: set[int] = set()
        self.preadv = self.pwritev = self._call  # type: ignore[method-assign, assignment]

    def _call(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0, /) -> int:
        self.calls += 1
        self.flags.add(flags)
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer


def refusal(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def test_hits_are_always_tried() -> None:
    kernel = Answers()
    inline = NowaitInline(3, "image", kernel)
    assert all(inline.try_read(VIEW, 0) for _ in range(100))
    assert kernel.calls == 100
    assert kernel.flags == {os.RWF_NOWAIT}


def attempts(inline: NowaitInline, kernel: Answers, count: int) -> int:
    before = kernel.calls
    for _ in range(count):
        assert not inline.try_read(VIEW, 0)
    return kernel.calls - before


@pytest.mark.parametrize("answer", [refusal(errno.EAGAIN), 100, 0])
def test_misses_in_a_row_are_left_out_for_longer_and_longer(answer: int | OSError) -> None:
    kernel = Answers()
    kernel.answer = answer
    inline = NowaitInline(3, "image", kernel)
    assert attempts(inline, kernel, PATIENCE) == PATIENCE
    pause = SKIP_FIRST
    while pause <= SKIP_MOST:
        assert attempts(inline, kernel, pause) == 0
        assert attempts(inline, kernel, 1) == 1
        pause *= 2
    assert attempts(inline, kernel, 10 * (SKIP_MOST + 1)) == 10  # never longer than that
    kernel.answer = 512
    while not inline.try_read(VIEW, 0):
        pass
    assert all(inline.try_read(VIEW, 0) for _ in range(100))
    kernel.answer = refusal(errno.EAGAIN)
    assert attempts(inline, kernel, PATIENCE) == PATIENCE  # patient again after a hit


def test_a_file_system_without_nowait_is_not_asked_again() -> None:
    kernel = Answers()
    kernel.answer = refusal(errno.EOPNOTSUPP)
    inline = NowaitInline(3, "image", kernel)
    assert attempts(inline, kernel, 10 * SKIP_MOST) == 1
    assert kernel.flags == {os.RWF_NOWAIT}


@pytest.mark.parametrize("number", [errno.EIO, errno.EBUSY, errno.ENOTCONN, errno.ENOSPC])
def test_other_errors_are_the_storages_answer(number: int) -> None:
    kernel = Answers()
    kernel.answer = refusal(number)
    inline = NowaitInline(3, "image", kernel)
    with pytest.raises(StorageError) as caught:
        inline.try_read(VIEW, 8192)
    error = caught.value
    assert (error.errno, error.path, error.offset) == (number, "image", 8192)


def test_writes_are_not_even_tried() -> None:
    kernel = Answers()
    assert not NowaitInline(3, "image", kernel).try_write(VIEW, 0)
    assert kernel.calls == 0
