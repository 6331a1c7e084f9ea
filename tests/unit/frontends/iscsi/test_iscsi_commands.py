"""READ, WRITE and everything else in full feature phase: data, residuals, sequencing."""

from __future__ import annotations

import errno
import struct

import pytest

from tests.support.cdb import INQUIRY, TEST_UNIT_READY, read_10, read_16, write_10, write_16
from tests.support.iscsi_pdu import NO_TAG, build
from tests.support.iscsi_transport import ConnectionClosed
from tests.support.memory_device import Completion, MemoryDevice, pattern
from tests.unit.frontends.iscsi.rig import SIZE, Rig, engine_of, quiet

DEVICES = {
    "inline": lambda: MemoryDevice(SIZE),
    "at once": lambda: MemoryDevice(SIZE, inline=False),
    "on kick": lambda: MemoryDevice(SIZE, inline=False, completion=Completion.ON_KICK),
}
KINDS = pytest.mark.parametrize("kind", list(DEVICES))


@KINDS
@pytest.mark.parametrize("blocks", [1, 8, 100, 512, 1500])
def test_what_is_written_is_read(kind: str, blocks: int) -> None:
    rig = Rig(devices=[DEVICES[kind]()])
    client = rig.logged_in()
    data = pattern(blocks * 512, 3)
    client.write(7, data)
    assert client.read(7, blocks) == data
    assert bytes(rig.device.data[7 * 512 : 7 * 512 + len(data)]) == data
    assert rig.buffers.outstanding == 0


@KINDS
def test_phase_collapse(kind: str) -> None:
    client = Rig(devices=[DEVICES[kind]()]).logged_in()
    pdu, data = client.command(read_16(0, 8), read=4096)
    assert pdu.opcode == 0x25, "the status is in the last Data-In"
    assert pdu.flags == 0x81
    assert len(data) == 4096


@KINDS
@pytest.mark.parametrize("segment", [512, 4096, 5000, 65536])
@pytest.mark.parametrize("burst", [8192, 262144])
@pytest.mark.parametrize("blocks", [8, 20, 300])
def test_long_reads_in_segments_and_bursts(
    kind: str, segment: int, burst: int, blocks: int
) -> None:
    rig = Rig(devices=[DEVICES[kind]()])
    rig.device.data[: 1 << 20] = pattern(1 << 20, 5)
    client = rig.logged_in(
        MaxRecvDataSegmentLength=str(segment),
        MaxBurstLength=str(burst),
        FirstBurstLength=str(burst),
    )
    tag, pdu = client.initiator.command(read_16(0, blocks), read=blocks * 512)
    client.send(pdu)
    received, number, since_final = b"", 0, 0
    while True:
        answer = client.pdu_for(tag)
        assert answer.opcode == 0x25
        assert len(answer.data) <= segment
        assert answer.word(36) == number
        assert answer.word(40) == len(received)
        received += answer.data
        since_final += len(answer.data)
        number += 1
        assert since_final <= burst
        if answer.final:
            since_final = 0
        if answer.flags & 1:
            break
    assert received == bytes(rig.device.data[: blocks * 512])


def test_check_condition_comes_in_a_response() -> None:
    rig = Rig(devices=[MemoryDevice(SIZE, inline=False)])
    client = rig.logged_in()
    rig.device.fail("read", errno.ENXIO)
    pdu, _ = client.command(read_16(5, 8), read=4096)
    assert pdu.opcode == 0x21
    assert pdu.status == 2
    assert pdu.sense_code == (3, 0x1100)
    assert pdu.underflow
    assert pdu.residual == 4096


def test_an_inline_error_is_reported_too() -> None:
    rig = Rig()
    client = rig.logged_in()
    rig.device.fail("write", errno.ENOSPC, times=None)
    pdu, _ = client.command(write_16(0, 8), write=4096, data=bytes(4096))
    assert pdu.sense_code == (7, 0x2707)


def test_unknown_lun() -> None:
    client = Rig().logged_in()
    pdu, _ = client.command(TEST_UNIT_READY, lun=9)
    assert pdu.sense_code == (5, 0x2500)


@pytest.mark.parametrize("lun_field", [0x0001 << 48, 0x4001 << 48])
def test_lun_formats(lun_field: int) -> None:
    rig = Rig(devices=[MemoryDevice(SIZE), MemoryDevice(2 * SIZE)])
    client = rig.logged_in()
    rig.devices[1].data[:512] = pattern(512, 9)
    tag, pdu = client.initiator.command(read_16(0, 1), read=512)
    client.send(pdu[:8] + lun_field.to_bytes(8, "big") + pdu[16:])
    _, data = client.finish(tag)
    assert data == pattern(512, 9)


# -- residuals (RFC 7143 11.4.5)


@KINDS
@pytest.mark.parametrize("cdb", [read_10(0, 1), read_16(0, 1)])
@pytest.mark.parametrize(
    ("expected", "overflow", "underflow", "residual"),
    [
        (0, True, False, 512),
        (200, True, False, 312),
        (512, False, False, 0),
        (10000, False, True, 9488),
    ],
)
def test_read_residuals(
    kind: str, cdb: bytes, expected: int, overflow: bool, underflow: bool, residual: int
) -> None:
    rig = Rig(devices=[DEVICES[kind]()])
    rig.device.data[:512] = pattern(512, 4)
    client = rig.logged_in()
    tag, pdu = client.initiator.request(0x01, 0xC1, word20=expected, tail=cdb.ljust(16, b"\0"))
    client.send(pdu)
    answer, data = client.finish(tag)
    assert (answer.status, answer.overflow, answer.underflow, answer.residual) == (
        0,
        overflow,
        underflow,
        residual,
    )
    assert data == pattern(512, 4)[:expected]


@KINDS
@pytest.mark.parametrize("expected", [0, 512, 1024, 10240])
def test_write_residuals(kind: str, expected: int) -> None:
    rig = Rig(devices=[DEVICES[kind]()])
    client = rig.logged_in()
    data = pattern(expected, 6)
    tag, pdu = client.initiator.request(
        0x01, 0xA1, word20=expected, tail=write_10(0, 2).ljust(16, b"\0"), data=data
    )
    client.send(pdu)
    answer, _ = client.finish(tag)
    written = min(expected, 1024)
    assert answer.status == 0
    assert answer.residual == abs(expected - 1024)
    assert answer.overflow == (expected < 1024)
    assert answer.underflow == (expected > 1024)
    assert bytes(rig.device.data[:2048]) == data[:written] + bytes(2048 - written)
    client.clear_attention()


@KINDS
def test_a_write_of_part_of_a_block_touches_nothing_beyond(kind: str) -> None:
    rig = Rig(devices=[DEVICES[kind]()])
    rig.device.data[:1024] = b"\xee" * 1024
    client = rig.logged_in()
    tag, pdu = client.initiator.request(
        0x01, 0xA1, word20=200, tail=write_10(0, 1).ljust(16, b"\0"), data=b"x" * 200
    )
    client.send(pdu)
    answer, _ = client.finish(tag)
    assert answer.residual == 312
    assert answer.overflow
    assert bytes(rig.device.data[200:1024]) == b"\xee" * 824


def test_residual_of_inquiry() -> None:
    client = Rig().logged_in()
    pdu, data = client.command(bytes([0x12, 0, 0, 0, 255, 0]), read=255)
    assert pdu.underflow
    assert pdu.residual == 255 - len(data)
    pdu, data = client.command(bytes([0x12, 0, 0, 0, 5, 0]), read=5)
    assert (len(data), pdu.residual) == (5, 0)


def test_command_without_data_but_with_an_expected_length() -> None:
    client = Rig().logged_in()
    pdu, _ = client.command(TEST_UNIT_READY, read=100)
    assert (pdu.status, pdu.underflow, pdu.residual) == (0, True, 100)
    pdu, _ = client.command(TEST_UNIT_READY, write=100, data=bytes(100))
    assert (pdu.status, pdu.underflow, pdu.residual) == (0, True, 100)


def test_a_read_with_the_write_flag_and_data() -> None:
    client = Rig().logged_in()
    pdu, data = client.command(read_10(0, 1), write=512, data=bytes(512))
    assert pdu.status == 0
    assert data == b""


def test_a_write_with_the_read_flag_writes_nothing() -> None:
    rig = Rig()
    rig.device.data[:512] = b"\xee" * 512
    client = rig.logged_in()
    pdu, _ = client.command(write_10(0, 1), read=512)
    assert bytes(rig.device.data[:512]) == b"\xee" * 512
    assert pdu.opcode == 0x21


# -- sequencing


def test_many_commands_in_one_batch_are_answered_in_order() -> None:
    rig = Rig()
    rig.device.data[:] = pattern(SIZE, 8)
    client = rig.logged_in()
    tags, batch = [], b""
    for i in range(100):
        tag, pdu = client.initiator.command(read_16(i * 8, 8), read=4096)
        tags.append(tag)
        batch += pdu
    client.send(batch)
    for i, tag in enumerate(tags):
        answer = client.next_pdu()
        assert answer.tag == tag
        assert answer.data == bytes(rig.device.data[i * 4096 : i * 4096 + 4096])
        assert answer.max_cmd_sn == (answer.exp_cmd_sn + 127) & 0xFFFFFFFF


def test_output_larger_than_the_arena_is_sent_in_turns() -> None:
    rig = Rig()
    rig.device.data[:] = pattern(SIZE, 8)
    client = rig.logged_in()
    batch, tags = b"", []
    for i in range(100):
        tag, pdu = client.initiator.command(read_16(i * 256, 128), read=65536)
        batch += pdu
        tags.append(tag)
    client.send(batch)
    assert engine_of(client).paused
    for i, tag in enumerate(tags):
        answer, data = client.finish(tag)
        assert answer.status == 0
        assert data == bytes(rig.device.data[i * 131072 : i * 131072 + 65536])


def test_commands_outside_of_the_window_are_ignored() -> None:
    client = Rig().logged_in()
    for offset in (-1, -1000, 128, 5000, 1 << 31):
        number = (client.initiator.cmd_sn + offset) & 0xFFFFFFFF
        client.send(build(0x01, 0xC1, tag=500, word20=96, cmd_sn=number, tail=INQUIRY + bytes(10)))
        assert quiet(client)
    assert client.nop().opcode == 0x20


def test_a_gap_in_the_sequence_ends_the_session() -> None:
    client = Rig().logged_in()
    client.initiator.cmd_sn += 1
    _, pdu = client.initiator.command(TEST_UNIT_READY)
    client.send(pdu)
    with pytest.raises(ConnectionClosed):
        client.next_pdu()


def test_the_window_closes_and_opens() -> None:
    rig = Rig(devices=[MemoryDevice(SIZE, inline=False, completion=Completion.MANUAL)])
    client = rig.logged_in()
    tags = []
    for i in range(128):
        tag, pdu = client.initiator.command(read_16(i, 1), read=512)
        client.send(pdu)
        tags.append(tag)
    tag, pdu = client.initiator.command(TEST_UNIT_READY)
    client.send(pdu)  # does not fit: dropped
    assert quiet(client)
    client.initiator.cmd_sn -= 1
    rig.device.complete(1)
    answer = client.pdu_for(tags[0])
    assert answer.max_cmd_sn == answer.exp_cmd_sn
    rig.device.complete()
    assert [client.pdu_for(tag).status for tag in tags[1:]] == [0] * 127
    assert client.nop().max_cmd_sn == (client.initiator.cmd_sn + 127) & 0xFFFFFFFF


def test_completions_mark_the_connection_dirty() -> None:
    rig = Rig(devices=[MemoryDevice(SIZE, inline=False, completion=Completion.MANUAL)])
    client = rig.logged_in()
    tag, pdu = client.initiator.command(read_16(0, 8), read=4096)
    client.send(pdu)
    assert quiet(client)
    rig.dirty.clear()
    rig.device.complete()
    assert rig.dirty == [engine_of(client)]
    assert client.pdu_for(tag).status == 0
    assert rig.buffers.outstanding == 0


def test_immediate_commands_pass_the_window_but_are_limited() -> None:
    rig = Rig(devices=[MemoryDevice(SIZE, inline=False, completion=Completion.MANUAL)])
    client = rig.logged_in()
    refusals = 0
    for i in range(20):
        _, pdu = client.initiator.command(read_16(i, 1), read=512, immediate=True)
        client.send(pdu)
        while not quiet(client):
            reject = client.next_pdu()
            assert (reject.opcode, reject.response) == (0x3F, 0x06)
            refusals += 1
    assert refusals == 4
    rig.device.complete()
    client.clear_attention()


def test_a_task_tag_in_use_is_rejected() -> None:
    rig = Rig(devices=[MemoryDevice(SIZE, inline=False, completion=Completion.MANUAL)])
    client = rig.logged_in()
    tag, pdu = client.initiator.command(read_16(0, 1), read=512)
    client.send(pdu)
    _, again = client.initiator.command(read_16(1, 1), read=512, tag=tag)
    client.send(again)
    reject = client.next_pdu()
    assert (reject.opcode, reject.response) == (0x3F, 0x07)
    assert reject.data == again[:48], "the offending header comes back"
    rig.device.complete()
    assert client.pdu_for(tag).status == 0


def test_the_reserved_task_tag_is_rejected() -> None:
    client = Rig().logged_in()
    _, pdu = client.initiator.command(read_16(0, 1), read=512, tag=NO_TAG)
    client.send(pdu)
    assert client.next_pdu().response == 0x09
    client.clear_attention()


def test_extended_cdb_is_put_together() -> None:
    client = Rig().logged_in()
    ahs = bytes([0, 17, 1, 0]) + bytes(16)
    tag, pdu = client.initiator.command(b"\x7f" + bytes(15), read=512, ahs=ahs)
    client.send(pdu)
    assert client.pdu_for(tag).sense_code == (5, 0x2000)


@pytest.mark.parametrize(
    "pdu",
    [
        build(0x01, 0xC1, ahs=bytes([0, 200, 1, 0])),
        build(0x43, 0x81),
        build(0x21),
        build(0x01, 0xA1, data_length=0xFFFFFF),
    ],
)
def test_what_cannot_be_understood_ends_the_connection(pdu: bytes) -> None:
    client = Rig().logged_in()
    number = client.initiator.cmd_sn
    client.send(pdu[:24] + struct.pack(">I", number) + pdu[28:])
    with pytest.raises(ConnectionClosed):
        client.next_pdu()


@pytest.mark.parametrize("opcode", [0x07, 0x1C, 0x1F])
def test_unknown_opcodes_are_rejected(opcode: int) -> None:
    client = Rig().logged_in()
    client.send(build(opcode, 0x80))
    assert client.next_pdu().response == 0x05
    client.clear_attention()


@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_snack_is_rejected(kind: int) -> None:
    client = Rig().logged_in()
    client.send(build(0x10, 0x80 | kind))
    assert client.next_pdu().response == 0x03
    client.clear_attention()


@pytest.mark.parametrize("kind", list(DEVICES))
def test_in_flight_reads_are_bounded(kind: str) -> None:
    rig = Rig(devices=[DEVICES[kind]()])
    client = rig.logged_in()
    rig.device.completion = Completion.MANUAL
    rig.device.inline = False
    tags = []
    for i in range(100):
        tag, pdu = client.initiator.command(read_16(i, 2048), read=1 << 20)
        client.send(pdu)
        tags.append(tag)
    assert len(rig.device.outstanding) <= 32, "more than the budget of 32 MiB is under way"
    for tag in tags:
        rig.device.complete(1)
        answer, data = client.finish(tag)
        assert (answer.status, len(data)) == (0, 1 << 20)
    assert rig.buffers.outstanding == 0
