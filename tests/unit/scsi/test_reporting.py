"""REPORT SUPPORTED OPERATION CODES against the table and against what the unit really does."""

from __future__ import annotations

import struct

import pytest

from ploopd.scsi.commands.command import Command
from ploopd.scsi.commands.table import COMMANDS
from ploopd.scsi.task import Direction
from tests.unit.scsi.harness import Initiator, cdb, make_bench


def rsoc(option: int, opcode: int = 0, action: int = 0, length: int = 65535) -> bytes:
    return struct.pack(">BBBBHIBB", 0xA3, 0x0C, option, opcode, action, length, 0, 0).ljust(
        16, b"\0"
    )


def listed(data: bytes, size: int = 8) -> list[tuple[int, int, int, int]]:
    assert struct.unpack_from(">I", data) == (len(data) - 4,)
    return [
        (data[at], *struct.unpack_from(">H", data, at + 2), data[at + 5], data[at + 7])
        for at in range(4, len(data), size)
    ]


def test_all_commands() -> None:
    host = make_bench().login()
    rows = listed(host.good(rsoc(0)))
    assert rows == [
        (row.opcode, row.service_action or 0, int(row.service_action is not None), row.length)
        for row in COMMANDS
    ]
    assert len(rows) == len(set(rows))


def test_all_commands_with_timeouts() -> None:
    host = make_bench().login()
    plain, timed = listed(host.good(rsoc(0))), listed(host.good(rsoc(0x80)), 20)
    assert [(o, a, flags & 1, n) for o, a, flags, n in timed] == plain
    assert all(flags & 2 for _, _, flags, _ in timed)
    data = host.good(rsoc(0x80))
    assert data[12:16] == bytes([0, 10, 0, 0])


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: row.name)
def test_one_command(row: Command) -> None:
    host = make_bench().login()
    if row.service_action is None:
        data = host.good(rsoc(1, row.opcode))
        assert host.send(rsoc(2, row.opcode)).sense == (5, 0x2400)
        assert host.good(rsoc(3, row.opcode)) == data
        assert host.good(rsoc(3, row.opcode, 1))[1] == 1
    else:
        data = host.good(rsoc(2, row.opcode, row.service_action))
        assert host.send(rsoc(1, row.opcode)).sense == (5, 0x2400)
        assert host.good(rsoc(3, row.opcode, row.service_action)) == data
        assert host.good(rsoc(3, row.opcode, 0x1F))[1] == 1
        assert data[5] & 0x1F == row.service_action
    assert data[:4] == bytes([0, 3, 0, row.length])
    assert data[4] == row.opcode
    assert len(data) == 4 + row.length
    timed = host.good(rsoc(0x83, row.opcode, row.service_action or 0))
    assert timed[1] == 0x83
    assert len(timed) == len(data) + 12


def test_unsupported_command() -> None:
    host = make_bench().login()
    assert host.good(rsoc(1, 0x9C)) == bytes([0, 1, 0, 0])
    assert host.send(rsoc(4)).pointer == (2, 2)


def test_allocation_length_truncates() -> None:
    host = make_bench().login()
    assert host.good(rsoc(0, length=6)) == host.good(rsoc(0))[:6]


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: row.name)
def test_bits_outside_of_the_usage_map_are_refused(row: Command) -> None:
    """Every bit that the map says is not evaluated gives 05/24/00 pointing at exactly that bit."""
    bench = make_bench()
    host = bench.login()
    usage = usage_map(host, row)
    base = bytearray(16)
    base[0] = row.opcode
    base[1] = row.service_action or 0
    for byte in range(1, row.length):
        for bit in range(8):
            if usage[byte] >> bit & 1:
                continue
            if byte == 1 and row.service_action is not None and bit < 5:
                continue  # another service action
            command = bytearray(base)
            command[byte] |= 1 << bit
            answer = host.send(bytes(command), bytes(4096))
            assert answer.sense == (5, 0x2400), (byte, bit)
            assert answer.pointer == (byte, bit)
    assert bench.device.log == []


def usage_map(host: Initiator, row: Command) -> bytes:
    option = 1 if row.service_action is None else 2
    return host.good(rsoc(option, row.opcode, row.service_action or 0))[4:]


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: row.name)
def test_dpo_and_fua_are_where_the_mode_header_says(row: Command) -> None:
    if row.fua:
        assert row.usage[1] & 0x18 == 0x18
    if "VERIFY" in row.name:
        assert row.usage[1] & 0x18 == 0x10


def test_every_opcode_that_is_not_listed_is_refused() -> None:
    host = make_bench().login()
    known = {row.opcode for row in COMMANDS}
    for opcode in sorted(set(range(256)) - known):
        assert host.send(bytes([opcode]) + bytes(15)).sense == (5, 0x2000)
        assert host.good(rsoc(1, opcode))[1] == 1


def test_fully_provisioned_unit_has_no_unmap() -> None:
    host = make_bench(thin=False).login()
    assert 0x42 not in {row[0] for row in listed(host.good(rsoc(0)))}
    assert host.send(cdb("42")).sense == (5, 0x2000)
    for opcode in (0x41, 0x93):
        assert host.good(rsoc(1, opcode))[5] & 0x08 == 0
        answer = host.send(bytes([opcode, 0x08]) + bytes(14), bytes(512))
        assert answer.sense == (5, 0x2400)
        assert answer.pointer == (1, 3)


def test_table_is_consistent() -> None:
    for row in COMMANDS:
        assert row.length in (6, 10, 12, 16)
        assert {0: 6, 1: 10, 2: 10, 4: 16, 5: 12}[row.opcode >> 5] == row.length
        assert (row.data_out is None) == (row.direction is not Direction.FROM_INITIATOR)
        assert row.mask[row.length - 1] == 0, "control byte"
        if row.writes:
            assert row.direction is Direction.FROM_INITIATOR


def test_supported_task_management_functions() -> None:
    host = make_bench().login()
    assert host.good(cdb("a3 0d 00 000000 00000010")) == bytes([0xDE, 0x03, 0, 0])
    assert host.good(cdb("a3 0d 80 000000 00000010")) == bytes([0xDE, 0x03, 0, 12]) + bytes(12)
    assert host.good(cdb("a3 0d 80 000000 00000002")) == bytes([0xDE, 0x03])
