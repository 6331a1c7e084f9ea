"""Capacity, LUNs, sense, power and diagnostics."""

from __future__ import annotations

import struct

import pytest

from ploopd.scsi.logical_unit import LogicalUnit
from ploopd.scsi.target import Target
from tests.support.memory_device import MemoryDevice
from tests.unit.scsi.harness import (
    IDENTITY,
    Bench,
    ManualClock,
    TestBuffers,
    cdb,
    make_bench,
)


class Huge(MemoryDevice):
    """A device whose size is only a number."""

    def __post_init__(self) -> None:
        pass


def huge(size: int) -> Bench:
    device, buffers = Huge(size), TestBuffers()
    unit = LogicalUnit(device, identity=IDENTITY, buffers=buffers, clock=ManualClock())
    target = Target("iqn.2026-11.org.example:huge")
    target.add_unit(0, unit)
    return Bench(device, buffers, unit, target)


def test_unit_is_ready() -> None:
    assert make_bench().login().good(cdb("00")) == b""


def test_unknown_operation_code() -> None:
    host = make_bench().login()
    for opcode in (0x01, 0x16, 0x17, 0x5E, 0x5F, 0x83, 0x84, 0x7F, 0x9C, 0xFF):
        answer = host.send(bytes([opcode]) + bytes(15))
        assert answer.sense == (5, 0x2000)


def test_unknown_service_action_points_at_byte_1() -> None:
    host = make_bench().login()
    for text in ("9e 11", "9e 00", "a3 0a", "a3 1f"):
        answer = host.send(cdb(text))
        assert answer.sense == (5, 0x2400)
        assert answer.pointer[0] == 1


def test_read_capacity() -> None:
    host = make_bench(4 << 20).login()
    assert host.good(cdb("25")) == struct.pack(">II", 8191, 512)
    data = host.good(cdb("9e 10 0000000000000000 00000020"))
    assert data == struct.pack(">QIBBBB16x", 8191, 512, 0, 3, 0xC0, 0)


@pytest.mark.parametrize("length", [*range(16), 32, 64])
def test_read_capacity_16_truncates(length: int) -> None:
    host = make_bench().login()
    whole = host.good(cdb("9e 10 0000000000000000 00000020"))
    data = host.good(bytes([0x9E, 0x10]) + bytes(8) + length.to_bytes(4, "big") + bytes(2))
    assert data == whole[:length]


def test_capacity_of_a_fully_provisioned_unit() -> None:
    host = make_bench(thin=False).login()
    assert host.good(cdb("9e 10 0000000000000000 00000020"))[14] == 0


def test_capacity_beyond_32_bits() -> None:
    host = huge(16 << 40).login()
    assert host.good(cdb("25"))[:4] == b"\xff\xff\xff\xff"
    data = host.good(cdb("9e 10 0000000000000000 00000020"))
    assert struct.unpack_from(">Q", data) == ((16 << 40) // 512 - 1,)


def test_capacity_at_an_lba_needs_pmi() -> None:
    host = make_bench().login()
    answer = host.send(cdb("25 00 00000001"))
    assert answer.sense == (5, 0x2400)
    assert answer.pointer == (2, None)
    assert host.good(cdb("25 00 00000001 0000 01"))[:4] == struct.pack(">I", 8191)
    answer = host.send(cdb("9e 10 0000000000000001 00000020"))
    assert answer.sense == (5, 0x2400)
    assert answer.pointer == (2, None)


def test_report_luns() -> None:
    bench = make_bench()
    for lun in (1, 255, 256, 0x3FFF):
        bench.target.add_unit(lun, bench.unit)
    host = bench.login()
    data = host.good(cdb("a0 00 00 000000 00001000"))
    assert struct.unpack_from(">II", data) == (40, 0)
    fields = [data[at : at + 8].hex() for at in range(8, len(data), 8)]
    assert fields == [
        "0000000000000000",
        "0001000000000000",
        "00ff000000000000",
        "4100000000000000",
        "7fff000000000000",
    ]
    for field in fields:
        assert host.nexus.itl(int(field, 16)) is not None
    assert host.good(cdb("a0 00 02 000000 00001000")) == data
    assert host.good(cdb("a0 00 01 000000 00001000")) == bytes(8)
    assert host.good(cdb("a0 00 00 000000 00000010")) == data[:16]


def test_report_luns_refusals() -> None:
    host = make_bench().login()
    answer = host.send(cdb("a0 00 00 000000 0000000f"))
    assert answer.sense == (5, 0x2400)
    assert answer.pointer == (6, None)
    answer = host.send(cdb("a0 00 03 000000 00000010"))
    assert answer.pointer == (2, None)


@pytest.mark.parametrize(
    "field", [0x0001 << 48, 0x0100 << 48, 0xC101 << 48, 0x8000 << 48, 1, 0x4001 << 48 | 1]
)
def test_missing_lun(field: int) -> None:
    bench = make_bench()
    host = bench.login()
    host.lun = 0
    assert host.nexus.itl(field) is None
    lun = field >> 48
    if field != lun << 48:
        return
    data = host.send(cdb("12 00 00 00 60"), lun=lun)
    assert (data.status, data.data[0], len(data.data)) == (0, 0x7F, 96)
    assert host.send(cdb("12 01 83 00 60"), lun=lun).sense == (5, 0x2500)
    assert host.send(cdb("00"), lun=lun).sense == (5, 0x2500)
    assert host.send(cdb("28"), lun=lun).sense == (5, 0x2500)
    sense = host.send(cdb("03 00 00 00 12"), lun=lun)
    assert sense.status == 0
    assert (sense.data[2], sense.data[12:14]) == (5, b"\x25\x00")
    luns = host.send(cdb("a0 00 00 000000 00000100"), lun=lun)
    assert luns.data == struct.pack(">I12x", 8)
    assert host.send(cdb("12 00 00 00 60 04"), lun=lun).sense == (5, 0x2400)


def test_flat_space_addressing_finds_the_same_unit() -> None:
    nexus = make_bench().login().nexus
    assert nexus.itl(0x4000 << 48) is nexus.itl(0)


def test_request_sense_without_anything_to_say() -> None:
    host = make_bench().login()
    assert host.good(cdb("03 00 00 00 ff")) == bytes.fromhex(
        "70 00 00 00 00 00 00 0a 00 00 00 00 00 00 00 00 00 00"
    )
    assert host.good(cdb("03 01 00 00 ff")) == bytes.fromhex("72 00 00 00 00 00 00 00")
    assert host.good(cdb("03 00 00 00 04")) == bytes.fromhex("70 00 00 00")


def test_start_stop_unit() -> None:
    bench = make_bench()
    host = bench.login()
    host.good(cdb("1b 00 00 00 01"))
    assert bench.device.log == []
    host.good(cdb("1b 00 00 00 00"))
    assert [row.op for row in bench.device.log] == ["flush"]
    host.good(cdb("1b 01 00 00 04"))
    assert len(bench.device.log) == 1
    host.good(cdb("00"))
    assert host.send(cdb("1b 00 00 00 02")).pointer == (4, 1)
    assert host.send(cdb("1b 00 00 00 10")).pointer == (4, 7)


def test_send_diagnostic() -> None:
    host = make_bench().login()
    host.good(cdb("1d 04"))
    assert host.send(cdb("1d 20")).sense == (5, 0x2400)
    assert host.send(cdb("1d 00 00 00 08")).sense == (5, 0x2400)


def test_lun_numbers() -> None:
    bench = make_bench()
    for lun in (-1, 0x4000, 0):
        with pytest.raises(ValueError, match=str(lun)):
            bench.target.add_unit(lun, bench.unit)


def test_removed_lun() -> None:
    bench = make_bench()
    host = bench.login()
    bench.target.remove_unit(0)
    assert host.nexus.itl(0) is None
    assert host.send(cdb("00")).sense == (5, 0x2500)
    assert bench.unit.itls == []
    bench.target.add_unit(0, bench.unit)
    assert host.send(cdb("00")).sense == (6, 0x2900)
