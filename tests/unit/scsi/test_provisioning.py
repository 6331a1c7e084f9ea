"""UNMAP, WRITE SAME, GET LBA STATUS."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest

from ploopd.storage.device import Extent, ExtentKind
from tests.support.memory_device import Completion, pattern
from tests.unit.scsi.harness import (
    BLOCK,
    Bench,
    Initiator,
    ManualClock,
    cdb,
    cdb10,
    cdb16,
    make_bench,
)

CLUSTER = 1 << 20


def unmap(host: Initiator, *ranges: tuple[int, int]) -> tuple[bytes, bytes]:
    body = b"".join(struct.pack(">QIxxxx", lba, count) for lba, count in ranges)
    data = struct.pack(">HHxxxx", len(body) + 6, len(body)) + body
    return struct.pack(">B6xHx6x", 0x42, len(data)), data


def filled(size: int = 8 << 20, **rest: object) -> tuple[Bench, Initiator]:
    bench = make_bench(size, **rest)  # type: ignore[arg-type]
    bench.device.data[:] = pattern(size, 2)
    bench.device.allocated.update(range(size // CLUSTER))
    return bench, bench.login()


def test_unmap() -> None:
    bench, host = filled()
    before = bytes(bench.device.data)
    host.good(*unmap(host, (0, 2048), (4096, 10), (8, 0)))
    after = bytes(bench.device.data)
    assert after[:CLUSTER] == bytes(CLUSTER)
    assert after[CLUSTER : 4096 * BLOCK] == before[CLUSTER : 4096 * BLOCK]
    assert after[4096 * BLOCK : 4106 * BLOCK] == bytes(10 * BLOCK)
    assert after[4106 * BLOCK :] == before[4106 * BLOCK :]
    assert [row.op for row in bench.device.log] == ["discard", "discard"]
    assert bench.unit.stats.unmapped_bytes == 2058 * BLOCK


def test_unmap_of_nothing() -> None:
    bench, host = filled()
    host.good(*unmap(host))
    host.good(*unmap(host, (0, 0)))
    host.good(*unmap(host, (bench.unit.blocks, 0)))
    host.good(*unmap(host, *[(i // 2, 0) for i in range(256)]))
    host.good(struct.pack(">B6xHx6x", 0x42, 0))
    assert bench.device.log == []


def test_unmap_checks_all_before_any() -> None:
    bench, host = filled()
    for bad in ((bench.unit.blocks, 1), (bench.unit.blocks + 1, 0), (2**64 - 1, 2)):
        assert host.send(*unmap(host, (0, 8), bad)).sense == (5, 0x2100)
    assert bench.device.log == []


def test_unmap_limits() -> None:
    bench, host = filled()
    assert host.send(*unmap(host, *[(0, 1)] * 257)).sense == (5, 0x2600)
    big = make_bench(8 << 20)
    big.unit.blocks = 1 << 30
    other = big.login()
    answer = other.send(*unmap(other, (0, 1 << 20), (0, 1)))
    assert (answer.sense, answer.pointer) == ((5, 0x2600), (32, None))
    assert bench.device.log == big.device.log == []


def test_unmap_with_a_short_list() -> None:
    bench, host = filled()
    assert host.send(struct.pack(">B6xHx6x", 0x42, 7), bytes(7)).sense == (5, 0x1A00)
    command, data = unmap(host, (0, 8), (8, 8))
    assert host.send(command, data[:24], expected=24).sense == (5, 0x1A00)
    assert bench.device.log == []
    cut = struct.pack(">HHxxxx", 38, 40) + data[8:]  # the length ends inside a descriptor
    host.good(struct.pack(">B6xHx6x", 0x42, len(cut)), cut)
    assert len(bench.device.log) == 2


def test_unmap_anchor_is_refused() -> None:
    _, host = filled()
    command, data = unmap(host, (0, 8))
    answer = host.send(bytes([0x42, 1]) + command[2:], data)
    assert (answer.sense, answer.pointer) == ((5, 0x2400), (1, 0))


def test_unmap_without_write_cache_is_flushed() -> None:
    bench, host = filled(write_cache=False)
    host.good(*unmap(host, (0, 8)))
    assert [row.op for row in bench.device.log] == ["discard", "flush"]


@pytest.mark.parametrize("opcode", [0x41, 0x93])
@pytest.mark.parametrize("flags", [0, 0x08])
def test_write_same_of_zeros(opcode: int, flags: int) -> None:
    bench, host = filled()
    make = cdb10 if opcode == 0x41 else cdb16
    host.good(make(opcode, 100, 5000, flags=flags), bytes(BLOCK), expected=BLOCK)
    assert bytes(bench.device.data[100 * BLOCK : 5100 * BLOCK]) == bytes(5000 * BLOCK)
    assert bytes(bench.device.data[: 100 * BLOCK]) == pattern(100 * BLOCK, 2)
    assert [(row.op, row.unmap) for row in bench.device.log] == [("write_zeroes", bool(flags))]


@pytest.mark.parametrize("opcode", [0x41, 0x93])
@pytest.mark.parametrize("flags", [0, 0x08])
def test_write_same_of_a_pattern_is_never_unmapped(opcode: int, flags: int) -> None:
    bench, host = filled()
    make = cdb10 if opcode == 0x41 else cdb16
    block = pattern(BLOCK, 77)
    host.good(make(opcode, 100, 5000, flags=flags), block)
    assert bytes(bench.device.data[100 * BLOCK : 5100 * BLOCK]) == block * 5000
    assert {row.op for row in bench.device.log} == {"write"}
    assert bench.buffers.largest <= 1 << 20
    assert bench.buffers.out == []


def test_write_same_without_data() -> None:
    bench, host = filled()
    host.good(cdb16(0x93, 0, 8, flags=0x01), expected=0)
    host.good(cdb16(0x93, 8, 8, flags=0x08), expected=0)
    host.good(cdb10(0x41, 16, 8, flags=0x08), expected=0)
    assert bytes(bench.device.data[: 24 * BLOCK]) == bytes(24 * BLOCK)


@pytest.mark.parametrize("opcode", [0x41, 0x93])
@pytest.mark.parametrize("size", [0, 256, 1024])
def test_write_same_with_the_wrong_amount_of_data(opcode: int, size: int) -> None:
    bench, host = filled()
    make = cdb10 if opcode == 0x41 else cdb16
    for flags in (0, 0x08):
        if flags and not size:
            continue
        answer = host.send(make(opcode, 0, 1, flags=flags), bytes(size), expected=size)
        assert answer.sense == (5, 0x0E03)
    assert bench.device.log == []


def test_write_same_limits() -> None:
    bench = make_bench()
    bench.unit.blocks = 1 << 30
    host = bench.login()
    answer = host.send(cdb16(0x93, 0, 32769), bytes(BLOCK))
    assert (answer.sense, answer.pointer) == ((5, 0x2400), (10, None))
    answer = host.send(cdb10(0x41, 0, 0), bytes(BLOCK))
    assert (answer.sense, answer.pointer) == ((5, 0x2400), (7, None))
    assert host.send(cdb16(0x93, 1 << 30, 1), bytes(BLOCK)).sense == (5, 0x2100)
    assert bench.device.log == []


def test_write_same_without_write_cache_is_stable() -> None:
    bench, host = filled(write_cache=False)
    host.good(cdb10(0x41, 0, 8), bytes(BLOCK))
    host.good(cdb10(0x41, 0, 8), pattern(BLOCK, 1))
    assert all(row.fua for row in bench.device.log)


@pytest.mark.parametrize("bit", [1, 2, 4])
def test_obsolete_bits_and_anchor(bit: int) -> None:
    _, host = filled()
    for make, opcode in ((cdb10, 0x41), (cdb16, 0x93)):
        answer = host.send(make(opcode, 0, 1, flags=1 << bit), bytes(BLOCK))
        assert (answer.sense, answer.pointer) == ((5, 0x2400), (1, bit))


def test_errors_in_the_middle() -> None:
    bench, host = filled(32 << 20)
    bench.device.fail("write", errno.ENOSPC, start=5 << 20)
    assert host.send(cdb10(0x41, 0, 30000), pattern(BLOCK, 1)).sense == (7, 0x2707)
    bench.device.fail("write_zeroes", errno.EIO)
    assert host.send(cdb10(0x41, 0, 30000), bytes(BLOCK)).sense == (3, 0x0C00)
    bench.device.fail("discard", errno.EROFS)
    assert host.send(*unmap(host, (0, 8))).sense == (7, 0x2700)
    assert bench.buffers.out == []


def test_a_long_command_gives_way() -> None:
    later: list[object] = []
    bench = make_bench(32 << 20, clock=ManualClock(step=0.01), defer=later.append)
    host = bench.login()
    task = host.start(cdb10(0x41, 0, 32768), pattern(BLOCK, 1))
    turns = 0
    while later:
        assert task not in host.finished
        turns += 1
        later.pop(0)()  # type: ignore[operator]
    assert host.finished[-1] is task
    assert turns == 16
    assert bytes(bench.device.data[: 16 << 20]) == pattern(BLOCK, 1) * 32768


def test_what_a_deferred_command_starts_is_kicked() -> None:
    later: list[object] = []
    bench = make_bench(clock=ManualClock(step=0.01), defer=later.append)
    host = bench.login()
    task = host.start(cdb10(0x41, 0, 8192), pattern(BLOCK, 1))
    bench.device.completion = Completion.ON_KICK
    later.pop()()  # type: ignore[operator]
    assert later == []
    while bench.device.outstanding:
        bench.device.kick()
    assert host.finished[-1] is task
    assert bytes(bench.device.data) == pattern(BLOCK, 1) * 8192


def test_a_long_command_is_cut_into_pieces() -> None:
    bench = make_bench(32 << 20, cluster_size=1 << 16, completion=Completion.MANUAL)
    host = bench.login()
    task = host.start(cdb16(0x93, 127, 16 << 11), bytes(BLOCK))
    sizes = []
    while bench.device.outstanding:
        assert len(bench.device.outstanding) == 1
        sizes.append(bench.device.outstanding[0].length)
        bench.device.complete(1)
    assert host.finished[-1] is task
    assert sum(sizes) == 16 << 20
    assert sizes == [(4 << 20) - 127 * BLOCK, 4 << 20, 4 << 20, 4 << 20, 127 * BLOCK]


def status(host: Initiator, lba: int, length: int = 4096) -> list[tuple[int, int, int]]:
    data = host.good(struct.pack(">BBQIBB", 0x9E, 0x12, lba, length, 0, 0))
    assert struct.unpack_from(">I", data) == (len(data) - 4,)
    assert data[4:8] == bytes(4)
    return [struct.unpack_from(">QIBxxx", data, at) for at in range(8, len(data), 16)]


def test_get_lba_status() -> None:
    bench, host = filled(8 << 20)
    bench.device.allocated -= {2, 3}
    assert status(host, 0) == [(0, 4096, 0), (4096, 4096, 1), (8192, 8192, 0)]
    assert status(host, 5000) == [(5000, 3192, 1), (8192, 8192, 0)]
    assert status(host, 16383) == [(16383, 1, 0)]
    assert status(host, 0, 24) == [(0, 4096, 0)]
    assert status(host, 0, 40) == [(0, 4096, 0), (4096, 4096, 1)]


def test_get_lba_status_truncates() -> None:
    _, host = filled()
    for length in (0, 4, 8, 23):
        data = host.good(struct.pack(">BBQIBB", 0x9E, 0x12, 0, length, 0, 0))
        assert len(data) == length


def test_get_lba_status_beyond_the_end() -> None:
    bench, host = filled()
    for lba in (bench.unit.blocks, bench.unit.blocks + 1, 2**63, 2**64 - 1):
        answer = host.send(struct.pack(">BBQIBB", 0x9E, 0x12, lba, 24, 0, 0))
        assert answer.sense == (5, 0x2100)


def test_a_fragmented_map_is_not_looked_at_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million extents of one status would hold the event loop for seconds."""
    bench = make_bench(64 << 20)
    host = bench.login()
    seen = 0

    def fragments(offset: int, length: int) -> Iterator[Extent]:
        nonlocal seen
        for at in range(offset, offset + length, BLOCK):
            seen += 1
            yield Extent(offset=at, length=BLOCK, kind=ExtentKind.DATA, depth=0)

    monkeypatch.setattr(bench.device, "extents", fragments)
    data = host.good(cdb("9e 12 0000000000000010 00000400"))
    lba, count, status = struct.unpack_from(">QIB", data, 8)
    assert (lba, status, len(data)) == (0x10, 0, 24)
    assert 0 < count <= seen < 20_000
