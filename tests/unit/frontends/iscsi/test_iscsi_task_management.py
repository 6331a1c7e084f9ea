"""Task management: every function, and aborts in every state a command can be in."""

from __future__ import annotations

import pytest

from tests.support.cdb import read_16, write_16
from tests.support.iscsi_client import Client
from tests.support.iscsi_transport import ConnectionClosed
from tests.support.memory_device import Completion, MemoryDevice, pattern
from tests.unit.frontends.iscsi.rig import SIZE, Rig, engine_of, quiet

ABORT_TASK, ABORT_TASK_SET, CLEAR_ACA, CLEAR_TASK_SET, LUN_RESET, WARM, COLD, REASSIGN = range(1, 9)
SMALL = {"MaxBurstLength": "8192", "FirstBurstLength": "8192"}


def slow_device(*, cancellable: bool = True) -> MemoryDevice:
    return MemoryDevice(SIZE, inline=False, completion=Completion.MANUAL, cancellable=cancellable)


def second_client(rig: Rig) -> Client:
    client = rig.client()
    client.initiator.isid = b"\x80\0\0\0\0\x07"
    client.login()
    client.clear_attention()
    return client


def window(client: Client) -> int:
    """How many commands the target would take."""
    return (client.initiator.max_cmd_sn - client.initiator.cmd_sn + 1) & 0xFFFFFFFF


def test_abort_of_a_waiting_task() -> None:
    rig = Rig(devices=[slow_device()])
    client = rig.logged_in()
    tag, pdu = client.initiator.command(write_16(0, 8), write=4096, data=b"x" * 4096)
    client.send(pdu)
    assert client.task_management(ABORT_TASK, referenced=tag).response == 0
    rig.device.complete()
    assert not any(rig.device.data[:4096])
    assert quiet(client), "an aborted task has no response"
    assert client.nop().opcode == 0x20
    assert window(client) == 128
    assert rig.buffers.outstanding == 0


def test_abort_waits_for_what_is_being_executed() -> None:
    rig = Rig(devices=[slow_device(cancellable=False)])
    client = rig.logged_in()
    tag, pdu = client.initiator.command(write_16(0, 8), write=4096, data=b"x" * 4096)
    client.send(pdu)
    _, abort = client.initiator.request(0x02, 0x81, immediate=True, word20=tag)
    client.send(abort)
    assert quiet(client), "no answer while the write may still reach the image"
    rig.device.complete()
    answer = client.next_pdu()
    assert (answer.opcode, answer.response) == (0x22, 0)
    assert rig.buffers.outstanding == 0


def test_abort_of_a_task_that_does_not_exist() -> None:
    client = Rig().logged_in()
    assert client.task_management(ABORT_TASK, referenced=999).response == 1


def test_abort_on_another_lun_does_not_find_the_task() -> None:
    rig = Rig(devices=[slow_device(), MemoryDevice(SIZE)])
    client = rig.logged_in()
    tag, pdu = client.initiator.command(read_16(0, 8), read=4096)
    client.send(pdu)
    assert client.task_management(ABORT_TASK, referenced=tag, lun=1).response == 1
    rig.device.complete()
    assert client.pdu_for(tag).status == 0


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("function", [ABORT_TASK, ABORT_TASK_SET, CLEAR_TASK_SET, LUN_RESET, WARM])
def test_abort_while_data_is_being_gathered(inline: bool, function: int) -> None:
    rig = Rig(devices=[MemoryDevice(SIZE, inline=inline)])
    client = rig.logged_in(**SMALL)
    data = pattern(32768, 2)
    tag, pdu = client.initiator.command(write_16(0, 64), write=32768)
    client.send(pdu)
    r2t = client.next_pdu()
    assert client.task_management(function, referenced=tag).response == 0
    client._answer_r2t(r2t, data, 8192)
    assert quiet(client), "data for an aborted task is dropped"
    assert not any(rig.device.data)
    client.clear_attention()
    assert client.nop().opcode == 0x20
    assert window(client) == 128
    assert rig.buffers.outstanding == 0
    client.write(0, data)


def test_abort_task_set_is_for_this_nexus_only() -> None:
    rig = Rig(devices=[slow_device()])
    rig.device.completion = Completion.AT_ONCE
    client, other = rig.logged_in(), second_client(rig)
    rig.device.completion = Completion.MANUAL
    mine, pdu = client.initiator.command(read_16(0, 8), read=4096)
    client.send(pdu)
    theirs, pdu = other.initiator.command(read_16(0, 8), read=4096)
    other.send(pdu)
    assert client.task_management(ABORT_TASK_SET).response == 0
    rig.device.complete()
    assert quiet(client)
    assert other.pdu_for(theirs).status == 0
    assert mine not in engine_of(client)._flow.commands


@pytest.mark.parametrize(("function", "sense"), [(CLEAR_TASK_SET, 0x2F00), (LUN_RESET, 0x2903)])
def test_others_learn_by_a_unit_attention(function: int, sense: int) -> None:
    rig = Rig(devices=[slow_device()])
    rig.device.completion = Completion.AT_ONCE
    client, other = rig.logged_in(), second_client(rig)
    rig.device.completion = Completion.MANUAL
    _, pdu = other.initiator.command(read_16(0, 8), read=4096)
    other.send(pdu)
    assert client.task_management(function).response == 0
    rig.device.complete()
    assert quiet(other)
    answer, _ = other.command(bytes(6))
    assert answer.sense_code == (6, sense)
    assert other.nop().max_cmd_sn == (other.initiator.cmd_sn + 127) & 0xFFFFFFFF


def test_unknown_lun() -> None:
    assert Rig().logged_in().task_management(LUN_RESET, lun=7).response == 2


@pytest.mark.parametrize(
    ("function", "response"), [(CLEAR_ACA, 5), (REASSIGN, 4), (9, 5), (12, 5), (100, 5)]
)
def test_functions_that_are_not_there(function: int, response: int) -> None:
    assert Rig().logged_in().task_management(function).response == response


def test_cold_reset_ends_all_sessions_of_the_target() -> None:
    rig = Rig()
    client, other = rig.logged_in(), second_client(rig)
    assert client.task_management(COLD).response == 0
    for each in (client, other):
        with pytest.raises(ConnectionClosed):
            each.next_pdu()


def test_a_numbered_request_takes_and_returns_its_place() -> None:
    client = Rig().logged_in()
    tag, pdu = client.initiator.request(0x02, 0x80 | LUN_RESET)
    client.send(pdu)
    assert client.pdu_for(tag).response == 0
    assert window(client) == 128


def test_a_storm_of_functions_is_bounded() -> None:
    rig = Rig(devices=[slow_device(cancellable=False)])
    client = rig.logged_in()
    tag, pdu = client.initiator.command(write_16(0, 8), write=4096, data=bytes(4096))
    client.send(pdu)
    for _ in range(200):
        _, pdu = client.initiator.request(0x02, 0x80 | ABORT_TASK, immediate=True, word20=tag)
        client.send(pdu)
    rejects = 0
    while not quiet(client):
        assert client.next_pdu().response == 0x06
        rejects += 1
    assert rejects == 200 - 64
    rig.device.complete()
    for _ in range(64):
        assert client.next_pdu().opcode == 0x22
    assert quiet(client)
