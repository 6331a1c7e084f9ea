"""The data phase of writes: immediate, unsolicited and solicited data, and its violations."""

from __future__ import annotations

import errno

import pytest

from ploopd.frontends.iscsi.config import IscsiConfig, Limits
from tests.support.cdb import write_10, write_16
from tests.support.iscsi_client import TARGET, Client
from tests.support.iscsi_pdu import NO_TAG, Pdu
from tests.support.memory_device import Completion, MemoryDevice, pattern
from tests.unit.frontends.iscsi.rig import SIZE, Rig, engine_of, quiet

BLOCKS = 64
DATA = pattern(BLOCKS * 512, 11)
WRITE = write_16(16, BLOCKS)
START = 16 * 512


def write_pdu(client: Client, *, data: bytes = b"", final: bool = True) -> int:
    """Send a WRITE of DATA with `data` as immediate data; its tag."""
    tag, pdu = client.initiator.command(WRITE, write=len(DATA), data=data, final=final)
    client.send(pdu)
    return tag


def written(rig: Rig) -> bytes:
    return bytes(rig.device.data[START : START + len(DATA)])


KINDS = pytest.mark.parametrize("inline", [True, False])
SMALL = {"MaxBurstLength": "8192", "FirstBurstLength": "8192"}


@KINDS
@pytest.mark.parametrize("immediate", [0, 512, 700, 4096])
@pytest.mark.parametrize("unsolicited", [0, 512, 1000, 4096])
@pytest.mark.parametrize("segment", [512, 777, 8192])
@pytest.mark.parametrize("outstanding", ["1", "4"])
def test_every_way_to_bring_the_data(
    inline: bool, immediate: int, unsolicited: int, segment: int, outstanding: str
) -> None:
    rig = Rig(devices=[MemoryDevice(SIZE, inline=inline)])
    client = rig.logged_in(MaxOutstandingR2T=outstanding, **SMALL)
    answer, _ = client.command(
        WRITE,
        write=len(DATA),
        data=DATA,
        immediate_data=immediate,
        unsolicited=unsolicited,
        segment=segment,
    )
    assert (answer.opcode, answer.status, answer.residual) == (0x21, 0, 0)
    assert written(rig) == DATA
    assert not any(rig.device.data[:START])
    assert not any(rig.device.data[START + len(DATA) : START + 65536])
    assert rig.buffers.outstanding == 0


def test_r2t_fields_and_limits() -> None:
    client = Rig().logged_in(MaxOutstandingR2T="3", **SMALL)
    tag = write_pdu(client)
    r2ts = [client.next_pdu() for _ in range(3)]
    assert quiet(client), "no more than MaxOutstandingR2T"
    assert [r.opcode for r in r2ts] == [0x31] * 3
    assert [r.word(40) for r in r2ts] == [0, 8192, 16384]
    assert [r.word(44) for r in r2ts] == [8192] * 3
    assert [r.word(36) for r in r2ts] == [0, 1, 2], "R2TSN"
    assert len({r.transfer_tag for r in r2ts}) == 3
    assert all(r.tag == tag and r.transfer_tag != NO_TAG for r in r2ts)
    before = r2ts[0].stat_sn
    assert all(r.stat_sn == before for r in r2ts), "an R2T does not consume a StatSN"
    for r2t in r2ts:
        client._answer_r2t(r2t, DATA, 8192)
    answer, _ = client.finish(tag, DATA)
    assert (answer.status, answer.stat_sn) == (0, before)
    assert answer.word(36) == 4, "ExpDataSN counts the R2Ts"


def test_a_failing_command_does_not_solicit_data() -> None:
    client = Rig().logged_in()
    tag, pdu = client.initiator.command(write_16(1 << 40, 8), write=4096)
    client.send(pdu)
    answer = client.next_pdu()
    assert (answer.tag, answer.opcode) == (tag, 0x21)
    assert answer.sense_code == (5, 0x2100)


def test_announced_data_of_a_failing_command_is_swallowed() -> None:
    client = Rig().logged_in()
    tag, pdu = client.initiator.command(
        write_16(1 << 40, 8), write=4096, data=bytes(512), final=False
    )
    client.send(pdu)
    assert quiet(client), "the response waits for the data that was announced"
    client.send(client.initiator.data_out(tag, bytes(512), offset=512, number=0, final=False))
    assert quiet(client)
    client.send(client.initiator.data_out(tag, bytes(512), offset=1024, number=1))
    assert client.next_pdu().sense_code == (5, 0x2100)
    client.clear_attention()


def test_fewer_unsolicited_bytes_than_possible_are_fine() -> None:
    rig = Rig()
    client = rig.logged_in()
    answer, _ = client.command(WRITE, write=len(DATA), data=DATA, immediate_data=0, unsolicited=512)
    assert answer.status == 0
    assert written(rig) == DATA


def fails(client: Client, tag: int, code: int) -> Pdu:
    """The command ends with ABORTED COMMAND and this additional sense code."""
    answer = client.pdu_for(tag)
    assert answer.opcode == 0x21
    assert answer.sense_code == (0xB, code)
    client.clear_attention()
    return answer


@KINDS
@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"number": 1}, 0x4B00),
        ({"number": 0xFFFFFFFF}, 0x4B00),
        ({"offset": 512}, 0x4B05),
        ({"transfer_tag": 0x1234}, 0x4B01),
        ({"transfer_tag": NO_TAG}, 0x0C0C),
        ({"data": bytes(16384)}, 0x4B02),
        ({"data": bytes(512)}, 0x4B00),  # the sequence ends too early
    ],
)
def test_wrong_solicited_data(inline: bool, change: dict[str, object], code: int) -> None:
    rig = Rig(devices=[MemoryDevice(SIZE, inline=inline)])
    client = rig.logged_in(**SMALL)
    tag = write_pdu(client)
    r2t = client.next_pdu()
    right = {"data": DATA[:8192], "offset": 0, "number": 0, "transfer_tag": r2t.transfer_tag}
    wrong = right | change
    data = wrong.pop("data")
    client.send(client.initiator.data_out(tag, data, **wrong))
    fails(client, tag, code)
    assert rig.buffers.outstanding == 0
    client.send(
        client.initiator.data_out(tag, DATA[:8192], offset=0, transfer_tag=r2t.transfer_tag)
    )
    while not quiet(client):
        assert client.next_pdu().opcode == 0x3F, "at most a reject for what comes late"
    client.clear_attention()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"number": 3}, 0x4B00),
        ({"offset": 0}, 0x4B05),
        ({"offset": 4096}, 0x4B05),
        ({"data": bytes(8192)}, 0x0C0C),  # beyond FirstBurstLength
    ],
)
def test_wrong_unsolicited_data(change: dict[str, object], code: int) -> None:
    client = Rig().logged_in(**SMALL)
    tag = write_pdu(client, data=DATA[:512], final=False)
    wrong = {"data": DATA[512:1024], "offset": 512, "number": 0} | change
    data = wrong.pop("data")
    client.send(client.initiator.data_out(tag, data, **wrong))
    fails(client, tag, code)


def test_unsolicited_data_after_its_end() -> None:
    client = Rig().logged_in(**SMALL)
    tag = write_pdu(client, data=DATA[:512], final=False)
    client.send(client.initiator.data_out(tag, DATA[512:1024], offset=512))
    assert client.next_pdu().opcode == 0x31
    client.send(client.initiator.data_out(tag, DATA[1024:1536], offset=1024, number=1))
    fails(client, tag, 0x0C0C)


def test_unsolicited_data_when_it_was_not_negotiated() -> None:
    client = Rig().logged_in(InitialR2T="Yes")
    tag = write_pdu(client, data=DATA[:512], final=False)
    client.send(client.initiator.data_out(tag, DATA[512:1024], offset=512))
    fails(client, tag, 0x0C0C)


@pytest.mark.parametrize(
    ("keys", "length"),
    [
        ({"ImmediateData": "No"}, 512),
        ({"FirstBurstLength": "4096", "MaxBurstLength": "4096"}, 4608),
    ],
)
def test_immediate_data_that_was_not_negotiated(keys: dict[str, str], length: int) -> None:
    rig = Rig()
    client = rig.logged_in(**keys)
    tag = write_pdu(client, data=DATA[:length])
    fails(client, tag, 0x0C0C)
    assert not any(written(rig))


def test_more_immediate_data_than_expected() -> None:
    client = Rig().logged_in()
    tag, pdu = client.initiator.command(write_10(0, 1), write=512, data=bytes(1024))
    client.send(pdu)
    fails(client, tag, 0x0C0C)


def test_data_for_a_command_that_does_not_exist() -> None:
    client = Rig().logged_in()
    client.send(client.initiator.data_out(4711, bytes(512), offset=0))
    assert quiet(client), "unsolicited data of a command that was dropped is dropped, too"
    client.send(client.initiator.data_out(4711, bytes(512), offset=0, transfer_tag=7))
    reject = client.next_pdu()
    assert (reject.opcode, reject.response) == (0x3F, 0x09)


def test_immediate_data_without_the_write_flag_is_rejected() -> None:
    client = Rig().logged_in()
    _, pdu = client.initiator.request(0x01, 0xC1, word20=512, tail=bytes(16), data=bytes(512))
    client.send(pdu)
    assert client.next_pdu().response == 0x09
    client.clear_attention()


def test_data_that_never_comes() -> None:
    config = IscsiConfig(
        iqn=TARGET, limits=Limits(data_out_timeout=45.0, nop_interval=0, output_arena=1 << 20)
    )
    rig = Rig(config=config)
    client = rig.logged_in(**SMALL)
    solicited = write_pdu(client)
    assert client.next_pdu().opcode == 0x31
    unsolicited = write_pdu(client, final=False)
    rig.pass_time(client, 44)
    assert quiet(client)
    rig.pass_time(client, 2)
    assert client.next_pdu().sense_code == (0xB, 0x4B03)
    assert client.next_pdu().sense_code == (0xB, 0x4B03)
    assert quiet(client)
    assert {solicited, unsolicited}.isdisjoint(engine_of(client)._flow.commands)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_device_that_stops_taking_pieces(after: int) -> None:
    """A streamed write goes on as a task when the device says "not now", without losing a byte."""
    rig = Rig()
    client = rig.logged_in(**SMALL)
    tag = write_pdu(client)
    for i in range(4):
        if i == after:
            rig.device.inline = False
        r2t = client.next_pdu()
        client._answer_r2t(r2t, DATA, 8192)
    answer, _ = client.finish(tag, DATA)
    assert (answer.status, answer.residual) == (0, 0)
    assert written(rig) == DATA
    assert rig.buffers.outstanding == 0


def test_an_error_in_the_middle_of_a_streamed_write() -> None:
    rig = Rig()
    client = rig.logged_in(**SMALL)
    rig.device.fail("write", errno.ENOSPC, start=START + 8192, times=None)
    answer, _ = client.command(WRITE, write=len(DATA), data=DATA, immediate_data=0)
    assert answer.sense_code == (7, 0x2707)
    assert written(rig)[:8192] == DATA[:8192]
    assert rig.buffers.outstanding == 0


def test_a_unit_attention_stops_a_streamed_write() -> None:
    rig = Rig()
    client, other = rig.logged_in(**SMALL), None
    tag = write_pdu(client)
    r2t = client.next_pdu()
    other = rig.client()
    other.initiator.isid = b"\x80\0\0\0\0\x09"
    other.login()
    other.task_management(5)
    client._answer_r2t(r2t, DATA, 8192)
    answer = client.pdu_for(tag)
    assert answer.sense_code[0] == 6
    assert not any(written(rig))


def test_writes_wait_for_memory_not_for_ever() -> None:
    rig = Rig(devices=[MemoryDevice(SIZE * 4, inline=False, completion=Completion.MANUAL)])
    client = rig.logged_in()
    tags = []
    for i in range(40):
        tag, pdu = client.initiator.command(write_16(i * 2048, 2048), write=1 << 20)
        client.send(pdu)
        tags.append(tag)
    first = []
    while not quiet(client):
        first.append(client.next_pdu())
    assert len(first) == 32, "R2Ts for 32 MiB"
    data = pattern(1 << 20, 1)
    for pdu in first:
        client._inbox.append(pdu)
    done = set()
    while len(done) < len(tags):
        while quiet(client) and not client._inbox:
            assert rig.device.complete(1)
        pdu = client.next_pdu()
        if pdu.opcode == 0x31:
            client._answer_r2t(pdu, data, 262144)
        else:
            assert pdu.status == 0
            done.add(pdu.tag)
    assert rig.buffers.outstanding == 0


def test_a_flood_of_unsolicited_data_meets_task_set_full() -> None:
    rig = Rig(devices=[MemoryDevice(SIZE, inline=False, completion=Completion.MANUAL)])
    client = rig.logged_in(FirstBurstLength="1048576", MaxBurstLength="1048576")
    for _ in range(100):
        _, pdu = client.initiator.command(write_16(0, 2048), write=1 << 20, data=bytes(1 << 20))
        client.send(pdu)
    assert rig.buffers.outstanding <= 70
    statuses = []
    while not quiet(client):
        statuses.append(client.next_pdu().status)
    assert statuses
    assert set(statuses) == {0x28}
    rig.device.complete()
    rig.device.completion = Completion.AT_ONCE
    while not quiet(client):
        assert client.next_pdu().status == 0
    assert rig.buffers.outstanding == 0
    client.clear_attention()
