"""Reads of a device with a journal, from a storage that has lost writes and does not say so."""

from __future__ import annotations

import errno

import pytest

from ploopd.storage.device import Done
from ploopd.storage.journal import Journal
from ploopd.storage.journaled import JournaledDevice
from ploopd.storage.lane import LaneRequest
from tests.support.lane_device import LaneMemoryDevice
from tests.support.memory_device import Completion, MemoryDevice

SIZE = 4 << 20
OLD = b"o" * SIZE


class Setup:
    """Over a disk of "o": "n" was written to [512, 1536), and zeros to [1024, 2048); all is lost.

    `expected`: bytes [0, 4096) as they were acknowledged.
    """

    def __init__(self, completion: Completion = Completion.MANUAL, *, inline: bool = True) -> None:
        self.memory = MemoryDevice(
            SIZE, completion=completion, inline=inline, data=bytearray(OLD), cancellable=True
        )
        self.journal = Journal(1 << 20)
        self.device = JournaledDevice(self.memory, self.journal, lambda _: None)
        self.device.write(512, memoryview(b"n" * 1024), lambda _: None)
        self.device.write_zeroes(1024, 1024, lambda _: None)
        self.memory.complete()
        self.memory.data[:] = OLD
        self.expected = b"o" * 512 + b"n" * 512 + bytes(1024) + b"o" * 2048
        self.answers: list[object] = []

    def read_now(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        assert self.device.try_read(offset, memoryview(buffer))
        return bytes(buffer)

    def done(self) -> Done:
        return self.answers.append


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 4096), (0, 512), (512, 512), (1024, 512), (512, 1536), (2048, 512)]
)
def test_inline(offset: int, length: int) -> None:
    assert Setup().read_now(offset, length) == Setup().expected[offset : offset + length]


def test_the_slow_way() -> None:
    setup = Setup()
    buffer = bytearray(4096)
    setup.device.read(0, memoryview(buffer), setup.done())
    assert setup.answers == []
    setup.memory.complete()
    assert setup.answers == [None]
    assert buffer == setup.expected


def test_a_slow_read_has_what_was_recorded_meanwhile_or_nothing_older_than_its_beginning() -> None:
    setup = Setup()
    buffer = bytearray(4096)
    setup.device.read(0, memoryview(buffer), setup.done())
    assert setup.device.try_write(512, memoryview(b"x" * 512))
    setup.memory.complete()
    assert buffer == setup.expected[:512] + b"x" * 512 + setup.expected[1024:]


def test_a_read_that_fails_is_left_alone() -> None:
    setup = Setup()
    setup.memory.fail("read", errno.EIO, times=None)
    buffer = bytearray(4096)
    setup.device.read(0, memoryview(buffer), setup.done())
    setup.memory.complete()
    assert [getattr(each, "errno", None) for each in setup.answers] == [errno.EIO]
    assert buffer == bytes(4096)


def test_a_read_that_ends_after_the_volume_was_let_go_does_not_get_the_next_ones_records() -> None:
    setup = Setup()
    buffer = bytearray(4096)
    setup.device.read(0, memoryview(buffer), setup.done())
    setup.device.retire()
    setup.memory.complete()
    assert setup.answers == [None]
    assert buffer == OLD[:4096]


def test_what_is_not_done_now_is_not_touched() -> None:
    setup = Setup(inline=False)
    buffer = bytearray(4096)
    assert not setup.device.try_read(0, memoryview(buffer))
    assert buffer == bytes(4096)


def test_a_flush_ends_it() -> None:
    """What was flushed is the storage's: it answers for it."""
    setup = Setup(Completion.AT_ONCE)
    setup.device.flush(setup.done())
    assert setup.answers == [None]
    assert setup.read_now(0, 4096) == OLD[:4096]


def test_a_write_larger_than_the_journal_is_not_hidden_once_it_is_acknowledged() -> None:
    memory = MemoryDevice(SIZE, completion=Completion.AT_ONCE, data=bytearray(OLD))
    device = JournaledDevice(memory, Journal(16 << 10), lambda _: None)
    assert device.try_write(0, memoryview(b"1" * 4096))
    answers: list[object] = []
    device.write(0, memoryview(b"2" * 32768), answers.append)
    assert answers == [None]
    buffer = bytearray(8192)
    assert device.try_read(0, memoryview(buffer))
    assert buffer == b"2" * 8192


def test_the_lane_takes_no_read_of_what_is_recorded() -> None:
    memory = LaneMemoryDevice(SIZE, bytearray(OLD))
    journal = Journal(1 << 20)
    device = JournaledDevice(memory, journal, lambda _: None)
    journal.wrote(4096, memoryview(b"n" * 512))
    taken = []
    for offset, length in ((0, 4096), (0, 8192), (4096, 512), (4608, 512)):
        request = LaneRequest()
        request.offset, request.length, request.writing = offset, length, False
        taken.append(device.lane.begin(request))
    assert taken == [True, False, False, True]
