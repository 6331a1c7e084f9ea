"""VERIFY, WRITE AND VERIFY, SYNCHRONIZE CACHE, PRE-FETCH, READ DEFECT DATA."""

from __future__ import annotations

import errno

import pytest

from tests.support.memory_device import Completion, pattern
from tests.unit.scsi.harness import BLOCK, cdb, cdb10, cdb12, cdb16, make_bench

VERIFY = {10: 0x2F, 12: 0xAF, 16: 0x8F}
WRITE_VERIFY = {10: 0x2E, 12: 0xAE, 16: 0x8E}
SIZES = {10: cdb10, 12: cdb12, 16: cdb16}


@pytest.mark.parametrize("size", SIZES)
def test_compare(size: int) -> None:
    bench = make_bench()
    host = bench.login()
    data = pattern(4 * BLOCK, 1)
    host.good(cdb10(0x2A, 2, 4), data)
    host.good(SIZES[size](VERIFY[size], 2, 4, flags=0x02), data)
    wrong = bytearray(data)
    wrong[1000] ^= 1
    answer = host.send(SIZES[size](VERIFY[size], 2, 4, flags=0x02), bytes(wrong))
    assert answer.sense == (0xE, 0x1D00)
    assert answer.information == 1000
    assert bench.buffers.out == []


@pytest.mark.parametrize("size", SIZES)
def test_without_compare_the_data_does_not_matter(size: int) -> None:
    host = make_bench().login()
    host.good(SIZES[size](VERIFY[size], 2, 4), b"x" * 2048, expected=2048)
    host.good(SIZES[size](VERIFY[size], 2, 4, flags=0x10))


def test_compare_beyond_a_chunk() -> None:
    bench = make_bench(8 << 20)
    host = bench.login()
    data = pattern(3 << 20, 3)
    host.good(cdb10(0x2A, 5, 6144), data)
    host.good(cdb10(0x2F, 5, 6144, flags=0x02), data)
    wrong = bytearray(data)
    wrong[-1] ^= 1
    answer = host.send(cdb10(0x2F, 5, 6144, flags=0x02), bytes(wrong))
    assert answer.information == (3 << 20) - 1
    assert bench.buffers.largest <= 1 << 20


def test_one_block_compared_with_each() -> None:
    bench = make_bench(8 << 20)
    host = bench.login()
    block = pattern(BLOCK, 9)
    host.good(cdb16(0x93, 3, 5000), block)
    host.good(cdb16(0x8F, 3, 5000, flags=0x06), block)
    bench.device.data[4000 * BLOCK + 77] ^= 1
    answer = host.send(cdb16(0x8F, 3, 5000, flags=0x06), block)
    assert answer.sense == (0xE, 0x1D00)
    assert answer.information == 77


def test_reserved_byte_check() -> None:
    host = make_bench().login()
    for opcode, flags in ((0x2F, 0x04), (0x2E, 0x04), (0x2E, 0x06)):
        answer = host.send(cdb10(opcode, 0, 1, flags=flags), bytes(BLOCK))
        assert answer.sense == (5, 0x2400)
        assert answer.pointer == (1, 2)


def test_medium_errors_are_found_in_mapped_blocks() -> None:
    bench = make_bench()
    host = bench.login()
    bench.device.fail("read", errno.EIO, times=None)
    host.good(cdb10(0x2F, 0, 4096))  # a hole has no medium
    host.good(cdb10(0x2A, 0, 1), bytes(BLOCK))
    assert host.send(cdb10(0x2F, 0, 4096)).sense == (3, 0x1100)


def test_verify_is_not_bound_by_the_transfer_length() -> None:
    bench = make_bench(32 << 20)
    host = bench.login()
    host.good(cdb16(0x8F, 0, 65536))
    answer = host.send(cdb16(0x8F, 0, 65536, flags=0x02))
    assert (answer.sense, answer.pointer) == ((5, 0x2400), (10, None))


def test_verify_with_less_data_than_it_compares() -> None:
    host = make_bench().login()
    answer = host.send(cdb10(0x2F, 0, 2, flags=0x02), bytes(512), expected=512)
    assert answer.sense == (5, 0x0E03)


@pytest.mark.parametrize(
    "opcode", [*VERIFY.values(), *WRITE_VERIFY.values(), 0x34, 0x90, 0x35, 0x91]
)
def test_ranges(opcode: int) -> None:
    bench = make_bench()
    host = bench.login()
    make = {1: cdb10, 4: cdb16, 5: cdb12}[opcode >> 5]
    last = bench.unit.blocks
    host.good(make(opcode, last, 0))
    for lba, blocks in ((last, 1), (last + 1, 0), (last - 1, 2)):
        assert host.send(make(opcode, lba, blocks), bytes(1024)).sense == (5, 0x2100)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("flags", [0x00, 0x02, 0x10])
def test_write_and_verify(size: int, flags: int) -> None:
    bench = make_bench()
    host = bench.login()
    data = pattern(3 * BLOCK, 4)
    host.good(SIZES[size](WRITE_VERIFY[size], 1, 3, flags=flags), data)
    assert bytes(bench.device.data[BLOCK : 4 * BLOCK]) == data
    assert [(row.op, row.fua) for row in bench.device.log] == [("write", True), ("read", False)]


def test_write_and_verify_finds_what_was_not_written() -> None:
    bench = make_bench()
    host = bench.login()

    def spoil(row: object) -> None:
        bench.device.data[BLOCK + 5] ^= 1

    bench.device.on_execute = spoil
    answer = host.send(cdb10(0x2E, 1, 1, flags=0x02), pattern(BLOCK, 1))
    assert answer.sense == (0xE, 0x1D00)
    assert answer.information == 5


@pytest.mark.parametrize("size", SIZES)
def test_write_and_verify_with_little_data(size: int) -> None:
    bench = make_bench()
    host = bench.login()
    make, opcode = SIZES[size], WRITE_VERIFY[size]
    host.good(cdb10(0x2A, 0, 2), b"a" * 1024)
    host.good(make(opcode, 0, 2), b"b" * 512, expected=512)
    assert bytes(bench.device.data[:1024]) == b"b" * 512 + b"a" * 512
    host.good(make(opcode, 0, 1), b"c" * 200, expected=200)
    assert bytes(bench.device.data[:512]) == b"c" * 200 + b"b" * 312
    host.good(make(opcode, 0, 1), b"", expected=0)


@pytest.mark.parametrize("opcode", [0x35, 0x91])
def test_synchronize_cache(opcode: int) -> None:
    bench = make_bench()
    host = bench.login()
    make = cdb10 if opcode == 0x35 else cdb16
    host.good(make(opcode, 0, 0))
    assert [row.op for row in bench.device.log] == ["flush"]
    bench.device.fail("flush", errno.EIO)
    assert host.send(make(opcode, 0, 0)).sense == (3, 0x0C00)


def test_immediate_synchronize_does_not_wait() -> None:
    bench = make_bench(completion=Completion.MANUAL)
    host = bench.login()
    host.good(cdb10(0x35, 0, 0, flags=0x02))
    assert [operation.op for operation in bench.device.outstanding] == ["flush"]
    bench.device.complete()
    task = host.start(cdb10(0x35, 0, 0))
    assert task not in host.finished
    bench.device.complete()
    assert host.finished[-1] is task


@pytest.mark.parametrize("opcode", [0x34, 0x90])
def test_prefetch(opcode: int) -> None:
    host = make_bench().login()
    make = cdb10 if opcode == 0x34 else cdb16
    host.good(make(opcode, 0, 1))
    host.good(make(opcode, 0, 1, flags=0x02))
    if opcode == 0x34:
        host.good(cdb10(0x34, 0, 1, group=3))


def test_read_defect_data() -> None:
    host = make_bench().login()
    assert host.good(cdb("37 00 1d 00000000 00ff")) == bytes([0, 0x1D, 0, 0])
    assert host.good(cdb("b7 0d 00000000 000000ff")) == bytes([0, 0x0D, 0, 0, 0, 0, 0, 0])
    assert host.good(cdb("37 00 08 00000000 0002")) == bytes([0, 0x08])
