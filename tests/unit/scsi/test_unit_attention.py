"""Unit attentions: who gets which, in what order, and what clears them."""

from __future__ import annotations

from ploopd.scsi.task_management import TaskFunction, TmfResult
from ploopd.scsi.unit_attention import UnitAttention, UnitAttentions
from tests.support.memory_device import Completion
from tests.unit.scsi.harness import BLOCK, INITIATOR, Bench, Initiator, cdb, cdb10, make_bench

TUR = cdb("00")


def pair(**rest: object) -> tuple[Bench, Initiator, Initiator]:
    bench = make_bench(**rest)  # type: ignore[arg-type]
    return bench, bench.login(), bench.login(INITIATOR + "2")


def swp(host: Initiator) -> None:
    page = bytearray(host.good(cdb("1a 08 0a 00 ff"))[4:])
    page[4] |= 0x08
    host.good(bytes([0x15, 0x10, 0, 0, 16, 0]) + bytes(10), bytes(4) + bytes(page))


def test_power_on_is_reported_once_per_nexus() -> None:
    bench = make_bench()
    for index in range(2):
        host = bench.login(f"{INITIATOR}{index}", settle=False)
        assert host.send(cdb10(0x28, 0, 1)).sense == (6, 0x2900)
        assert host.send(cdb10(0x28, 0, 1)).status == 0
    assert len(bench.device.log) == 2


def test_commands_that_do_not_report() -> None:
    host = make_bench().login(settle=False)
    assert host.send(cdb("12 00 00 00 60")).status == 0
    assert host.send(cdb("a0 00 00 000000 00000100")).status == 0
    assert host.send(TUR).sense == (6, 0x2900)


def test_request_sense_reports_and_clears() -> None:
    host = make_bench().login(settle=False)
    data = host.good(cdb("03 00 00 00 ff"))
    assert (data[2], data[12:14]) == (6, b"\x29\x00")
    assert host.send(TUR).status == 0


def test_a_bad_cdb_does_not_eat_it() -> None:
    host = make_bench().login(settle=False)
    assert host.send(cdb("00 01")).sense == (5, 0x2400)
    assert host.send(cdb("5f")).sense == (5, 0x2000)
    assert host.send(TUR).sense == (6, 0x2900)


def test_mode_change_is_told_to_the_others() -> None:
    _, host, other = pair()
    swp(host)
    assert host.send(TUR).status == 0
    assert other.send(TUR).sense == (6, 0x2A01)
    assert other.send(TUR).status == 0
    swp(host)  # nothing changes
    assert other.send(TUR).status == 0


def test_reset_is_told_to_everybody() -> None:
    bench, host, other = pair()
    swp(host)
    other.send(TUR)
    assert host.manage(TaskFunction.LOGICAL_UNIT_RESET) == [TmfResult.COMPLETE]
    for one in (host, other):
        assert one.send(TUR).sense == (6, 0x2903)
        assert one.send(TUR).status == 0
    host.good(cdb10(0x2A, 0, 1), bytes(BLOCK))  # SWP is back to its default
    assert bench.unit.modes.values() == (True, False, False)


def test_capacity_change() -> None:
    bench, host, other = pair()
    bench.device.data.extend(bytes(1 << 20))
    bench.device.size += 1 << 20
    bench.unit.capacity_changed()
    for one in (host, other):
        assert one.send(TUR).sense == (6, 0x2A09)
        assert one.good(cdb("25"))[:4] == (bench.device.size // BLOCK - 1).to_bytes(4, "big")
    itl = host.nexus.itl(0)
    assert itl is not None
    assert itl.read_range(cdb10(0x28, bench.device.size // BLOCK - 1, 1)) is not None


def test_lun_changes_are_cleared_by_report_luns() -> None:
    bench, host, other = pair()
    bench.target.add_unit(1, bench.unit)
    assert host.send(TUR).sense == (6, 0x3F0E)
    bench.target.add_unit(2, bench.unit)
    host.good(cdb("a0 00 00 000000 00000100"))
    assert host.send(TUR).status == 0
    bench.target.remove_unit(1)
    assert other.send(TUR).sense == (6, 0x3F0E)
    assert other.send(TUR).status == 0


def test_order_of_priority() -> None:
    queue = UnitAttentions()
    for attention in reversed(UnitAttention):
        queue.establish(attention)
        queue.establish(attention)
    assert [queue.take() for _ in UnitAttention] == list(UnitAttention)
    assert queue.take() is None


def test_reset_comes_before_mode_change() -> None:
    _, host, other = pair()
    swp(host)
    host.manage(TaskFunction.LOGICAL_UNIT_RESET)
    assert other.send(TUR).sense == (6, 0x2903)
    assert other.send(TUR).sense == (6, 0x2A01)
    assert other.send(TUR).status == 0


def test_attention_in_descriptor_format() -> None:
    _, host, other = pair()
    page = bytearray(host.good(cdb("1a 08 0a 00 ff"))[4:])
    page[2] |= 0x04
    host.good(bytes([0x15, 0x10, 0, 0, 16, 0]) + bytes(10), bytes(4) + bytes(page))
    assert other.send(TUR).task.sense == bytes([0x72, 6, 0x2A, 1, 0, 0, 0, 0])


def test_one_kind_is_pending_once() -> None:
    bench = make_bench(completion=Completion.MANUAL)
    host = bench.login()
    for _ in range(3):
        bench.unit.capacity_changed()
    assert host.send(TUR).sense == (6, 0x2A09)
    assert host.send(TUR).status == 0
