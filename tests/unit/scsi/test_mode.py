"""MODE SENSE and MODE SELECT: values, masks, refusals, and what a change does."""

from __future__ import annotations

import errno
import struct

import pytest

from tests.unit.scsi.harness import BLOCK, INITIATOR, Initiator, cdb, cdb10, make_bench

CODES = {0x01: 12, 0x08: 20, 0x0A: 12, 0x1C: 12}


def sense6(host: Initiator, code: int, control: int = 0) -> bytes:
    """The mode page alone (DBD)."""
    return host.good(bytes([0x1A, 0x08, control << 6 | code, 0, 0xFF, 0]) + bytes(10))[4:]


def select6(page: bytes) -> tuple[bytes, bytes]:
    data = bytes(4) + page
    return bytes([0x15, 0x10, 0, 0, len(data), 0]) + bytes(10), data


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("control", [0, 1, 2])
def test_pages(code: int, control: int) -> None:
    page = sense6(make_bench().login(), code, control)
    assert len(page) == CODES[code]
    assert page[:2] == bytes([code, CODES[code] - 2])


def test_all_pages_are_the_single_ones() -> None:
    host = make_bench().login()
    assert sense6(host, 0x3F) == b"".join(sense6(host, code) for code in CODES)
    data = host.good(cdb("1a 08 3f ff ff"))
    assert data[4:] == sense6(host, 0x3F)


def test_changeable_values() -> None:
    host = make_bench().login()
    caching, control = sense6(host, 0x08, 1), sense6(host, 0x0A, 1)
    assert caching[2:] == bytes([0x04]) + bytes(17)
    assert control[2:] == bytes([0x04, 0, 0x08]) + bytes(7)
    assert not any(sense6(host, 0x01, 1)[2:])
    assert not any(sense6(host, 0x1C, 1)[2:])


@pytest.mark.parametrize("write_cache", [True, False])
def test_write_cache_is_reported(write_cache: bool) -> None:
    host = make_bench(write_cache=write_cache).login()
    expected = 0x04 if write_cache else 0
    assert sense6(host, 0x08)[2] == expected
    assert sense6(host, 0x08, 2)[2] == expected


def test_headers_and_block_descriptors() -> None:
    host = make_bench(4 << 20).login()
    data = host.good(cdb("1a 00 08 00 ff"))
    assert data[:4] == bytes([len(data) - 1, 0, 0x10, 8])
    assert data[4:12] == struct.pack(">II", 8192, BLOCK)
    data = host.good(cdb("5a 00 08 00 000000 00ff"))
    assert data[:8] == struct.pack(">HBBBBH", len(data) - 2, 0, 0x10, 0, 0, 8)
    assert data[8:16] == struct.pack(">II", 8192, BLOCK)
    data = host.good(cdb("5a 10 08 00 000000 00ff"))
    assert data[:8] == struct.pack(">HBBBBH", len(data) - 2, 0, 0x10, 1, 0, 16)
    assert data[8:24] == struct.pack(">QII", 8192, 0, BLOCK)
    data = host.good(cdb("5a 18 08 00 000000 00ff"))
    assert data[6:8] == b"\0\0"
    assert data[8] == 0x08


def test_write_protect_shows_in_the_header() -> None:
    assert make_bench(read_only=True).login().good(cdb("1a 08 3f 00 ff"))[2] == 0x90


def test_allocation_length_truncates() -> None:
    host = make_bench().login()
    whole = host.good(cdb("1a 00 3f 00 ff"))
    assert host.good(cdb("1a 00 3f 00 04")) == whole[:4]
    assert host.good(cdb("1a 00 3f 00 00")) == b""
    assert whole[0] == len(whole) - 1


def test_refusals_of_mode_sense() -> None:
    host = make_bench().login()
    assert host.send(cdb("1a 00 c8 00 ff")).sense == (5, 0x3900)
    answer = host.send(cdb("1a 00 05 00 ff"))
    assert (answer.sense, answer.pointer) == ((5, 0x2400), (2, None))
    answer = host.send(cdb("1a 00 0a 05 ff"))
    assert (answer.sense, answer.pointer) == ((5, 0x2400), (3, None))


def test_software_write_protect() -> None:
    bench = make_bench()
    host = bench.login()
    page = bytearray(sense6(host, 0x0A))
    page[4] |= 0x08
    host.good(*select6(bytes(page)))
    assert sense6(host, 0x0A) == bytes(page)
    assert host.good(cdb("1a 08 3f 00 ff"))[2] == 0x90
    assert host.send(cdb10(0x2A, 0, 1), bytes(BLOCK)).sense == (7, 0x2702)
    host.good(cdb10(0x28, 0, 1))
    page[4] = 0
    host.good(*select6(bytes(page)))
    host.good(cdb10(0x2A, 0, 1), bytes(BLOCK))


def test_descriptor_sense() -> None:
    host = make_bench().login()
    page = bytearray(sense6(host, 0x0A))
    page[2] |= 0x04
    host.good(*select6(bytes(page)))
    answer = host.send(cdb10(0x28, 1 << 20, 1))
    assert answer.task.sense[:4] == bytes([0x72, 5, 0x21, 0])
    page[2] = 0
    host.good(*select6(bytes(page)))
    assert host.send(cdb10(0x28, 1 << 20, 1)).sense == (5, 0x2100)


def test_write_cache_takes_effect() -> None:
    bench = make_bench()
    host = bench.login()
    page = bytearray(sense6(host, 0x08))
    page[2] = 0
    host.good(*select6(bytes(page)))
    host.good(cdb10(0x2A, 0, 1), bytes(BLOCK))
    assert bench.device.log[-1].fua
    page[2] = 4
    host.good(*select6(bytes(page)))
    host.good(cdb10(0x2A, 0, 1), bytes(BLOCK))
    assert not bench.device.log[-1].fua


def test_select_10_with_a_block_descriptor() -> None:
    host = make_bench(4 << 20).login()
    page = bytearray(sense6(host, 0x08))
    page[2] = 0
    short = bytes(7) + b"\x08" + struct.pack(">II", 8192, BLOCK) + page
    host.good(cdb("55 10 0000000000 0024"), short)
    assert sense6(host, 0x08)[2] == 0
    long = bytes([0, 0, 0, 0, 1, 0, 0, 16]) + struct.pack(">QII", 0, 0, BLOCK) + page
    host.good(cdb("55 10 0000000000 002c"), long)


def test_refusals_are_all_or_nothing() -> None:
    bench = make_bench()
    host = bench.login()
    good = bytearray(sense6(host, 0x08))
    good[2] = 0
    bad = bytearray(sense6(host, 0x0A))
    bad[5] = 0x40
    answer = host.send(*select6(bytes(good) + bytes(bad)))
    assert answer.sense == (5, 0x2600)
    assert answer.pointer == (4 + 20 + 5, 6)
    assert bench.unit.modes.write_cache


@pytest.mark.parametrize(
    ("data", "sense", "pointer"),
    [
        (bytes(3), (5, 0x1A00), None),
        (bytes(4) + bytes([0x08]), (5, 0x1A00), None),
        (bytes(4) + bytes([0x08, 0x12]) + bytes(10), (5, 0x1A00), None),
        (bytes(4) + bytes([0x08, 0x11]) + bytes(17), (5, 0x2600), 5),
        (bytes(4) + bytes([0x05, 0x02]) + bytes(2), (5, 0x2600), 4),
        (bytes(4) + bytes([0x4A, 0x01, 0, 0]), (5, 0x2600), 4),
        (bytes(3) + b"\x08" + struct.pack(">II", 0, 4096), (5, 0x2600), 8),
        (bytes(3) + b"\x08" + struct.pack(">II", 5, 512), (5, 0x2600), 4),
        (bytes(3) + b"\x07" + bytes(7), (5, 0x1A00), None),
        (bytes(3) + b"\x08" + bytes(4), (5, 0x1A00), None),
    ],
)
def test_bad_parameter_lists(data: bytes, sense: tuple[int, int], pointer: int | None) -> None:
    host = make_bench().login()
    answer = host.send(bytes([0x15, 0x10, 0, 0, len(data), 0]) + bytes(10), data)
    assert answer.sense == sense
    if pointer is not None:
        assert answer.task.sense[15] & 0x40 == 0, "points into the parameter list"
        assert answer.pointer[0] == pointer


def test_saving_is_refused() -> None:
    answer = make_bench().login().send(cdb("15 11 00 00 00"))
    assert (answer.sense, answer.pointer) == ((5, 0x2400), (1, 0))


def test_empty_list_changes_nothing() -> None:
    host = make_bench().login()
    host.good(cdb("15 10 00 00 00"))
    host.good(cdb("55 10"))


def test_list_cut_by_the_transport() -> None:
    host = make_bench().login()
    assert host.send(cdb("15 10 00 00 18"), bytes(8), expected=8).sense == (5, 0x1A00)


def test_switching_the_write_cache_off_writes_it_out() -> None:
    """Afterwards the initiator sends no SYNCHRONIZE CACHE for what it has written before."""
    bench = make_bench()
    host, other = bench.login(), bench.login(f"{INITIATOR}2")
    off, on = bytearray(sense6(host, 0x08)), sense6(host, 0x08)
    off[2] = 0
    host.good(cdb10(0x2A, 0, 1), b"x" * BLOCK)
    host.good(*select6(bytes(off)))
    assert [row.op for row in bench.device.log] == ["write", "flush"]
    assert other.send(cdb("00")).sense == (6, 0x2A01)
    host.good(*select6(on))
    host.good(*select6(on))
    assert len(bench.device.log) == 2


def test_a_write_cache_that_cannot_be_written_out() -> None:
    bench = make_bench()
    host = bench.login()
    off = bytearray(sense6(host, 0x08))
    off[2] = 0
    bench.device.fail("flush", errno.EIO)
    assert host.send(*select6(bytes(off))).sense == (3, 0x0C00)
