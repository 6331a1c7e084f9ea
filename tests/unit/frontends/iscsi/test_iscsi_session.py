"""Sessions: ping, logout, shutdown, reinstatement, time-outs, digests, what is left of them."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from ploopd.frontends.iscsi.config import IscsiConfig, Limits
from ploopd.frontends.iscsi.connection import Phase
from ploopd.frontends.iscsi.pdu import LoginStatus
from tests.support.cdb import read_16, write_16
from tests.support.iscsi_client import TARGET, Client, LoginRefused
from tests.support.iscsi_pdu import NO_TAG
from tests.support.iscsi_transport import ConnectionClosed
from tests.support.memory_device import Completion, MemoryDevice, pattern
from tests.unit.frontends.iscsi.rig import SIZE, SMALL_LIMITS, Rig, engine_of, quiet

# -- NOP


def test_ping_is_answered_with_its_data() -> None:
    client = Rig().logged_in()
    pong = client.nop(b"are you there?")
    assert (pong.opcode, pong.transfer_tag, pong.data) == (0x20, NO_TAG, b"are you there?")
    assert client.nop().data == b""


def test_ping_data_is_cut_to_what_the_initiator_takes() -> None:
    client = Rig().logged_in(MaxRecvDataSegmentLength="512")
    assert client.nop(bytes(range(256)) * 8).data == bytes(range(256)) * 2


def test_a_ping_without_a_tag_wants_no_answer() -> None:
    client = Rig().logged_in()
    _, pdu = client.initiator.request(0x00, immediate=True, tag=NO_TAG)
    client.send(pdu)
    assert quiet(client)


def keepalive_rig() -> Rig:
    limits = Limits(nop_interval=15, nop_timeout=10, output_arena=1 << 20)
    return Rig(config=IscsiConfig(iqn=TARGET, limits=limits))


def test_a_silent_initiator_is_asked_and_then_dropped() -> None:
    rig = keepalive_rig()
    client = rig.logged_in()
    rig.pass_time(client, 14)
    assert quiet(client)
    rig.pass_time(client, 2)
    ping = client.next_pdu()
    assert (ping.opcode, ping.tag) == (0x20, NO_TAG)
    assert ping.transfer_tag != NO_TAG
    rig.pass_time(client, 11)
    assert engine_of(client).aborted


def test_an_answered_ping_keeps_the_session() -> None:
    rig = keepalive_rig()
    client = rig.logged_in()
    for _ in range(10):
        rig.pass_time(client, 16)
        ping = client.next_pdu()
        _, pong = client.initiator.request(
            0x00, immediate=True, tag=NO_TAG, word20=ping.transfer_tag
        )
        client.send(pong)
        assert quiet(client)
    assert not engine_of(client).wants_close


def test_any_byte_is_a_sign_of_life() -> None:
    rig = keepalive_rig()
    client = rig.logged_in()
    for _ in range(50):
        rig.pass_time(client, 14)
        client.nop()
    assert not client.unsolicited


def test_a_reader_that_does_not_read_is_dropped() -> None:
    rig = keepalive_rig()
    client = rig.logged_in()
    _, pdu = client.initiator.command(read_16(0, 8), read=4096)
    client.send(pdu)
    rig.pass_time(client, 31)
    assert engine_of(client).aborted
    assert engine_of(client).close_reason == "the initiator does not read"


# -- logout and shutdown


@pytest.mark.parametrize(("reason", "cid", "response"), [(0, 1, 0), (1, 1, 0)])
def test_logout_is_answered_and_then_the_connection_closes(
    reason: int, cid: int, response: int
) -> None:
    client = Rig().logged_in()
    answer = client.logout(reason)
    assert (answer.opcode, answer.response) == (0x26, response)
    with pytest.raises(ConnectionClosed):
        client.next_pdu()


def test_logouts_that_are_refused() -> None:
    client = Rig().logged_in()
    assert client.logout(2).response == 2
    client.initiator.cid = 9
    assert client.logout(1).response == 1
    client.initiator.cid = 1
    assert client.logout().response == 0


def test_logout_with_commands_under_way_is_answered() -> None:
    device = MemoryDevice(SIZE, inline=False, completion=Completion.MANUAL, cancellable=True)
    rig = Rig(devices=[device])
    client = rig.logged_in()
    for i in range(10):
        _, pdu = client.initiator.command(write_16(i, 1), write=512, data=b"x" * 512)
        client.send(pdu)
    assert client.logout().response == 0
    engine_of(client).lost("closed")
    device.complete()
    assert not any(device.data[: 10 * 512])
    assert rig.buffers.outstanding == 0
    assert rig.target.nexuses == []


def test_shutdown_asks_for_a_logout_first() -> None:
    client = Rig().logged_in()
    engine_of(client).request_logout(5)
    message = client.next_pdu()
    assert (message.opcode, message.bhs[36], message.word(40) & 0xFFFF) == (0x32, 1, 5)
    client.read(0, 8)
    engine_of(client).shut_down()
    message = client.next_pdu()
    assert (message.opcode, message.bhs[36]) == (0x32, 3)
    with pytest.raises(ConnectionClosed):
        client.next_pdu()


def test_close_waits_for_the_output_but_not_for_ever() -> None:
    rig = Rig()
    client = rig.logged_in()
    engine = engine_of(client)
    engine.shut_down()
    assert engine.wants_close
    assert not engine.aborted
    rig.pass_time(client, 5)
    assert engine.aborted


# -- several sessions


def another(rig: Rig, isid: bytes = b"\x80\0\0\0\0\x01") -> Client:
    client = rig.client()
    client.initiator.isid = isid
    return client


def test_sessions_side_by_side() -> None:
    rig = Rig()
    first = rig.logged_in()
    second = another(rig, b"\x80\0\0\0\0\x02")
    second.login()
    second.clear_attention()
    first.write(0, pattern(4096, 1))
    assert second.read(0, 8) == pattern(4096, 1)
    assert len(rig.node.sessions) == 2
    assert first.initiator.tsih != second.initiator.tsih


def test_reinstatement_ends_the_old_session() -> None:
    rig = Rig()
    old = rig.logged_in()
    rig.dirty.clear()
    new = another(rig)
    new.login()
    assert engine_of(old).aborted
    assert engine_of(old) in rig.dirty
    assert len(rig.node.sessions) == 1
    assert len(rig.target.nexuses) == 1
    engine_of(old).lost("closed")
    assert len(rig.node.sessions) == 1, "the end of the old connection does not touch the new one"
    new.clear_attention()
    new.read(0, 1)


def test_reinstatement_needs_authentication() -> None:
    from tests.support.iscsi_client import Credentials
    from tests.unit.frontends.iscsi.test_iscsi_login import SECRET, WITH_CHAP

    rig = Rig(config=WITH_CHAP)
    old = rig.client()
    old.login(credentials=Credentials("alice", SECRET))
    forged = another(rig)
    with pytest.raises(LoginRefused):
        forged.login(credentials=Credentials("alice", b"guess guess guess"))
    assert not engine_of(old).wants_close
    old.clear_attention()


def test_reinstatement_waits_for_the_writes_of_the_old_session() -> None:
    device = MemoryDevice(SIZE, inline=False, completion=Completion.MANUAL, cancellable=False)
    rig = Rig(devices=[device])
    old = rig.logged_in()
    _, pdu = old.initiator.command(write_16(0, 1), write=512, data=b"o" * 512)
    old.send(pdu)
    new = another(rig)
    new.login_step([*new.introduction(), "AuthMethod=None"], 0, 1)
    new.send(new.initiator.login(["InitialR2T=No"], stage=1, next_stage=3))
    assert quiet(new), "a write of the old session could overtake the new session's"
    assert engine_of(new).phase is Phase.JOINING
    device.complete()
    assert new.next_pdu().flags == 0x87
    assert engine_of(new) in rig.dirty
    assert engine_of(new).phase is Phase.FULL_FEATURE


def test_reinstatement_does_not_wait_for_a_storage_that_hangs() -> None:
    device = MemoryDevice(SIZE, inline=False, completion=Completion.MANUAL, cancellable=False)
    rig = Rig(devices=[device])
    old = rig.logged_in()
    _, pdu = old.initiator.command(write_16(0, 1), write=512, data=b"o" * 512)
    old.send(pdu)
    new = another(rig)
    new.login_step([*new.introduction(), "AuthMethod=None"], 0, 1)
    new.send(new.initiator.login(["InitialR2T=No"], stage=1, next_stage=3))
    rig.pass_time(new, 11)
    assert new.next_pdu().flags == 0x87


def test_connection_reinstatement() -> None:
    rig = Rig()
    old = rig.logged_in()
    new = another(rig)
    new.initiator.tsih = old.initiator.tsih
    new.login()
    assert new.initiator.tsih == old.initiator.tsih
    assert engine_of(old).aborted
    new.clear_attention()


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"cid": 2}, LoginStatus.TOO_MANY_CONNECTIONS),
        ({"isid": b"\x80\0\0\0\0\x63"}, LoginStatus.CANNOT_INCLUDE_IN_SESSION),
    ],
)
def test_connections_that_do_not_fit_the_session(
    change: dict[str, object], status: LoginStatus
) -> None:
    rig = Rig()
    old = rig.logged_in()
    new = another(rig)
    new.initiator.tsih = old.initiator.tsih
    for name, value in change.items():
        setattr(new.initiator, name, value)
    with pytest.raises(LoginRefused) as caught:
        new.login()
    assert caught.value.status == status
    assert not engine_of(old).wants_close


# -- digests

DIGESTS = [
    {"HeaderDigest": "CRC32C"},
    {"DataDigest": "CRC32C"},
    {"HeaderDigest": "CRC32C", "DataDigest": "CRC32C"},
]


@pytest.mark.parametrize("keys", DIGESTS)
@pytest.mark.parametrize("blocks", [1, 8, 1000])
def test_everything_works_with_digests(keys: dict[str, str], blocks: int) -> None:
    rig = Rig()
    client = rig.logged_in(**keys, FirstBurstLength="65536", MaxBurstLength="65536")
    assert client.initiator.header_digest == ("HeaderDigest" in keys)
    data = pattern(blocks * 512, 5)
    client.write(3, data, segment=10_000)
    assert client.read(3, blocks) == data
    assert client.nop(b"odd").data == b"odd"
    assert client.text(["SendTargets=All"])["TargetName"] == TARGET
    client.command(bytes([0x12, 0, 0, 0, 37, 0]), read=37)
    assert client.logout().response == 0


def flip(pdu: bytes, position: int) -> bytes:
    return pdu[:position] + bytes([pdu[position] ^ 1]) + pdu[position + 1 :]


def test_a_damaged_header_ends_the_connection() -> None:
    client = Rig().logged_in(HeaderDigest="CRC32C")
    _, pdu = client.initiator.command(read_16(0, 1), read=512)
    client.send(flip(pdu, 40))
    with pytest.raises(ConnectionClosed):
        client.next_pdu()


def test_damaged_data_out_fails_its_command() -> None:
    rig = Rig()
    client = rig.logged_in(DataDigest="CRC32C")
    tag, pdu = client.initiator.command(write_16(0, 8), write=4096)
    client.send(pdu)
    r2t = client.next_pdu()
    out = client.initiator.data_out(tag, b"x" * 4096, offset=0, transfer_tag=r2t.transfer_tag)
    client.send(flip(out, 100))
    reject = client.next_pdu()
    assert (reject.opcode, reject.response) == (0x3F, 0x02)
    answer = client.pdu_for(tag)
    assert answer.sense_code == (0xB, 0x4705)
    assert not any(rig.device.data[:4096])
    client.clear_attention()


def test_damaged_immediate_data_is_rejected_and_not_written() -> None:
    rig = Rig()
    client = rig.logged_in(DataDigest="CRC32C")
    number = client.initiator.cmd_sn
    _, pdu = client.initiator.command(write_16(0, 8), write=4096, data=b"x" * 4096)
    client.send(flip(pdu, 100))
    assert client.next_pdu().response == 0x02
    assert not any(rig.device.data[:4096])
    client.initiator.cmd_sn = number  # not received: the number is still free
    client.write(0, b"y" * 4096)


# -- memory


def test_nothing_is_left_of_a_lost_connection() -> None:
    device = MemoryDevice(SIZE, inline=False, completion=Completion.MANUAL, cancellable=True)
    rig = Rig(devices=[device])
    client = rig.logged_in(InitialR2T="Yes")
    for i in range(8):
        _, pdu = client.initiator.command(read_16(i * 64, 64), read=32768)
        client.send(pdu)
        _, pdu = client.initiator.command(write_16(i, 1), write=512)
        client.send(pdu)
    device.complete(4)
    engine_of(client).lost("the cable was pulled")
    device.complete()
    assert rig.buffers.outstanding == 0
    assert len(rig.node.sessions) == 0
    assert rig.target.nexuses == []


@pytest.mark.parametrize("cut", [1, 20, 47, 48, 49, 300, 559])
def test_connections_that_end_in_the_middle_of_a_pdu(cut: int) -> None:
    rig = Rig()
    client = rig.logged_in()
    _, pdu = client.initiator.command(write_16(0, 1), write=512, data=b"x" * 512)
    client.send(pdu[:cut])
    engine_of(client).lost("gone")
    assert not any(rig.device.data[:512])
    assert rig.target.nexuses == []


def test_the_sequence_numbers_wrap_around() -> None:
    rig = Rig()
    client = rig.client()
    client.initiator.cmd_sn = 0xFFFFFFC0
    client.initiator.exp_stat_sn = 0xFFFFFFC0
    client.login()
    client.clear_attention()
    for i in range(200):
        client.write(i, struct.pack(">I", i) * 128)
    assert client.read(150, 1) == struct.pack(">I", 150) * 128
    assert client.initiator.cmd_sn < 1000


def test_no_window_update_is_needed_after_a_limit_change() -> None:
    config = IscsiConfig(iqn=TARGET, limits=replace(SMALL_LIMITS, window=4))
    client = Rig(config=config).logged_in()
    for _ in range(20):
        pong = client.nop()
        assert (pong.max_cmd_sn - pong.exp_cmd_sn) & 0xFFFFFFFF == 3
