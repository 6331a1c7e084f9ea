"""READ and WRITE in all sizes: data, ranges, flags, residual cases, the short way."""

from __future__ import annotations

import errno

import pytest

from ploopd.errors import ParkTimeoutError
from ploopd.scsi.inquiry import MAX_TRANSFER_BLOCKS
from ploopd.scsi.task import Status, Task
from ploopd.scsi.task_management import TaskFunction, TmfResult
from tests.support.memory_device import Completion, pattern
from tests.unit.scsi.harness import BLOCK, Initiator, cdb, cdb10, cdb12, cdb16, make_bench

READS = {6: 0x08, 10: 0x28, 12: 0xA8, 16: 0x88}
WRITES = {6: 0x0A, 10: 0x2A, 12: 0xAA, 16: 0x8A}


def command(opcode: int, size: int, lba: int, blocks: int, flags: int = 0) -> bytes:
    match size:
        case 6:
            return bytes([opcode, lba >> 16 & 0x1F, lba >> 8 & 0xFF, lba & 0xFF, blocks & 0xFF]) + (
                bytes(11)
            )
        case 10:
            return cdb10(opcode, lba, blocks, flags=flags)
        case 12:
            return cdb12(opcode, lba, blocks, flags=flags)
    return cdb16(opcode, lba, blocks, flags=flags)


@pytest.mark.parametrize("size", [6, 10, 12, 16])
def test_write_then_read_back(size: int) -> None:
    bench = make_bench()
    host = bench.login()
    data = pattern(3 * BLOCK, size)
    host.good(command(WRITES[size], size, 7, 3), data)
    assert bytes(bench.device.data[7 * BLOCK : 10 * BLOCK]) == data
    assert host.good(command(READS[size], size, 7, 3)) == data
    assert bench.device.data[: 7 * BLOCK].strip(b"\0") == b""
    assert bench.buffers.out == []


def test_transfer_length_0_of_read_6_is_256_blocks() -> None:
    bench = make_bench()
    host = bench.login()
    assert len(host.good(command(0x08, 6, 0, 0))) == 256 * BLOCK


@pytest.mark.parametrize("size", [10, 12, 16])
@pytest.mark.parametrize("table", [READS, WRITES], ids=["read", "write"])
def test_transfer_length_0_moves_nothing(size: int, table: dict[int, int]) -> None:
    bench = make_bench()
    host = bench.login()
    assert host.good(command(table[size], size, 5, 0)) == b""
    assert host.good(command(table[size], size, bench.unit.blocks, 0)) == b""
    answer = host.send(command(table[size], size, bench.unit.blocks + 1, 0))
    assert answer.sense == (5, 0x2100)
    assert bench.device.log == []


@pytest.mark.parametrize("size", [6, 10, 12, 16])
@pytest.mark.parametrize("table", [READS, WRITES], ids=["read", "write"])
def test_beyond_the_end(size: int, table: dict[int, int]) -> None:
    bench = make_bench()
    host = bench.login()
    for lba, blocks in [(bench.unit.blocks, 1), (bench.unit.blocks - 1, 2), (2**21 - 1, 1)]:
        answer = host.send(command(table[size], size, lba, blocks), bytes(blocks * BLOCK))
        assert answer.sense == (5, 0x2100)
        assert answer.pointer == (2, None)
    assert bench.device.log == []


def test_lba_of_64_bits_does_not_wrap() -> None:
    host = make_bench().login()
    assert host.send(cdb16(0x88, 2**64 - 1, 2)).sense == (5, 0x2100)


@pytest.mark.parametrize("size", [10, 12, 16])
@pytest.mark.parametrize("table", [READS, WRITES], ids=["read", "write"])
def test_protection_information_is_refused(size: int, table: dict[int, int]) -> None:
    host = make_bench().login()
    for protect in range(1, 8):
        answer = host.send(command(table[size], size, 0, 1, flags=protect << 5), bytes(BLOCK))
        assert answer.sense == (5, 0x2400)
        assert answer.pointer[0] == 1


def test_naca_is_refused() -> None:
    host = make_bench().login()
    answer = host.send(cdb10(0x28, 0, 1)[:9] + b"\x04" + bytes(6))
    assert answer.sense == (5, 0x2400)
    assert answer.pointer == (9, 2)


def test_more_than_the_maximum_transfer_length() -> None:
    bench = make_bench(16 << 20)
    host = bench.login()
    answer = host.send(cdb10(0x28, 0, MAX_TRANSFER_BLOCKS + 1))
    assert answer.sense == (5, 0x2400)
    assert answer.pointer == (7, None)
    assert len(host.good(cdb10(0x28, 0, MAX_TRANSFER_BLOCKS))) == 8 << 20


def test_fua_reaches_the_device() -> None:
    bench = make_bench()
    host = bench.login()
    host.good(cdb10(0x2A, 0, 1, flags=0x08), bytes(BLOCK))
    host.good(cdb10(0x2A, 0, 1, flags=0x10), bytes(BLOCK))
    assert [row.fua for row in bench.device.log] == [True, False]
    host.good(cdb10(0x28, 0, 1, flags=0x08))
    assert [row.op for row in bench.device.log[2:]] == ["flush", "read"]


def test_without_write_cache_every_write_is_stable() -> None:
    bench = make_bench(write_cache=False)
    host = bench.login()
    host.good(cdb10(0x2A, 0, 1), bytes(BLOCK))
    assert bench.device.log[-1].fua


def test_too_little_data_writes_only_that() -> None:
    bench = make_bench()
    host = bench.login()
    host.good(cdb10(0x2A, 0, 2), b"a" * 1024)
    host.good(cdb10(0x2A, 0, 2), b"b" * 512, expected=512)
    assert bytes(bench.device.data[:1024]) == b"b" * 512 + b"a" * 512
    host.good(cdb10(0x2A, 0, 1), b"c" * 200, expected=200)
    assert bytes(bench.device.data[:512]) == b"c" * 200 + b"b" * 312
    host.good(cdb10(0x2A, 0, 1), b"", expected=0)
    assert bytes(bench.device.data[:512]) == b"c" * 200 + b"b" * 312
    assert bench.buffers.out == []


def test_too_much_data_is_cut() -> None:
    bench = make_bench()
    host = bench.login()
    host.good(cdb10(0x2A, 0, 1), b"d" * 1024, expected=1024)
    assert bytes(bench.device.data[:1024]) == b"d" * 512 + bytes(512)


@pytest.mark.parametrize(
    ("number", "read", "write"),
    [
        (errno.EIO, (3, 0x1100), (3, 0x0C00)),
        (errno.EBUSY, (3, 0x1100), (3, 0x0C00)),
        (errno.ENOSPC, (3, 0x1100), (7, 0x2707)),
        (errno.EDQUOT, (3, 0x1100), (7, 0x2707)),
        (errno.EFBIG, (3, 0x1100), (7, 0x2707)),
        (errno.EROFS, (3, 0x1100), (7, 0x2700)),
        (errno.ENOMEM, (4, 0x4400), (4, 0x4400)),
    ],
)
def test_storage_errors(number: int, read: tuple[int, int], write: tuple[int, int]) -> None:
    bench = make_bench()
    host = bench.login()
    bench.device.fail("read", number)
    bench.device.fail("write", number)
    answer = host.send(cdb10(0x28, 9, 1))
    assert answer.sense == read
    assert answer.information == (9 if read[0] == 3 else None)
    answer = host.send(cdb10(0x2A, 10, 1), bytes(BLOCK))
    assert answer.sense == write
    assert answer.information == (10 if write[0] == 3 else None)
    assert bench.buffers.out == []
    assert bench.unit.stats.errors == 3  # with the power-on unit attention


def test_parked_for_too_long_is_busy() -> None:
    bench = make_bench(completion=Completion.MANUAL)
    host = bench.login()
    task = host.start(cdb10(0x2A, 0, 1), bytes(BLOCK))
    bench.device.outstanding.pop().done(ParkTimeoutError("write"))
    assert host.finished[-1] is task
    assert (task.status, task.sense) == (0x08, b"")


def test_commands_wait_for_the_device_and_are_kicked_once() -> None:
    bench = make_bench(completion=Completion.MANUAL)
    host = bench.login()
    before = bench.device.kicks
    first = host.start(cdb10(0x28, 0, 1))
    second = host.start(cdb10(0x28, 1, 1))
    assert bench.device.kicks == before + 2
    assert host.finished == host.finished[:1]
    bench.device.complete(1, index=1)
    bench.device.complete()
    assert host.finished[1:] == [second, first]


def test_the_short_way_is_for_plain_commands() -> None:
    bench = make_bench()
    host = bench.login()
    itl = host.nexus.itl(0)
    assert itl is not None
    assert itl.read_range(cdb10(0x28, 3, 2)) == (1536, 1024)
    assert itl.read_range(memoryview(cdb16(0x88, 3, 2))) == (1536, 1024)
    assert itl.read_range(cdb12(0xA8, 3, 2)) == (1536, 1024)
    assert itl.read_range(command(0x08, 6, 0x10203, 0)) is None
    assert itl.read_range(command(0x08, 6, 3, 0)) == (1536, 256 * BLOCK)
    assert itl.write_range(cdb10(0x2A, 3, 2)) == (1536, 1024)
    assert itl.write_range(cdb16(0x8A, 3, 2)) == (1536, 1024)
    assert itl.write_range(cdb12(0xAA, 3, 2)) == (1536, 1024)
    assert itl.write_range(command(0x0A, 6, 3, 1)) == (1536, BLOCK)
    for other in [
        cdb10(0x28, 3, 2, flags=0x08),
        cdb10(0x28, 3, 2, flags=0x20),
        cdb10(0x28, 3, 2, group=1),
        cdb10(0x28, 3, 0),
        cdb10(0x28, bench.unit.blocks - 1, 2),
        cdb10(0x28, 0, MAX_TRANSFER_BLOCKS + 1),
        cdb10(0x28, 3, 2)[:9] + b"\x04" + bytes(6),
        cdb10(0x2A, 3, 2),
        cdb16(0x88, 2**64 - 1, 1),
        cdb("12 00 00 00 24"),
    ]:
        assert itl.read_range(other) is None
    assert itl.write_range(cdb10(0x28, 3, 2)) is None


def test_the_short_way_moves_data_and_counts() -> None:
    bench = make_bench()
    host = bench.login()
    itl = host.nexus.itl(0)
    assert itl is not None
    data = pattern(1024, 5)
    assert itl.try_write(512, memoryview(data))
    view = memoryview(bytearray(1024))
    assert itl.try_read(512, view)
    assert bytes(view) == data
    stats = bench.unit.stats
    assert (stats.reads, stats.read_bytes, stats.writes, stats.written_bytes) == (1, 1024, 1, 1024)
    bench.device.fail(None, errno.EIO, times=2)
    assert not itl.try_read(512, view)
    assert not itl.try_write(512, memoryview(data))
    assert (stats.reads, stats.writes) == (1, 1)


def waiting_read(host: Initiator, tag: int, lba: int) -> Task:
    """A READ of one block that the inline path has declined."""
    itl = host.nexus.itl(0)
    assert itl is not None
    task = Task(
        tag=tag,
        lun=0,
        cdb=cdb10(0x28, lba, 1),
        on_complete=host.finished.append,
        on_aborted=host.aborted.append,
    )
    itl.start(task, lba * BLOCK, BLOCK)
    return task


def test_a_declined_read_runs_as_a_task_without_being_prepared() -> None:
    bench = make_bench(completion=Completion.MANUAL)
    host = bench.login()
    host.nexus.itl(0)
    before = bench.device.kicks
    task = waiting_read(host, 77, 3)
    host.nexus.kick()
    assert bench.device.kicks == before + 1
    assert host.nexus.tasks[77] is task
    assert host.manage(TaskFunction.QUERY_TASK, tag=77) == [TmfResult.SUCCEEDED]
    bench.device.complete()
    assert host.finished[-1] is task
    assert (task.status, len(task.data_in)) == (0, BLOCK)
    assert 77 not in host.nexus.tasks
    task.release()


def test_a_declined_write_runs_with_its_data() -> None:
    bench = make_bench(completion=Completion.MANUAL)
    host = bench.login()
    itl = host.nexus.itl(0)
    assert itl is not None
    data = pattern(2 * BLOCK, 9)
    task = Task(tag=81, lun=0, cdb=cdb10(0x2A, 5, 2), on_complete=host.finished.append)
    task.data_out = memoryview(bytearray(data))
    itl.start(task, 5 * BLOCK, 2 * BLOCK)
    bench.device.complete()
    assert host.finished[-1] is task
    assert (task.status, task.data_out_length) == (0, 2 * BLOCK)
    assert bytes(bench.device.data[5 * BLOCK : 7 * BLOCK]) == data


def test_a_declined_read_can_be_aborted() -> None:
    bench = make_bench(completion=Completion.MANUAL)
    host = bench.login()
    task = waiting_read(host, 78, 3)
    answers = host.manage(TaskFunction.ABORT_TASK, tag=78)
    if not answers:
        bench.device.complete()
    assert answers == [TmfResult.COMPLETE]
    assert host.aborted == [task]
    assert task not in host.finished


def test_a_declined_read_meets_a_full_task_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ploopd.scsi.logical_unit.QUEUE_LIMIT", 1)
    bench = make_bench(completion=Completion.MANUAL)
    host = bench.login()
    waiting_read(host, 79, 3)
    second = waiting_read(host, 80, 4)
    assert host.finished[-1] is second
    assert second.status == Status.TASK_SET_FULL
    assert 80 not in host.nexus.tasks


def test_what_closes_the_short_way() -> None:
    bench = make_bench(completion=Completion.MANUAL)
    host = bench.login()
    other = bench.login(INITIATOR_2, settle=False)
    itl, theirs = host.nexus.itl(0), other.nexus.itl(0)
    assert itl is not None
    assert theirs is not None
    read, write = cdb10(0x28, 0, 1), cdb10(0x2A, 0, 1)
    assert itl.read_range(read)
    assert theirs.read_range(read) is None  # its power-on unit attention is pending
    other.send(cdb("00"))
    assert theirs.read_range(read)
    task = host.start(read, attribute=2)
    assert itl.read_range(read) is None
    assert theirs.write_range(write) is None
    bench.device.complete()
    assert task.status == 0
    assert itl.read_range(read)
    assert theirs.write_range(write)
    task = host.start(cdb("15 10 00 00 18"), bytes([0] * 4 + [0x08, 0x12] + [0] * 18))
    bench.device.complete()
    assert task.status == 0
    assert itl.read_range(read)
    assert itl.write_range(write) is None


INITIATOR_2 = "iqn.2026-11.org.example:host2,i,0x00023d000002"


def test_read_only_unit() -> None:
    bench = make_bench(read_only=True)
    host = bench.login()
    assert host.send(cdb10(0x2A, 0, 1), bytes(BLOCK)).sense == (7, 0x2700)
    itl = host.nexus.itl(0)
    assert itl is not None
    assert itl.write_range(cdb10(0x2A, 0, 1)) is None
    assert itl.read_range(cdb10(0x28, 0, 1))


def test_device_that_becomes_read_only() -> None:
    bench = make_bench()
    host = bench.login()
    bench.device.read_only = True
    assert host.send(cdb10(0x2A, 0, 1), bytes(BLOCK)).sense == (7, 0x2700)
