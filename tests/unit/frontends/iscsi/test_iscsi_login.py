"""The login phase over the engine: every path in, every way to be refused."""

from __future__ import annotations

import base64
import logging
from dataclasses import replace

import pytest

from ploopd.frontends.iscsi.config import ChapAccount, ChapConfig, IscsiConfig, Limits
from ploopd.frontends.iscsi.connection import Phase
from ploopd.frontends.iscsi.pdu import LoginStatus
from tests.support.iscsi_client import (
    INITIATOR,
    OPERATIONAL,
    TARGET,
    Client,
    Credentials,
    LoginRefused,
)
from tests.support.iscsi_pdu import build, text
from tests.support.iscsi_transport import ConnectionClosed
from tests.unit.frontends.iscsi.rig import SMALL_LIMITS, Rig, engine_of, quiet

SECRET = b"correct horse battery"
CHAP = ChapConfig(
    accounts=(ChapAccount(user="alice", secret=SECRET),),
    mutual=ChapAccount(user="target", secret=b"staple for the target"),
    algorithms=(8, 7, 6, 5),
)
BASE = IscsiConfig(iqn=TARGET, limits=SMALL_LIMITS)
WITH_CHAP = replace(BASE, chap=CHAP)


def refused(client: Client, keys: list[str], stage: int = 0, next_stage: int | None = 1) -> int:
    """The status of a login request that must fail, and then the connection closes."""
    with pytest.raises(LoginRefused) as caught:
        client.login_step(keys, stage, next_stage)
    with pytest.raises(ConnectionClosed):
        client.next_pdu()
    return caught.value.status


def dropped(client: Client, data: bytes) -> None:
    """The target closes without an answer."""
    client.send(data)
    with pytest.raises(ConnectionClosed):
        client.next_pdu()


def test_plain_login_in_two_steps() -> None:
    client = Rig().client()
    first = client.login_step([*client.introduction(), "AuthMethod=None"], 0, 1)
    assert first.keys == {"AuthMethod": "None", "TargetPortalGroupTag": "1"}
    assert first.flags == 0x81
    assert first.bhs[14:16] == b"\0\0", "TSIH is 0 until the final response"
    last = client.login_step(OPERATIONAL, 1, 3)
    assert last.flags == 0x87
    assert last.bhs[14:16] != b"\0\0"
    assert last.keys["MaxRecvDataSegmentLength"] == "1048576"
    assert last.keys["InitialR2T"] == "No"
    assert last.bhs[8:14] == client.initiator.isid
    assert last.stat_sn == first.stat_sn + 1
    assert engine_of(client).phase is Phase.FULL_FEATURE


def test_login_that_skips_the_security_stage() -> None:
    client = Rig().client()
    last = client.login_step([*client.introduction(), *OPERATIONAL], 1, 3)
    assert last.flags == 0x87
    assert last.keys["TargetPortalGroupTag"] == "1"


def test_login_straight_from_security_to_full_feature_phase() -> None:
    client = Rig().client()
    last = client.login_step([*client.introduction(), "AuthMethod=None"], 0, 3)
    assert last.flags == 0x83
    client.clear_attention()


def test_login_in_pieces() -> None:
    client = Rig().client()
    keys = text([*client.introduction(), "AuthMethod=None"])
    client.send(client.initiator.login([], next_stage=None, incomplete=True, raw=keys[:20]))
    empty = client.next_pdu()
    assert empty.data == b""
    assert empty.flags == 0
    client.send(client.initiator.login([], raw=keys[20:]))
    assert client.next_pdu().keys["AuthMethod"] == "None"


def test_stat_sn_and_window_follow_the_login() -> None:
    client = Rig().client()
    client.initiator.cmd_sn = 0xFFFFFFFE
    client.login()
    client.clear_attention()
    for _ in range(4):
        assert client.nop().exp_cmd_sn == client.initiator.cmd_sn
    assert client.initiator.cmd_sn < 0x10


@pytest.mark.parametrize("code", [5, 6, 7, 8])
@pytest.mark.parametrize("mutual", [False, True])
def test_chap_login(code: int, mutual: bool) -> None:
    client = Rig(config=WITH_CHAP).client()
    credentials = Credentials("alice", SECRET, algorithms=str(code))
    if mutual:
        credentials.mutual_user = "target"
        credentials.mutual_secret = b"staple for the target"
    client.login(credentials=credentials)
    session = engine_of(client).session
    assert session is not None
    assert session.user == "alice"
    client.clear_attention()


def test_chap_answers_in_base64() -> None:
    client = Rig(config=WITH_CHAP).client()
    client.login_step([*client.introduction(), "AuthMethod=CHAP"], 0, None)
    offer = client.login_step(["CHAP_A=7"], 0, None).keys
    answer = client.chap_hash(7, int(offer["CHAP_I"]), SECRET, bytes.fromhex(offer["CHAP_C"][2:]))
    encoded = base64.b64encode(answer).decode()
    assert client.login_step(["CHAP_N=alice", f"CHAP_R=0b{encoded}"], 0, 1).flags == 0x81


@pytest.mark.parametrize(
    "credentials",
    [
        Credentials("alice", b"wrong wrong wrong"),
        Credentials("mallory", SECRET),
        Credentials("alice", SECRET, algorithms="56"),
    ],
)
def test_wrong_credentials_all_look_the_same(credentials: Credentials) -> None:
    client = Rig(config=WITH_CHAP).client()
    with pytest.raises(LoginRefused) as caught:
        client.login(credentials=credentials)
    assert caught.value.status == LoginStatus.AUTHENTICATION_FAILED


def test_chap_that_is_required_cannot_be_avoided() -> None:
    rig = Rig(config=WITH_CHAP)
    introduction = rig.client().introduction()
    status = LoginStatus.AUTHENTICATION_FAILED
    assert refused(rig.client(), [*introduction, "AuthMethod=None"]) == status
    assert refused(rig.client(), [*introduction, "AuthMethod=KRB5,SRP,SPKM1"]) == status
    assert refused(rig.client(), [*introduction, *OPERATIONAL], 1, 3) == status
    assert refused(rig.client(), introduction, 0, 1) == status
    assert refused(rig.client(), introduction, 0, 3) == status
    client = rig.client()
    client.login_step([*introduction, "AuthMethod=CHAP"], 0, None)
    client.login_step(["CHAP_A=7"], 0, None)
    assert client.login_step([], 0, 1).flags == 0, "no transition while CHAP is not finished"


def test_reflected_challenge_is_refused() -> None:
    rig = Rig(config=WITH_CHAP)
    client, other = rig.client(), rig.client()
    offers = []
    for each in (client, other):
        each.login_step([*each.introduction(), "AuthMethod=CHAP"], 0, None)
        offers.append(each.login_step(["CHAP_A=8"], 0, None).keys)
    answer = client.chap_hash(
        8, int(offers[0]["CHAP_I"]), SECRET, bytes.fromhex(offers[0]["CHAP_C"][2:])
    )
    keys = ["CHAP_N=alice", f"CHAP_R=0x{answer.hex()}", "CHAP_I=1"]
    status = refused(client, [*keys, f"CHAP_C={offers[1]['CHAP_C']}"])
    assert status == LoginStatus.AUTHENTICATION_FAILED


def test_discovery_has_its_own_credentials() -> None:
    rig = Rig(config=replace(BASE, discovery_chap=CHAP))
    rig.client().login()
    with pytest.raises(LoginRefused):
        rig.client(target=None).login()
    rig.client(target=None).login(credentials=Credentials("alice", SECRET))


def test_acl() -> None:
    rig = Rig(config=replace(BASE, acl=(INITIATOR.upper().replace("IQN", "iqn"),)))
    rig.client().login()
    other = rig.client(name="iqn.2026-11.org.example:other")
    assert refused(other, [*other.introduction(), "AuthMethod=None"]) == LoginStatus.FORBIDDEN


@pytest.mark.parametrize(
    ("keys", "status"),
    [
        ([], LoginStatus.MISSING_PARAMETER),
        ([f"InitiatorName={INITIATOR}"], LoginStatus.MISSING_PARAMETER),
        ([f"InitiatorName={INITIATOR}", "TargetName=iqn.2026-11.x:no"], 0x0203),
        ([f"InitiatorName={INITIATOR}", "SessionType=Odd"], 0x0209),
        (["InitiatorName=../../etc/passwd", f"TargetName={TARGET}"], 0x0200),
        (["InitiatorName=iqn.2026-11.x:a\nb", f"TargetName={TARGET}"], 0x0200),
        (["InitiatorName=iqn.2026-11.x:" + "a" * 300, f"TargetName={TARGET}"], 0x0200),
        ([f"InitiatorName={INITIATOR}", f"InitiatorName={INITIATOR}"], 0x0200),
        (["x" * 64 + "=1"], 0x0200),
        (["novalue"], 0x0200),
    ],
)
def test_bad_introductions(keys: list[str], status: int) -> None:
    assert refused(Rig().client(), keys) == status


@pytest.mark.parametrize(
    "keys",
    [
        ["HeaderDigest=None"],  # an operational key in the security stage
        ["SendTargets=All"],
        ["TargetPortalGroupTag=1"],
        ["CHAP_A=5"],
        ["AuthMethod=None", "CHAP_N=x", "CHAP_R=0x00"],
    ],
)
def test_keys_in_the_wrong_place(keys: list[str]) -> None:
    client = Rig().client()
    assert refused(client, [*client.introduction(), *keys]) >> 8 == 2


def test_security_keys_in_the_operational_stage() -> None:
    client = Rig().client()
    client.login_step([*client.introduction(), "AuthMethod=None"], 0, 1)
    assert refused(client, ["AuthMethod=None"], 1, 3) == LoginStatus.INITIATOR_ERROR


def test_negotiating_twice_fails() -> None:
    client = Rig().client()
    client.login_step([*client.introduction(), "AuthMethod=None"], 0, 1)
    client.login_step(["InitialR2T=No"], 1, None)
    assert refused(client, ["InitialR2T=Yes"], 1, 3) == LoginStatus.INITIATOR_ERROR


def test_unknown_keys_are_not_understood() -> None:
    client = Rig().client()
    keys = client.login_step([*client.introduction(), "AuthMethod=None", "X-foo=1"], 0, 1).keys
    assert keys["X-foo"] == "NotUnderstood"


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (0x82, "next stage 2"),
        (0x80, "no progress"),
        (0xC1, "transit and incomplete"),
        (0x89, "stage 2"),
        (0x8F, "full feature phase as the current stage"),
    ],
)
def test_impossible_stages(flags: int, why: str) -> None:
    client = Rig().client()
    data = text([*client.introduction(), "AuthMethod=None"])
    client.send(build(0x43, flags, lun=1 << 63, tag=0, cmd_sn=1, data=data))
    assert client.next_pdu().login_status == LoginStatus.INVALID_REQUEST, why


def test_going_back_to_the_security_stage() -> None:
    client = Rig().client()
    client.login_step([*client.introduction(), "AuthMethod=None"], 0, 1)
    assert refused(client, ["AuthMethod=None"], 0, 1) == LoginStatus.INVALID_REQUEST


@pytest.mark.parametrize("field", ["isid", "tsih", "cid", "tag"])
def test_fields_that_must_not_change(field: str) -> None:
    client = Rig().client()
    client.login_step([*client.introduction(), "AuthMethod=None"], 0, 1)
    initiator, tag = client.initiator, 0
    match field:
        case "isid":
            initiator.isid = b"\x80\0\0\0\0\x63"
        case "tsih":
            initiator.tsih = 5
        case "cid":
            initiator.cid = 9
        case _:
            tag = 77
    client.send(initiator.login(OPERATIONAL, stage=1, next_stage=3, tag=tag))
    assert client.next_pdu().login_status == LoginStatus.INVALID_REQUEST


def test_unsupported_version() -> None:
    client = Rig().client()
    pdu = build(0x43, 0x81, byte2=2, byte3=1, data=text(client.introduction()))
    client.send(pdu)
    assert client.next_pdu().login_status == LoginStatus.UNSUPPORTED_VERSION


def test_unknown_tsih() -> None:
    client = Rig().client()
    client.initiator.tsih = 99
    client.login_step([*client.introduction(), "AuthMethod=None"], 0, 1)
    assert refused(client, list(OPERATIONAL), 1, 3) == LoginStatus.SESSION_DOES_NOT_EXIST


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: disk\r\n\r\n" + b" " * 60,
        bytes.fromhex("16030100f8010000f40303") + bytes(60),
        bytes(64),
        build(0x01, 0xC1),
        build(0x00),
        build(0x03, 0x81),  # a login request without the immediate bit
        build(0x43, 0x81, data_length=0xFFFFFF),
        build(0x43, 0x81, data_length=8193),
        build(0x43, 0x81, ahs=bytes([0, 5, 2, 0, 0, 0, 0, 0])),
    ],
)
def test_what_is_no_login_is_dropped(data: bytes) -> None:
    dropped(Rig().client(), data)


def test_something_else_in_the_middle_of_a_login() -> None:
    client = Rig().client()
    client.login_step([*client.introduction(), "AuthMethod=None"], 0, 1)
    dropped(client, build(0x01, 0xC1))


def test_a_login_that_never_ends_is_ended() -> None:
    client = Rig().client()
    client.login_step([*client.introduction(), "AuthMethod=None"], 0, 1)
    for _ in range(18):
        client.login_step([], 1, None)
    client.login_step([], 1, None)
    with pytest.raises(LoginRefused) as caught:
        client.login_step([], 1, None)
    assert caught.value.status == LoginStatus.INVALID_REQUEST


def test_text_without_end_is_bounded() -> None:
    client = Rig().client()
    for _ in range(100):
        client.send(client.initiator.login([], next_stage=None, incomplete=True, raw=b"A" * 8000))
        if (status := client.next_pdu().login_status) != 0:
            break
    assert status == LoginStatus.INVALID_REQUEST


def test_many_unknown_keys_are_bounded() -> None:
    client = Rig().client()
    keys = [f"K{i:061d}=1" for i in range(115)]
    with pytest.raises(LoginRefused):
        client.login_step([*client.introduction(), *keys], 1, 3)


def test_memory_before_authentication() -> None:
    engine = Rig().engine()
    assert len(engine.receive_buffer()) <= 16 * 1024
    assert engine._tx.size + len(engine.receive_buffer()) <= 64 * 1024


def test_login_has_a_deadline() -> None:
    rig = Rig(config=replace(BASE, limits=Limits(login_timeout=15.0)))
    client = rig.client()
    client.login_step([*client.introduction(), "AuthMethod=None"], 0, 1)
    rig.pass_time(client, 14)
    assert not engine_of(client).wants_close
    client.send(client.initiator.login([], stage=1, next_stage=None)[:10])  # still talking
    rig.pass_time(client, 2)
    assert engine_of(client).aborted


def test_failures_are_logged_without_control_characters(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        refused(Rig().client(), ["InitiatorName=iqn.2026-11.x:a\nERROR forged line"])
    assert "\n" not in caplog.messages[-1]
    assert "status=02/00" in caplog.messages[-1]


def test_challenges_are_given_back_when_the_connection_ends() -> None:
    rig = Rig(config=WITH_CHAP)
    client = rig.client()
    client.login_step([*client.introduction(), "AuthMethod=CHAP"], 0, None)
    challenge = client.login_step(["CHAP_A=8"], 0, None).keys["CHAP_C"]
    assert bytes.fromhex(challenge[2:]) in rig.node.book
    engine_of(client).lost("test")
    assert bytes.fromhex(challenge[2:]) not in rig.node.book


def test_nothing_is_said_before_it_is_asked() -> None:
    assert quiet(Rig().client())
