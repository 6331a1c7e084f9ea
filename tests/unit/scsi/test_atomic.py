"""COMPARE AND WRITE and ORWRITE: results, and that nothing comes in between."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ploopd.scsi.task import Task
from tests.support.memory_device import Completion, pattern
from tests.unit.scsi.harness import BLOCK, INITIATOR, Bench, caw, cdb10, cdb16, make_bench

OLD, NEW = pattern(2 * BLOCK, 1), pattern(2 * BLOCK, 2)


def test_equal_data_is_replaced() -> None:
    bench = make_bench()
    host = bench.login()
    host.good(cdb10(0x2A, 4, 2), OLD)
    host.good(caw(4, 2), OLD + NEW, expected=4 * BLOCK)
    assert bytes(bench.device.data[4 * BLOCK : 6 * BLOCK]) == NEW
    assert bench.buffers.out == []


@pytest.mark.parametrize("where", [0, 511, 512, 1023])
def test_miscompare_changes_nothing(where: int) -> None:
    bench = make_bench()
    host = bench.login()
    host.good(cdb10(0x2A, 4, 2), OLD)
    wrong = bytearray(OLD)
    wrong[where] ^= 0x80
    answer = host.send(caw(4, 2), bytes(wrong) + NEW)
    assert answer.sense == (0xE, 0x1D00)
    assert answer.information == where
    assert bytes(bench.device.data[4 * BLOCK : 6 * BLOCK]) == OLD
    assert bench.buffers.out == []


def test_unwritten_blocks_compare_as_zeros() -> None:
    bench = make_bench()
    host = bench.login()
    host.good(caw(0, 1), bytes(BLOCK) + NEW[:BLOCK])
    assert bytes(bench.device.data[:BLOCK]) == NEW[:BLOCK]


def test_flags_and_limits() -> None:
    bench = make_bench()
    host = bench.login()
    host.good(caw(0, 1, flags=0x18), bytes(2 * BLOCK))
    assert bench.device.log[-1].fua
    host.good(caw(0, 128), bytes(256 * BLOCK))
    answer = host.send(caw(0, 129), bytes(258 * BLOCK))
    assert (answer.sense, answer.pointer) == ((5, 0x2400), (13, None))
    assert host.send(caw(bench.unit.blocks, 1), bytes(1024)).sense == (5, 0x2100)
    assert host.send(caw(0, 1, flags=0x20), bytes(1024)).sense == (5, 0x2400)


def test_no_blocks_is_good_whatever_is_sent() -> None:
    bench = make_bench()
    host = bench.login()
    host.good(caw(0, 0))
    host.good(caw(0, 0, flags=0x18), bytes(BLOCK), expected=BLOCK)
    answer = host.send(caw(0, 0), bytes(512 * BLOCK), expected=512 * BLOCK)
    assert (answer.sense, answer.pointer) == ((5, 0x2400), (13, None))
    assert bench.device.log == []


@pytest.mark.parametrize("blocks", [1, 3])
def test_wrong_amount_of_data(blocks: int) -> None:
    bench = make_bench()
    host = bench.login()
    answer = host.send(caw(0, blocks), bytes(4 * BLOCK), expected=4 * BLOCK)
    assert answer.sense == (5, 0x0E03)
    assert host.send(caw(0, 3), bytes(4 * BLOCK)).sense == (5, 0x0E03)
    assert bench.device.log == []


def test_orwrite() -> None:
    bench = make_bench()
    host = bench.login()
    host.good(cdb10(0x2A, 1, 2), OLD)
    host.good(cdb16(0x8B, 1, 2), NEW)
    merged = bytes(a | b for a, b in zip(OLD, NEW, strict=True))
    assert bytes(bench.device.data[BLOCK : 3 * BLOCK]) == merged
    host.good(cdb16(0x8B, 1, 0))
    host.good(cdb16(0x8B, 1, 1, flags=0x08), NEW[:BLOCK])
    assert bench.device.log[-1].fua
    assert host.send(cdb16(0x8B, bench.unit.blocks, 1), NEW[:BLOCK]).sense == (5, 0x2100)


def test_orwrite_with_little_data_keeps_the_rest() -> None:
    bench = make_bench()
    host = bench.login()
    host.good(cdb10(0x2A, 0, 2), b"\x01" * 1024)
    host.good(cdb16(0x8B, 0, 2), b"\x02" * 700, expected=700)
    assert bytes(bench.device.data[:1024]) == b"\x03" * 700 + b"\x01" * 324


@pytest.mark.parametrize("op", ["read", "write"])
def test_errors(op: str) -> None:
    bench = make_bench()
    host = bench.login()
    bench.device.fail(op, errno.EIO)
    expected = (3, 0x1100) if op == "read" else (3, 0x0C00)
    answer = host.send(caw(7, 1), bytes(1024))
    assert answer.sense == expected
    assert answer.information == 7
    bench.device.fail(op, errno.EIO)
    assert host.send(cdb16(0x8B, 7, 1), bytes(512)).sense == expected
    assert bench.buffers.out == []


def test_readers_and_writers_wait_for_an_exclusive_range() -> None:
    bench = make_bench(completion=Completion.MANUAL)
    host, other = bench.login(), bench.login(INITIATOR + "2")
    swap = host.start(caw(4, 2), bytes(1024) + NEW)
    itl = other.nexus.itl(0)
    assert itl is not None
    assert itl.read_range(cdb10(0x28, 4, 1)) is None
    assert not itl.try_write(4 * BLOCK, memoryview(OLD)), "pieces of a streamed WRITE"
    read = other.start(cdb10(0x28, 5, 1))
    write = other.start(cdb10(0x2A, 5, 1), OLD[:BLOCK])
    away = other.start(cdb10(0x28, 6, 1))
    assert [o.offset for o in bench.device.outstanding] == [4 * BLOCK, 6 * BLOCK]
    bench.device.complete(1, index=1)
    assert other.finished[-1] is away
    bench.device.complete(1)
    assert [o.op for o in bench.device.outstanding] == ["write"]
    bench.device.complete(1)
    assert host.finished[-1] is swap
    assert [o.op for o in bench.device.outstanding] == ["read", "write"]
    bench.device.complete()
    assert bytes(read.data_in) == NEW[BLOCK:]
    assert other.finished[-2:] == [read, write]
    assert itl.read_range(cdb10(0x28, 4, 1)) is not None
    read.release()
    away.release()
    assert bench.buffers.out == []


def test_unmap_and_write_same_wait_for_an_exclusive_range() -> None:
    bench = make_bench(completion=Completion.MANUAL)
    host = bench.login()
    host.start(caw(4, 2), bytes(1024) + NEW)
    listing = struct.pack(">HHxxxxQIxxxx", 22, 16, 4, 1)
    host.start(struct.pack(">B6xHx6x", 0x42, len(listing)), listing)
    host.start(cdb10(0x41, 5, 1), bytes(BLOCK))
    assert [o.op for o in bench.device.outstanding] == ["read"]
    bench.device.complete(2)
    assert [o.op for o in bench.device.outstanding] == ["discard", "write_zeroes"]
    settle(bench)
    assert [task.status for task in host.finished[1:]] == [0, 0, 0]
    assert not any(bench.device.data)


def test_an_exclusive_task_waits_for_what_runs() -> None:
    bench = make_bench(completion=Completion.MANUAL)
    host = bench.login()
    host.start(cdb10(0x2A, 4, 2), OLD)
    swap = host.start(caw(4, 2), OLD + NEW)
    assert [o.op for o in bench.device.outstanding] == ["write"]
    kicks = bench.device.kicks
    bench.device.complete(1)
    assert [o.op for o in bench.device.outstanding] == ["read"]
    assert bench.device.kicks > kicks, "what was released must reach the kernel"
    bench.device.complete()
    bench.device.complete()
    assert swap.status == 0
    assert bytes(bench.device.data[4 * BLOCK : 6 * BLOCK]) == NEW


def settle(bench: Bench) -> None:
    while bench.device.outstanding:
        bench.device.complete(1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1 << 16), min_size=40, max_size=200))
def test_counting_with_compare_and_write(choices: list[int]) -> None:
    """Several nexuses increment one counter by READ and COMPARE AND WRITE while others READ and
    OR into it.  Whatever the order of completions, no increment is lost."""
    bench = make_bench(1 << 20, completion=Completion.MANUAL)
    hosts = [bench.login(f"{INITIATOR}{i}") for i in range(3)]
    flag = 1 << 63

    def block(value: int) -> bytes:
        return value.to_bytes(8, "big") * 64

    waiting: list[tuple[Task, int]] = []
    wins = 0
    guess = 0
    for choice in choices:
        host = hosts[choice % 3]
        match choice // 3 % 5:
            case 0 | 1:
                task = host.start(caw(0, 1), block(guess) + block(guess + 1))
                waiting.append((task, guess))
            case 2:
                host.start(cdb10(0x28, 0, 1))
            case _:
                if bench.device.outstanding:
                    bench.device.complete(1, index=choice % len(bench.device.outstanding))
        for task, value in [entry for entry in waiting if entry[0].state.name == "ENDED"]:
            waiting.remove((task, value))
            if task.status == 0:
                wins += 1
                guess = max(guess, value + 1)
    settle(bench)
    wins += sum(task.status == 0 for task, _ in waiting)
    assert all(task.state.name == "ENDED" for task, _ in waiting)
    assert bytes(bench.device.data[:BLOCK]) == block(wins)
    for task in [task for host in hosts for task in host.finished if task.cdb[0] == 0x28]:
        assert bytes(task.data_in) == bytes(task.data_in[:8]) * 64
    hosts[0].start(cdb16(0x8B, 0, 1), block(flag))
    settle(bench)
    assert bytes(bench.device.data[:BLOCK]) == block(wins | flag)
