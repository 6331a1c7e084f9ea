"""Random input to the iSCSI engine: whatever comes, it answers, rejects or closes.

The invariants: no exception gets out, output and memory stay bounded, and after the connection has
ended nothing of it is left.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ploopd.frontends.iscsi.connection import Connection, Phase
from tests.support.cdb import read_16, write_16
from tests.support.iscsi_client import TARGET
from tests.support.iscsi_pdu import NO_TAG, build, text
from tests.support.memory_device import Completion, MemoryDevice
from tests.unit.frontends.iscsi.rig import SIZE, Rig, engine_of

EXAMPLES = int(os.environ.get("PLOOPD_FUZZ_EXAMPLES", "150"))
BOUNDED = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
MAX_OUTPUT = 64 << 20

KEYS = st.sampled_from(
    [
        "InitiatorName=iqn.2026-11.org.example:i",
        f"TargetName={TARGET}",
        "SessionType=Normal",
        "SessionType=Discovery",
        "AuthMethod=None",
        "AuthMethod=CHAP,None",
        "CHAP_A=5,7",
        "CHAP_N=x",
        "CHAP_R=0x00",
        "HeaderDigest=CRC32C",
        "DataDigest=CRC32C,None",
        "InitialR2T=No",
        "ImmediateData=No",
        "MaxBurstLength=512",
        "FirstBurstLength=16777215",
        "MaxRecvDataSegmentLength=512",
        "MaxOutstandingR2T=65535",
        "X-odd=1",
    ]
)
TEXT = st.one_of(st.lists(KEYS, max_size=8).map(text), st.binary(max_size=300))
WORD = st.one_of(st.integers(0, 8), st.sampled_from([NO_TAG, 1 << 31]), st.integers(0, NO_TAG))


@st.composite
def login_pdus(draw: st.DrawFn) -> bytes:
    return build(
        0x43,
        draw(st.sampled_from([0x00, 0x04, 0x40, 0x81, 0x83, 0x87, 0x8B, 0xC1, 0xFF])),
        lun=draw(st.sampled_from([1 << 63, 0, 5])),
        tag=draw(st.sampled_from([0, 0, 0, 9])),
        cmd_sn=1,
        byte3=draw(st.sampled_from([0, 0, 0, 1])),
        data=draw(TEXT),
    )


CDBS = st.one_of(
    st.sampled_from([read_16(0, 8), write_16(0, 8), write_16(3, 64), read_16(1 << 40, 1)]),
    st.binary(min_size=16, max_size=16),
)


@st.composite
def full_feature_pdus(draw: st.DrawFn) -> tuple[bytes, bool]:
    """(a PDU whose CmdSN is still to be filled in, whether it takes one)."""
    opcode = draw(st.sampled_from([0, 1, 1, 1, 1, 2, 4, 5, 5, 5, 6, 0x10, 0x1C]))
    immediate = draw(st.booleans()) and opcode not in (5, 0x10)
    tail = draw(CDBS) if opcode == 1 else draw(st.binary(min_size=16, max_size=16))
    if opcode == 5:
        tail = bytes(4) + b"".join(
            draw(st.sampled_from([0, 1, 512, 4096])).to_bytes(4, "big") for _ in range(3)
        )
    data = draw(st.one_of(st.just(b""), st.binary(max_size=64), st.just(bytes(4096)), TEXT))
    pdu = build(
        opcode | (0x40 if immediate else 0),
        draw(st.one_of(st.integers(0, 255), st.sampled_from([0x80, 0xC1, 0xA1, 0x21, 0x81]))),
        lun=draw(st.sampled_from([0, 0, 0, 1 << 48, (1 << 64) - 1])),
        tag=draw(st.one_of(st.integers(1, 4), WORD)),
        word20=draw(st.one_of(WORD, st.sampled_from([4096, 32768]))),
        tail=tail,
        data=data,
        ahs=draw(st.sampled_from([b"", b"", b"", bytes([0, 17, 1, 0]) + bytes(16), bytes(8)])),
    )
    return pdu, not immediate and opcode in (0, 1, 2, 4, 6)


def feed(engine: Connection, data: bytes, now: float) -> int:
    """Bytes that came back."""
    output = 0
    view = memoryview(data)
    while view and not engine.wants_close:
        space = engine.receive_buffer()
        assert space
        count = min(len(space), len(view))
        space[:count] = view[:count]
        engine.received(count, now)
        view = view[count:]
        while pieces := engine.data_to_send():
            length = sum(map(len, pieces))
            output += length
            engine.sent(length)
            if engine.paused:
                engine.process(now)
        assert output < MAX_OUTPUT
    return output


def check_gone(rig: Rig, engine: Connection) -> None:
    engine.lost("the end of the example")
    for device in rig.devices:
        device.complete()
    assert engine.phase is Phase.ENDED
    assert rig.target.nexuses == []
    assert len(rig.node.sessions) == 0
    assert rig.buffers.outstanding == 0


@BOUNDED
@given(st.binary(max_size=2000))
def test_any_bytes_before_login(data: bytes) -> None:
    rig = Rig()
    engine = rig.engine()
    feed(engine, data, rig.now)
    check_gone(rig, engine)


@BOUNDED
@given(st.lists(login_pdus(), min_size=1, max_size=12))
def test_any_login(pdus: list[bytes]) -> None:
    rig = Rig()
    engine = rig.engine()
    assert feed(engine, b"".join(pdus), rig.now) < 1 << 20
    check_gone(rig, engine)


@BOUNDED
@given(
    st.lists(full_feature_pdus(), min_size=1, max_size=25),
    st.sampled_from([Completion.AT_ONCE, Completion.ON_KICK, Completion.MANUAL]),
    st.booleans(),
    st.booleans(),
)
def test_any_pdus_in_full_feature_phase(
    pdus: list[tuple[bytes, bool]], completion: Completion, inline: bool, cancellable: bool
) -> None:
    device = MemoryDevice(SIZE)
    rig = Rig(devices=[device])
    client = rig.logged_in(MaxBurstLength="8192", FirstBurstLength="8192")
    device.completion, device.inline, device.cancellable = completion, inline, cancellable
    engine = engine_of(client)
    number = client.initiator.cmd_sn
    for pdu, numbered in pdus:
        if engine.wants_close:
            break
        feed(engine, pdu[:24] + number.to_bytes(4, "big") + pdu[28:], rig.now)
        number = (number + numbered) & NO_TAG
    rig.pass_time(client, 70)
    check_gone(rig, engine)


@BOUNDED
@given(st.lists(st.binary(min_size=48, max_size=48), min_size=1, max_size=10))
def test_any_headers_in_full_feature_phase(headers: list[bytes]) -> None:
    rig = Rig()
    client = rig.logged_in()
    engine = engine_of(client)
    for header in headers:
        length = int.from_bytes(header[5:8], "big") % 2048
        pdu = header[:4] + bytes([header[4] % 8]) + length.to_bytes(3, "big") + header[8:]
        feed(engine, pdu + bytes((header[4] % 8) * 4 + -(-length // 4) * 4), rig.now)
    check_gone(rig, engine)
