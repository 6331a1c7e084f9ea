"""Any 16 bytes are a CDB: every one of them ends with a status, and leaves nothing behind."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ploopd.scsi.commands.command import Command, Standby
from ploopd.scsi.commands.table import COMMANDS
from ploopd.scsi.task import Status, Task
from tests.support.memory_device import Completion
from tests.unit.scsi.harness import Bench, Initiator, cdb, make_bench

OPCODES = sorted({row.opcode for row in COMMANDS})
STATUSES = {Status.GOOD, Status.CHECK_CONDITION}


def run(bench: Bench, host: Initiator, command: bytes, expected: int | None, seed: int) -> Task:
    """Send a CDB with as much data-out as it asks for, or as the transport says it has."""
    host.finished.clear()
    task = Task(tag=1, lun=0, cdb=command, on_complete=host.finished.append, expected_out=expected)
    if host.nexus.prepare(task):
        size = task.data_out_length if expected is None else min(task.data_out_length, expected)
        task.data_out = memoryview(bytes([seed]) * size)
        host.nexus.execute(task)
    assert host.finished.pop() is task
    assert not host.finished
    assert task.status in STATUSES
    assert bool(task.sense) == (task.status == Status.CHECK_CONDITION)
    if task.command is not None and task.status == Status.GOOD:
        limit = task.command.allocation_length(command)
        if limit is not None:
            assert len(task.data_in) <= limit
    task.release()
    assert bench.buffers.out == []
    assert len(bench.unit.tasks) == 0
    assert not host.nexus.tasks
    return task


@settings(max_examples=400, deadline=None)
@given(st.binary(min_size=16, max_size=16), st.integers(0, 255))
@example(bytes(16), 0)
def test_random_bytes(command: bytes, seed: int) -> None:
    bench = make_bench(1 << 20)
    run(bench, bench.login(), command, None, seed)


@settings(max_examples=1500, deadline=None)
@given(
    st.sampled_from(COMMANDS),
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=16, max_size=16),
    st.one_of(st.none(), st.sampled_from([0, 1, 200, 512, 1024, 4096])),
    st.integers(0, 255),
)
def test_valid_bits_with_random_values(
    row: Command, values: bytes, thinner: bytes, expected: int | None, seed: int
) -> None:
    """CDBs that pass the reserved-bit check: random values under the usage map, often small."""
    bench = make_bench(1 << 20)
    masked = bytearray(16)
    for index in range(1, row.length):
        masked[index] = values[index] & row.mask[index]
        if thinner[index] & 3:
            masked[index] &= 1 if index < row.length - 3 else 7
    masked[0] = row.opcode
    if row.service_action is not None:
        masked[1] = masked[1] & 0xE0 | row.service_action
    task = run(bench, bench.login(), bytes(masked), expected, seed)
    assert task.command is not None
    assert task.command.name == row.name


@pytest.mark.parametrize("opcode", range(256))
def test_every_opcode_with_all_bits_set_or_clear(opcode: int) -> None:
    bench = make_bench(1 << 20)
    host = bench.login()
    for fill in (0x00, 0xFF, 0x55, 0xAA):
        run(bench, host, bytes([opcode]) + bytes([fill]) * 15, None, fill)


PLAIN = {
    "INQUIRY": cdb("12 00 00 00 60"),
    "REPORT LUNS": cdb("a0 00 00 000000 00000100"),
    "MODE SELECT(6)": cdb("15 10 00 00 00"),
    "MODE SENSE(6)": cdb("1a 00 3f 00 ff"),
    "MODE SENSE(10)": cdb("5a 00 3f 00 000000 00ff"),
    "GET LBA STATUS": cdb("9e 12 0000000000000000 00000100"),
}


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: row.name)
def test_what_answers_while_the_storage_is_away(row: Command) -> None:
    """The table's standby column is true: the one kind never starts a device operation, the other
    kind waits for it."""
    bench = make_bench(completion=Completion.MANUAL)
    host = bench.login()
    size = row.length
    command = bytearray(
        PLAIN.get(row.name, bytes([row.opcode, row.service_action or 0]) + bytes(14))
    )
    data = bytes(4096)
    if row.extent is not None and row.standby is Standby.DEVICE:
        command[{6: 4, 10: 8, 12: 9, 16: 13}[size]] = 1
        if row.name.startswith("VERIFY"):
            command[1] = 0x02
    if row.name == "UNMAP":
        command[8] = 24
        data = bytes.fromhex("0016 0010 00000000 0000000000000000 00000001 00000000")
    task = host.start(bytes(command), data)
    if row.standby is Standby.ANSWERS:
        assert host.finished[-1] is task
        assert task.status == Status.GOOD
        assert bench.device.outstanding == []
    else:
        assert task not in host.finished
        assert len(bench.device.outstanding) == 1
