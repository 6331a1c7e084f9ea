"""The invariant of the engine: how the bytes are cut makes no difference."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ploopd.frontends.iscsi.connection import Connection
from tests.support.cdb import INQUIRY, TEST_UNIT_READY, read_16, write_16
from tests.support.iscsi_client import OPERATIONAL
from tests.support.iscsi_pdu import Initiator, Pdu, build, text
from tests.support.memory_device import MemoryDevice, pattern
from tests.unit.frontends.iscsi.rig import SIZE, Rig

KEYS = ["InitiatorName=iqn.2026-11.org.example:initiator", "AuthMethod=None"]


def conversation(*, digests: bool) -> bytes:
    """A whole session from the first login request to the logout, as one stream."""
    target = "TargetName=iqn.2026-11.org.ploopd:target"
    initiator = Initiator()
    digest = ["HeaderDigest=CRC32C", "DataDigest=CRC32C"] if digests else []
    keys = [key for key in OPERATIONAL if not (digests and "Digest" in key)] + digest
    out = [initiator.login([*KEYS, target]), initiator.login(keys, stage=1, next_stage=3)]
    initiator.header_digest = initiator.data_digest = digests
    out.append(initiator.command(TEST_UNIT_READY)[1])
    for i in range(6):
        data = pattern(512 * (i + 1), i)
        out.append(initiator.command(write_16(i * 8, i + 1), write=len(data), data=data)[1])
        out.append(initiator.command(read_16(i * 8, i + 1), read=len(data))[1])
    tag, pdu = initiator.command(write_16(100, 2), write=1024, data=b"a" * 100, final=False)
    out += [pdu, initiator.data_out(tag, b"b" * 924, offset=100)]
    out.append(initiator.command(INQUIRY, read=96)[1])
    out.append(initiator.request(0x00, data=b"ping")[1])
    out.append(initiator.request(0x04, data=text(["SendTargets=All"]))[1])
    out.append(initiator.request(0x02, 0x81, immediate=True, word20=99)[1])
    out.append(initiator.request(0x06)[1])
    return b"".join(out)


def run(stream: bytes, cuts: list[int], *, inline: bool = True) -> tuple[bytes, bytes, bool]:
    """Feed the stream in pieces: (what came back, the disk, whether it ended)."""
    rig = Rig(devices=[MemoryDevice(SIZE, inline=inline)])
    engine = rig.engine()
    out = bytearray()
    ends = [*sorted(set(cuts)), len(stream)]
    start = 0
    for end in ends:
        piece = stream[start:end]
        start = end
        while piece:
            if engine.wants_close:
                break
            space = engine.receive_buffer()
            count = min(len(space), len(piece))
            space[:count] = piece[:count]
            engine.received(count, rig.now)
            drain(engine, out)
            piece = piece[count:]
    return bytes(out), bytes(rig.device.data[:65536]), engine.wants_close


def drain(engine: Connection, out: bytearray) -> None:
    while pieces := engine.data_to_send():
        for piece in pieces:
            out += piece
        engine.sent(sum(map(len, pieces)))


@pytest.mark.parametrize("digests", [False, True])
@pytest.mark.parametrize("inline", [False, True])
def test_byte_by_byte_equals_all_at_once(digests: bool, inline: bool) -> None:
    stream = conversation(digests=digests)
    whole = run(stream, [], inline=inline)
    pieces = run(stream, list(range(1, len(stream))), inline=inline)
    assert whole == pieces
    assert whole[2], "the logout ends it"
    assert opcodes(whole[0], digests)[-1] == 0x26


@given(st.lists(st.integers(1, 14000), max_size=30), st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_cut_gives_the_same(cuts: list[int], digests: bool) -> None:
    stream = conversation(digests=digests)
    cuts = [cut for cut in cuts if cut < len(stream)]
    assert run(stream, cuts) == run(stream, [])


def test_fast_and_general_path_answer_alike() -> None:
    stream = conversation(digests=False)
    assert run(stream, [], inline=True) == run(stream, [], inline=False)


def opcodes(stream: bytes, digests: bool) -> list[int]:
    """The opcodes of everything the target sent; the login answers come without digests."""
    initiator = Initiator()
    pdus: list[Pdu] = []
    end = 0
    for _ in range(2):
        length = 48 + -(-int.from_bytes(stream[end + 5 : end + 8], "big") // 4) * 4
        pdus += initiator.feed(stream[end : end + length])
        end += length
    initiator.header_digest = initiator.data_digest = digests
    pdus += initiator.feed(stream[end:])
    return [pdu.opcode for pdu in pdus]


@pytest.mark.parametrize("end", range(0, 1400, 7))
def test_garbage_anywhere_does_no_harm(end: int) -> None:
    """The stream turns into 0xff bytes: answered, rejected or closed, never an exception."""
    stream = conversation(digests=False)[:end] + b"\xff" * 200
    run(stream, [])


def test_a_target_pdu_from_the_initiator_ends_the_session() -> None:
    stream = conversation(digests=False)
    login_end = len(stream) - len(stream[stream.index(b"\x01\x81") :])
    _, _, closed = run(stream[:login_end] + build(0x21), [])
    assert closed
