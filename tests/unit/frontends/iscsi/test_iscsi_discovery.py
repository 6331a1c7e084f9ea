"""Discovery sessions, and text requests in any session."""

from __future__ import annotations

import pytest

from ploopd.scsi.target import Target
from tests.support.cdb import read_16
from tests.support.iscsi_client import TARGET
from tests.support.iscsi_pdu import NO_TAG, text
from tests.unit.frontends.iscsi.rig import Rig, engine_of


def test_send_targets() -> None:
    client = Rig().client(target=None)
    client.login()
    expected = [f"TargetName={TARGET}", "TargetAddress=127.0.0.1:3260,1"]
    assert client.text_items(["SendTargets=All"]) == expected
    assert client.text_items([f"SendTargets={TARGET}"]) == expected


def test_wildcard_portals_are_shown_as_the_address_in_use() -> None:
    rig = Rig()
    rig.node.addresses = [("0.0.0.0", 3260), ("::1", 3261)]
    client = rig.client(target=None)
    client.login()
    assert client.text_items(["SendTargets=All"])[1:] == [
        "TargetAddress=192.0.2.9:3260,1",
        "TargetAddress=[::1]:3261,1",
    ]


@pytest.mark.parametrize("value", ["All", "", TARGET])
def test_a_normal_session_sees_its_own_target(value: str) -> None:
    rig = Rig()
    rig.node.targets["iqn.2026-11.org.ploopd:another"] = Target("another")
    client = rig.logged_in()
    items = client.text_items([f"SendTargets={value}"])
    assert [item for item in items if item.startswith("TargetName")] == [f"TargetName={TARGET}"]


@pytest.mark.parametrize(
    "data",
    [
        b"SendTargets=Alle\0",
        b"SendTargets=A\0",
        b"SendTargets=iqn.2026-11.org.ploopd:another\0",
        b"sendtargets=All\0",
        b"NoSuchKey=1\0",
        b"SendTargets=All",
        b"novalue\0",
        b"SendTargets=All\0SendTargets=All\0",
        b"MaxRecvDataSegmentLength=1\0",
    ],
)
def test_bad_text_is_rejected(data: bytes) -> None:
    client = Rig().logged_in()
    _, pdu = client.initiator.request(0x04, data=data)
    client.send(pdu)
    reject = client.next_pdu()
    assert (reject.opcode, reject.response) == (0x3F, 0x04)
    assert client.text(["SendTargets=All"])["TargetName"] == TARGET


def test_long_answers_come_in_pieces() -> None:
    rig = Rig()
    names = [f"iqn.2026-11.org.ploopd:target-{i:04d}" for i in range(200)]
    rig.node.targets.update({name: Target(name) for name in names})
    client = rig.client(target=None)
    client.login(overrides={"MaxRecvDataSegmentLength": "512"})
    items = client.text_items(["SendTargets=All"])
    assert [i for i in items if i.startswith("TargetName")] == [
        f"TargetName={name}" for name in sorted([*names, TARGET])
    ]


def test_requests_in_pieces() -> None:
    client = Rig().logged_in()
    tag, pdu = client.initiator.request(0x04, 0x40, data=b"SendTar")
    client.send(pdu)
    answer = client.next_pdu()
    assert not answer.final
    assert answer.transfer_tag != NO_TAG
    _, pdu = client.initiator.request(
        0x04, 0x80, tag=tag, word20=answer.transfer_tag, data=b"gets=All\0"
    )
    client.send(pdu)
    assert client.next_pdu().keys["TargetName"] == TARGET


def test_text_without_end_is_bounded() -> None:
    client = Rig().logged_in()
    tag, transfer_tag, reject = None, NO_TAG, None
    for _ in range(20):
        tag, pdu = client.initiator.request(
            0x04, 0x40, tag=tag, word20=transfer_tag, data=b"A" * 8192
        )
        client.send(pdu)
        reject = client.next_pdu()
        if reject.opcode == 0x3F:
            break
        transfer_tag = reject.transfer_tag
    assert reject is not None
    assert reject.opcode == 0x3F


def test_a_wrong_transfer_tag_in_a_text_request() -> None:
    client = Rig().logged_in()
    _, pdu = client.initiator.request(0x04, word20=77, data=text(["SendTargets=All"]))
    client.send(pdu)
    assert client.next_pdu().response == 0x09


def test_the_segment_length_may_change_later() -> None:
    client = Rig().logged_in()
    assert client.text(["MaxRecvDataSegmentLength=1024"]) == {}
    tag, pdu = client.initiator.command(read_16(0, 8), read=4096)
    client.send(pdu)
    assert len(client.pdu_for(tag).data) == 1024


def test_scsi_commands_do_not_belong_into_a_discovery_session() -> None:
    client = Rig().client(target=None)
    client.login()
    _, pdu = client.initiator.command(bytes(6))
    client.send(pdu)
    assert client.next_pdu().response == 0x05


def test_idle_discovery_sessions_end() -> None:
    rig = Rig()
    client = rig.client(target=None)
    client.login()
    rig.pass_time(client, 61)
    assert engine_of(client).aborted
