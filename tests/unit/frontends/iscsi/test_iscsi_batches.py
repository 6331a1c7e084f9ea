"""How much is read before what is there is sent."""

from __future__ import annotations

from ploopd.frontends.iscsi.fast_path import BURST, ENOUGH
from tests.support.cdb import read_16
from tests.unit.frontends.iscsi.rig import Rig, engine_of


def first_output(blocks: int, count: int) -> tuple[int, int]:
    """Bytes of the first output of `count` READs that arrive together, and READs executed then."""
    rig = Rig()
    client = rig.logged_in(MaxRecvDataSegmentLength=str(1 << 20))
    engine = engine_of(client)
    pdus = b"".join(
        client.initiator.command(read_16(i * blocks, blocks), read=blocks * 512)[1]
        for i in range(count)
    )
    before = len(rig.device.log)
    engine.receive_buffer()[: len(pdus)] = pdus
    engine.received(len(pdus), rig.now)
    return sum(len(piece) for piece in engine.data_to_send()), len(rig.device.log) - before


def test_small_reads_are_sent_sixteen_at_a_time() -> None:
    assert first_output(8, 40) == (BURST * (4096 + 48), BURST)


def test_large_reads_are_sent_one_at_a_time() -> None:
    assert first_output(ENOUGH // 512, 6) == (ENOUGH + 48, 1)


def test_what_was_held_back_follows() -> None:
    rig = Rig()
    client = rig.logged_in(MaxRecvDataSegmentLength=str(1 << 20))
    tags = []
    for i in range(6):
        tag, pdu = client.initiator.command(read_16(i * 256, 256), read=1 << 17)
        tags.append(tag)
        client.send(pdu)
    assert [client.next_pdu().tag for _ in tags] == tags
