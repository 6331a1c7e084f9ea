"""Commands and connections that wait: for data, memory, their turn, a peer that reads."""

from __future__ import annotations

import pytest

from ploopd.frontends.iscsi.config import IscsiConfig, Limits
from tests.support.cdb import read_16, write_16
from tests.support.iscsi_client import TARGET, Client
from tests.support.memory_device import Completion, MemoryDevice, pattern
from tests.unit.frontends.iscsi.rig import SIZE, Rig, engine_of, quiet

MIB = 1 << 20
PATIENT = IscsiConfig(
    iqn=TARGET, limits=Limits(data_out_timeout=45.0, nop_interval=0, output_arena=MIB)
)


# -- data that was announced and never comes


def test_a_refused_write_is_answered_although_its_data_never_comes() -> None:
    rig = Rig(config=PATIENT)
    client = rig.logged_in()
    tag, pdu = client.initiator.command(write_16(1 << 40, 8), write=4096, final=False)
    client.send(pdu)
    rig.pass_time(client, 44)
    assert quiet(client)
    rig.pass_time(client, 2)
    answer = client.next_pdu()
    assert (answer.tag, answer.opcode, answer.status) == (tag, 0x21, 2)
    assert not engine_of(client)._flow.commands


def test_a_write_with_bad_data_is_answered_although_the_rest_never_comes() -> None:
    rig = Rig(config=PATIENT)
    client = rig.logged_in()
    tag, pdu = client.initiator.command(write_16(0, 8), write=4096, final=False)
    client.send(pdu)
    client.send(client.initiator.data_out(tag, bytes(512), offset=512, number=0, final=False))
    assert quiet(client), "the response waits for the data that was announced"
    rig.pass_time(client, 46)
    answer = client.next_pdu()
    assert (answer.tag, answer.sense_code) == (tag, (0xB, 0x4B05)), "what was wrong first"
    assert not engine_of(client)._flow.commands


def test_bad_data_and_then_a_wrong_digest() -> None:
    rig = Rig(config=PATIENT)
    client = rig.logged_in(DataDigest="CRC32C")
    tag, pdu = client.initiator.command(write_16(0, 8), write=4096, final=False)
    client.send(pdu)
    client.send(client.initiator.data_out(tag, bytes(512), offset=512, number=0, final=False))
    damaged = bytearray(client.initiator.data_out(tag, bytes(512), offset=1024, number=1))
    damaged[-1] ^= 1
    client.send(bytes(damaged))
    assert client.next_pdu().response == 0x02, "Reject: data digest error"
    assert client.next_pdu().sense_code == (0xB, 0x4B05)


# -- memory


def small_budget(inflight: int) -> IscsiConfig:
    limits = Limits(inflight_bytes=inflight, data_out_timeout=45.0, nop_interval=0)
    return IscsiConfig(iqn=TARGET, limits=limits)


def drive(rig: Rig, client: Client, count: int, data: bytes) -> list[int]:
    """Answer R2Ts and complete what the device has until `count` commands have ended."""
    statuses: list[int] = []
    while len(statuses) < count:
        if quiet(client):
            assert rig.device.complete(1), "nothing goes on any more"
            continue
        pdu = client.next_pdu()
        if pdu.opcode == 0x31:
            client._answer_r2t(pdu, data, 262144)
        else:
            statuses.append(pdu.status)
    return statuses


def test_immediate_data_of_those_who_wait_does_not_stop_everybody() -> None:
    """All memory is held by immediate data: somebody must get the rest that he needs."""
    rig = Rig(
        config=small_budget(4 * MIB),
        devices=[MemoryDevice(SIZE, inline=False, completion=Completion.MANUAL)],
    )
    client = rig.logged_in(FirstBurstLength="262144", MaxBurstLength="1048576")
    data = pattern(2 * MIB, 3)
    for _ in range(16):
        _, pdu = client.initiator.command(write_16(0, 4096), write=2 * MIB, data=data[:262144])
        client.send(pdu)
    assert drive(rig, client, 16, data) == [0] * 16
    assert rig.buffers.outstanding == 0


def test_waiting_for_memory_is_not_the_initiators_fault() -> None:
    rig = Rig(
        config=small_budget(2 * MIB),
        devices=[MemoryDevice(SIZE, inline=False, completion=Completion.MANUAL)],
    )
    client = rig.logged_in(MaxBurstLength="4194304")
    data = pattern(2 * MIB, 3)
    for _ in range(3):
        _, pdu = client.initiator.command(write_16(0, 4096), write=2 * MIB)
        client.send(pdu)
    client._answer_r2t(client.next_pdu(), data, 262144)
    rig.pass_time(client, 300)  # the storage is away
    assert quiet(client)
    assert drive(rig, client, 3, data) == [0] * 3


@pytest.mark.parametrize("digests", ["None", "CRC32C"])
def test_many_small_reads_behind_large_ones(digests: str) -> None:
    """Those who waited are served one after the other, not inside each other."""
    rig = Rig(
        config=small_budget(4 * MIB),
        devices=[MemoryDevice(SIZE, inline=False, completion=Completion.MANUAL)],
    )
    client = rig.logged_in(DataDigest=digests)
    out = []
    for blocks in [8192] + [8] * 120:
        _, pdu = client.initiator.command(read_16(0, blocks), read=blocks * 512)
        out.append(pdu)
    client.send(b"".join(out))
    rig.device.completion = Completion.AT_ONCE
    rig.device.complete()
    ended = 0
    while ended < 121:
        pdu = client.next_pdu()
        assert pdu.status == 0
        ended += pdu.flags & 1 or pdu.opcode == 0x21
    assert rig.buffers.outstanding == 0


# -- order


def test_an_ordered_task_waits_for_the_writes_before_it() -> None:
    """Also for one whose data goes straight to the device (SAM-5 8.7.3)."""
    rig = Rig()
    client = rig.logged_in()
    data = pattern(4096, 5)
    write, pdu = client.initiator.command(write_16(0, 8), write=4096, data=data[:512])
    client.send(pdu)
    r2t = client.next_pdu()
    read, pdu = client.initiator.command(read_16(0, 8), read=4096, attribute=2)
    client.send(pdu)
    assert quiet(client), "the ORDERED task waits"
    client._answer_r2t(r2t, data, 4096)
    assert client.next_pdu().tag == write
    answer = client.next_pdu()
    assert (answer.tag, answer.data) == (read, data)
    assert rig.buffers.outstanding == 0


def test_clear_task_set_ends_the_streamed_writes_of_others() -> None:
    rig = Rig()
    client = rig.logged_in()
    data = pattern(4096, 5)
    tag, pdu = client.initiator.command(write_16(0, 8), write=4096)
    client.send(pdu)
    r2t = client.next_pdu()
    other = rig.client()
    other.initiator.isid = b"\x80\0\0\0\0\x09"
    other.login()
    other.clear_attention()
    assert other.task_management(4).response == 0
    client._answer_r2t(r2t, data, 4096)
    assert not any(rig.device.data[:4096]), "nothing is written after the function was answered"
    assert client.pdu_for(tag).sense_code == (6, 0x2F00)


def test_a_closed_window_is_closed_for_plain_commands() -> None:
    rig = Rig(
        config=IscsiConfig(iqn=TARGET, limits=Limits(window=4, output_arena=MIB)),
        devices=[MemoryDevice(SIZE, inline=False, completion=Completion.MANUAL)],
    )
    client = rig.logged_in()
    for _ in range(4):
        _, pdu = client.initiator.command(read_16(0, 1), read=512)
        client.send(pdu)
    rig.device.inline = True
    _, pdu = client.initiator.command(read_16(0, 1), read=512)
    client.send(pdu)
    assert quiet(client), "CmdSN = MaxCmdSN + 1 is ignored"
    assert rig.device.complete() == 4
    assert [client.next_pdu().status for _ in range(4)] == [0] * 4
    assert quiet(client)


# -- connections


def test_a_connection_that_is_done_does_not_wait_for_a_peer_that_does_not_read() -> None:
    """By the clock that the server goes by: it looks when `next_timeout` says so."""
    rig = Rig()
    client = rig.logged_in()
    engine = engine_of(client)
    _, pdu = client.initiator.request(0x06, 0x80, word20=0)
    client.send(pdu)
    assert engine.wants_close
    for _ in range(10):
        rig.now += 1.0
        if rig.now >= engine.next_timeout():
            engine.on_timeout(rig.now)
    assert engine.aborted


def test_a_login_that_is_replaced_while_it_waits_for_the_one_it_replaced() -> None:
    device = MemoryDevice(SIZE, inline=False, completion=Completion.MANUAL, cancellable=False)
    rig = Rig(devices=[device])
    first = rig.logged_in()
    _, pdu = first.initiator.command(write_16(0, 1), write=512, data=b"o" * 512)
    first.send(pdu)
    second, third = rig.client(), rig.client()
    for client in (second, third):
        client.initiator.isid = first.initiator.isid
        client.login_step([*client.introduction(), "AuthMethod=None"], 0, 1)
        client.send(client.initiator.login(["InitialR2T=No"], stage=1, next_stage=3))
        assert quiet(client)
    assert engine_of(second).aborted
    device.complete()
    assert quiet(second)
    assert third.next_pdu().flags == 0x87
    assert len(rig.node.sessions) == 1
