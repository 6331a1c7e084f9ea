"""A small iSCSI initiator for tests: every PDU can be right, and every PDU can be wrong.

`Client` has the exchanges: login, commands, task management.  The `Initiator` of `iscsi_pdu` builds
and parses its PDUs and knows nothing of sockets; one of the transports of `iscsi_transport` carries
them: `SocketTransport` (a blocking socket) or `EngineTransport` (the target's engine in the same
process, without a network).

    client = Client(SocketTransport("127.0.0.1", 3260), target="iqn.…")
    client.login()
    client.write(lba=0, data=b"…")
    assert client.read(lba=0, blocks=8) == b"…"
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from tests.support.cdb import TEST_UNIT_READY, read_16, write_16
from tests.support.iscsi_pdu import NO_TAG, Initiator, Pdu, text
from tests.support.iscsi_transport import Transport

INITIATOR = "iqn.2026-11.org.example:initiator"
TARGET = "iqn.2026-11.org.ploopd:target"
HASHES = {5: "md5", 6: "sha1", 7: "sha256", 8: "sha3_256"}

OPERATIONAL = (
    "HeaderDigest=None",
    "DataDigest=None",
    "InitialR2T=No",
    "ImmediateData=Yes",
    "MaxRecvDataSegmentLength=262144",
    "MaxBurstLength=262144",
    "FirstBurstLength=262144",
    "MaxOutstandingR2T=1",
    "MaxConnections=1",
    "ErrorRecoveryLevel=0",
    "DefaultTime2Wait=2",
    "DefaultTime2Retain=0",
    "DataPDUInOrder=Yes",
    "DataSequenceInOrder=Yes",
)


@dataclass(slots=True)
class Credentials:
    """CHAP: who we are and, for mutual CHAP, who the target must be."""

    user: str
    secret: bytes
    mutual_user: str | None = None
    mutual_secret: bytes = b""
    algorithms: str = "8,7,6"


class LoginRefused(Exception):  # noqa: N818
    """The target answered a login with a status other than success."""

    def __init__(self, status: int) -> None:
        super().__init__(f"login status {status:04x}")
        self.status = status


class Client:
    """An initiator in use.  Unexpected PDUs (NOP-In, async) are kept in `unsolicited`."""

    def __init__(
        self, transport: Transport, *, target: str | None = TARGET, name: str = INITIATOR
    ) -> None:
        self.transport = transport
        self.initiator = Initiator()
        self.target = target
        self.name = name
        self.unsolicited: list[Pdu] = []
        self.negotiated: dict[str, str] = {}
        self._inbox: list[Pdu] = []

    # -- PDUs

    def send(self, pdu: bytes) -> None:
        self.transport.send(pdu)

    def next_pdu(self) -> Pdu:
        """The next PDU of any kind."""
        while not self._inbox:
            self._inbox += self.initiator.feed(self.transport.receive())
        return self._inbox.pop(0)

    def pdu_for(self, tag: int) -> Pdu:
        """The next PDU with this task tag; answers pings on the way."""
        while True:
            pdu = self.next_pdu()
            if pdu.tag == tag:
                return pdu
            self.unsolicited.append(pdu)
            if pdu.opcode == 0x20 and pdu.transfer_tag != NO_TAG:
                _, pong = self.initiator.request(
                    0x00, immediate=True, tag=NO_TAG, word20=pdu.transfer_tag
                )
                self.send(pong)

    # -- login

    def introduction(self) -> list[str]:
        keys = [f"InitiatorName={self.name}"]
        if self.target is None:
            return [*keys, "SessionType=Discovery"]
        return [*keys, f"TargetName={self.target}", "SessionType=Normal"]

    def login_step(self, keys: Iterable[str], stage: int, next_stage: int | None) -> Pdu:
        """One login request and its answer.  Raises `LoginRefused`."""
        self.send(self.initiator.login(keys, stage=stage, next_stage=next_stage))
        pdu = self.next_pdu()
        assert pdu.opcode == 0x23, hex(pdu.opcode)
        if pdu.login_status:
            raise LoginRefused(pdu.login_status)
        return pdu

    def login(
        self,
        *,
        credentials: Credentials | None = None,
        operational: Iterable[str] = OPERATIONAL,
        overrides: dict[str, str] | None = None,
    ) -> dict[str, str]:
        """Log in; the target's operational answers.  `overrides` replace operational keys."""
        if credentials is None:
            self.login_step([*self.introduction(), "AuthMethod=None"], 0, 1)
        else:
            self._chap(credentials)
        keys = dict(key.split("=", 1) for key in operational)
        keys.update(overrides or {})
        pdu = self.login_step([f"{key}={value}" for key, value in keys.items()], 1, 3)
        assert pdu.flags & 0x83 == 0x83, "the target does not go to full feature phase"
        self.negotiated = pdu.keys
        self.initiator.tsih = int.from_bytes(pdu.bhs[14:16], "big")
        self.initiator.header_digest = pdu.keys.get("HeaderDigest") == "CRC32C"
        self.initiator.data_digest = pdu.keys.get("DataDigest") == "CRC32C"
        return self.negotiated

    def _chap(self, credentials: Credentials) -> None:
        first = self.login_step([*self.introduction(), "AuthMethod=CHAP,None"], 0, None)
        assert first.keys["AuthMethod"] == "CHAP"
        offer = self.login_step([f"CHAP_A={credentials.algorithms}"], 0, None).keys
        code = int(offer["CHAP_A"])
        challenge = bytes.fromhex(offer["CHAP_C"][2:])
        answer = self.chap_hash(code, int(offer["CHAP_I"]), credentials.secret, challenge)
        keys = [f"CHAP_N={credentials.user}", f"CHAP_R=0x{answer.hex()}"]
        ours = bytes(range(32))
        if credentials.mutual_user is not None:
            keys += ["CHAP_I=77", f"CHAP_C=0x{ours.hex()}"]
        last = self.login_step(keys, 0, 1).keys
        if credentials.mutual_user is not None:
            expected = self.chap_hash(code, 77, credentials.mutual_secret, ours)
            assert last["CHAP_N"] == credentials.mutual_user
            assert bytes.fromhex(last["CHAP_R"][2:]) == expected

    @staticmethod
    def chap_hash(code: int, identifier: int, secret: bytes, challenge: bytes) -> bytes:
        return hashlib.new(HASHES[code], bytes([identifier]) + secret + challenge).digest()

    # -- commands

    def command(
        self,
        cdb: bytes,
        *,
        read: int = 0,
        write: int = 0,
        data: bytes = b"",
        lun: int = 0,
        immediate_data: int | None = None,
        unsolicited: int = 0,
        segment: int = 262144,
    ) -> tuple[Pdu, bytes]:
        """Run a command to its end: (the PDU with its status, data-in).

        `immediate_data`: bytes of `data` that go with the command (None: as many as were agreed
        on); then `unsolicited` bytes in Data-Out PDUs, and the rest as the R2Ts ask for it.
        """
        if immediate_data is None:
            burst = int(self.negotiated.get("FirstBurstLength", "65536"))
            immediate_data = min(len(data), segment, burst)
        first = immediate_data
        tag, pdu = self.initiator.command(
            cdb, read=read, write=write, data=data[:first], final=unsolicited == 0, lun=lun
        )
        out = [pdu]
        position, number, stop = first, 0, first + unsolicited
        while position < stop:
            end = min(position + segment, stop)
            out.append(
                self.initiator.data_out(
                    tag, data[position:end], offset=position, number=number, final=end == stop
                )
            )
            position, number = end, number + 1
        self.send(b"".join(out))
        return self.finish(tag, data, segment=segment)

    def finish(self, tag: int, data: bytes = b"", *, segment: int = 262144) -> tuple[Pdu, bytes]:
        """Answer R2Ts and collect data-in until the command's status arrives."""
        received = bytearray()
        while True:
            pdu = self.pdu_for(tag)
            match pdu.opcode:
                case 0x25:
                    assert pdu.word(40) == len(received), "data-in out of order"
                    received += pdu.data
                    if pdu.flags & 1:
                        return pdu, bytes(received)
                case 0x31:
                    self._answer_r2t(pdu, data, segment)
                case _:
                    return pdu, bytes(received)

    def _answer_r2t(self, r2t: Pdu, data: bytes, segment: int) -> None:
        position, number = r2t.word(40), 0
        stop = position + r2t.word(44)
        out = []
        while position < stop:
            end = min(position + segment, stop)
            out.append(
                self.initiator.data_out(
                    r2t.tag,
                    data[position:end],
                    offset=position,
                    number=number,
                    transfer_tag=r2t.transfer_tag,
                    final=end == stop,
                )
            )
            position, number = end, number + 1
        self.send(b"".join(out))

    def clear_attention(self, lun: int = 0) -> None:
        """Take the unit attentions that a new nexus gets."""
        for _ in range(8):
            pdu, _ = self.command(TEST_UNIT_READY, lun=lun)
            if pdu.status == 0:
                return
        raise AssertionError("the unit does not get ready")

    def read(self, lba: int, blocks: int, *, lun: int = 0) -> bytes:
        """READ (16); asserts GOOD."""
        pdu, data = self.command(read_16(lba, blocks), read=blocks * 512, lun=lun)
        assert pdu.status == 0, pdu
        assert len(data) == blocks * 512
        return data

    def write(self, lba: int, data: bytes, *, lun: int = 0, segment: int = 262144) -> None:
        """WRITE (16); asserts GOOD."""
        pdu, _ = self.command(
            write_16(lba, len(data) // 512), write=len(data), data=data, lun=lun, segment=segment
        )
        assert pdu.opcode == 0x21
        assert pdu.status == 0, pdu

    def task_management(self, function: int, *, referenced: int = NO_TAG, lun: int = 0) -> Pdu:
        """A task management request (immediate) and its response."""
        tag, pdu = self.initiator.request(
            0x02, 0x80 | function, immediate=True, word20=referenced, lun=lun
        )
        self.send(pdu)
        return self.pdu_for(tag)

    def nop(self, data: bytes = b"") -> Pdu:
        """Ping the target."""
        tag, pdu = self.initiator.request(0x00, data=data)
        self.send(pdu)
        return self.pdu_for(tag)

    def text(self, keys: Iterable[str]) -> dict[str, str]:
        """A text exchange; follows continuations."""
        return dict(item.split("=", 1) for item in self.text_items(keys))

    def text_items(self, keys: Iterable[str]) -> list[str]:
        """The same as a list, since SendTargets answers repeat keys."""
        tag, pdu = self.initiator.request(0x04, data=text(keys))
        self.send(pdu)
        collected = b""
        while True:
            answer = self.next_pdu()
            assert answer.opcode == 0x24, answer
            collected += answer.data
            if answer.final:
                return [item for item in collected.decode().split("\0") if item]
            _, pdu = self.initiator.request(0x04, tag=tag, word20=answer.transfer_tag)
            self.send(pdu)

    def logout(self, reason: int = 0) -> Pdu:
        tag, pdu = self.initiator.request(0x06, 0x80 | reason, word20=self.initiator.cid << 16)
        self.send(pdu)
        return self.pdu_for(tag)

    def close(self) -> None:
        self.transport.close()
