"""Initiators that break the rules of the data phase at random: everything is settled in the end.

The invariants, once the device has answered and the time for missing data is up: every command was
answered or aborted, the window is as wide as at the beginning, StatSN has no gap, and no buffer,
budget, task or transfer tag is left.
"""

from __future__ import annotations

import os
import random

import pytest

from ploopd.frontends.iscsi.config import IscsiConfig, Limits
from tests.support.cdb import read_10, read_16, write_10, write_16
from tests.support.iscsi_client import TARGET, Client
from tests.support.iscsi_pdu import MASK, NO_TAG, Pdu
from tests.support.iscsi_transport import ConnectionClosed
from tests.support.memory_device import Completion, MemoryDevice
from tests.unit.frontends.iscsi.rig import Rig, engine_of, quiet

SEEDS = range(2 * int(os.environ.get("PLOOPD_FUZZ_EXAMPLES", "150")))
OTHER_COMMANDS = (0x89, 0x8B, 0x93, 0x42, 0x35, 0x12, 0x55, 0x8F)
ZEROS = bytes(1 << 20)


class Chaos:
    """One session whose every step is drawn from `seed`."""

    def __init__(self, seed: int) -> None:
        self.draw = draw = random.Random(seed)
        self.window = draw.choice([2, 8, 32])
        limits = Limits(
            inflight_bytes=draw.choice([8192, 65536, 1 << 20]),
            window=self.window,
            nop_interval=0,
            data_out_timeout=20,
            immediate_commands=4,
        )
        self.device = MemoryDevice(
            4 << 20, inline=draw.random() < 0.5, cancellable=draw.random() < 0.5
        )
        self.rig = Rig(config=IscsiConfig(iqn=TARGET, limits=limits), devices=[self.device])
        self.client: Client = self.rig.logged_in(
            DataDigest=draw.choice(["None", "None", "CRC32C"]),
            MaxBurstLength=draw.choice(["4096", "65536"]),
            FirstBurstLength="4096",
            InitialR2T=draw.choice(["Yes", "No"]),
            MaxRecvDataSegmentLength=draw.choice(["512", "1000", "8192"]),
            MaxOutstandingR2T=draw.choice(["1", "3"]),
        )
        self.device.completion = draw.choice(list(Completion))
        self.engine = engine_of(self.client)
        self.tags: list[int] = []
        self.r2ts: list[Pdu] = []
        self.stat_sns: list[int] = []

    def command(self) -> None:
        draw, initiator = self.draw, self.client.initiator
        blocks, lba, writes = draw.choice([1, 8, 16, 40]), draw.randrange(64), draw.random() < 0.5
        cdb = draw.choice([write_16, write_10] if writes else [read_16, read_10])(lba, blocks)
        if draw.random() < 0.1:
            noise = bytes(draw.randrange(256) if draw.random() < 0.2 else 0 for _ in range(15))
            cdb = bytes([draw.choice(OTHER_COMMANDS)]) + noise
        expected = draw.choice([blocks * 512] * 8 + [0, 1, 511, 513, 8192, 0xFFFFFFFF])
        tag, pdu = initiator.command(
            cdb,
            write=expected if writes else 0,
            read=0 if writes else expected,
            data=bytes(draw.choice([0, 0, 512, 700, 4096])) if writes else b"",
            final=draw.random() < 0.8,
            attribute=draw.choice([0, 1, 1, 1, 2, 3]),
        )
        self.tags.append(tag)
        self.client.send(pdu)

    def solicited(self) -> None:
        if not self.r2ts:
            return
        draw = self.draw
        r2t = self.r2ts.pop(draw.randrange(len(self.r2ts)) if draw.random() < 0.2 else 0)
        if draw.random() < 0.8:
            self.client._answer_r2t(r2t, ZEROS, draw.choice([512, 777, 8192]))
            return
        pdu = self.client.initiator.data_out(
            r2t.tag,
            bytes(draw.choice([0, 512, 9000])),
            offset=r2t.word(40) + draw.choice([0, 0, 512]),
            number=draw.choice([0, 0, 1]),
            transfer_tag=r2t.transfer_tag,
            final=draw.random() < 0.5,
        )
        self.client.send(pdu)

    def unsolicited(self) -> None:
        draw = self.draw
        pdu = self.client.initiator.data_out(
            draw.choice([*self.tags, 0x7777]),
            bytes(draw.choice([0, 512, 700])),
            offset=draw.choice([0, 512, 700, 1024]),
            number=draw.choice([0, 1, 2]),
            final=draw.random() < 0.6,
        )
        self.client.send(pdu)

    def manage(self) -> None:
        draw = self.draw
        _, pdu = self.client.initiator.request(
            0x02,
            0x80 | draw.choice([1, 1, 1, 2, 4, 5, 6, 9]),
            immediate=draw.random() < 0.7,
            word20=draw.choice([*self.tags, NO_TAG]),
        )
        self.client.send(pdu)

    def ping(self) -> None:
        _, pdu = self.client.initiator.request(0x00, data=bytes(self.draw.choice([0, 5, 3000])))
        self.client.send(pdu)

    def answer(self) -> None:
        self.device.complete(self.draw.randrange(1, 4))

    def wait(self) -> None:
        self.rig.pass_time(self.client, self.draw.choice([1, 5, 21]))

    def collect(self) -> None:
        """Read what the target says."""
        while not quiet(self.client):
            pdu = self.client.next_pdu()
            if pdu.opcode == 0x31:
                self.r2ts.append(pdu)
            elif pdu.opcode != 0x25 or pdu.flags & 1:
                self.stat_sns.append(pdu.stat_sn)

    def run(self) -> bool:
        """False if the target has ended the session, which it may."""
        draw = self.draw
        steps = [self.command] * 4 + [self.solicited] * 3
        steps += [self.unsolicited, self.manage, self.ping, self.answer, self.wait]
        try:
            for _ in range(draw.randrange(5, 60)):
                draw.choice(steps)()
                self.collect()
            for _ in range(6):
                self.device.complete()
                self.rig.pass_time(self.client, 21)
                self.collect()
        except ConnectionClosed:
            return False
        return not self.engine.wants_close


@pytest.mark.parametrize("seed", SEEDS)
def test_everything_is_settled_in_the_end(seed: int) -> None:
    chaos = Chaos(seed)
    unit = chaos.rig.target.units[0]
    if chaos.run():
        flow = chaos.engine._flow
        assert not flow.commands
        assert (flow.budget.used, flow.immediate) == (0, 0)
        assert (flow.tx.max_cmd_sn - flow.tx.exp_cmd_sn + 1) & MASK == chaos.window
        first = chaos.stat_sns[0] if chaos.stat_sns else 0
        assert chaos.stat_sns == [(first + i) & MASK for i in range(len(chaos.stat_sns))]
        assert chaos.rig.buffers.outstanding == 0
        assert (len(unit.tasks), unit.tasks.quiet) == (0, True)
        assert [itl.streams for itl in unit.itls] == [0]
    chaos.engine.lost("the end")
    chaos.device.complete()
    assert chaos.rig.buffers.outstanding == 0
    assert (len(unit.tasks), unit.tasks.quiet, unit.itls) == (0, True, [])
