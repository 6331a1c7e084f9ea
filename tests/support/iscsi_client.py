"""A small iSCSI initiator for tests: every PDU can be right, and every PDU can be wrong.

`Initiator` builds and parses PDUs and knows nothing of sockets.  `Client` drives it over a
*transport*: `SocketTransport` (a blocking socket) or `EngineTransport` (the target's engine in the
same process, without a network).

    client = Client(SocketTransport("127.0.0.1", 3260), target="iqn.…")
    client.login()
    client.write(lba=0, data=b"…")
    assert client.read(lba=0, blocks=8) == b"…"
"""

from __future__ import annotations

import hashlib
import socket
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from crc32c import crc32c

BHS = 48
NO_TAG = 0xFFFFFFFF
MASK = 0xFFFFFFFF
INITIATOR = "iqn.2026-11.org.example:initiator"
TARGET = "iqn.2026-11.org.ploopd:target"
HASHES = {5: "md5", 6: "sha1", 7: "sha256", 8: "sha3_256"}


class ConnectionClosed(Exception):  # noqa: N818
    """The target closed the connection."""


@dataclass(frozen=True, slots=True)
class Pdu:
    """A PDU from the target."""

    bhs: bytes
    data: bytes

    @property
    def opcode(self) -> int:
        return self.bhs[0] & 0x3F

    @property
    def flags(self) -> int:
        return self.bhs[1]

    @property
    def final(self) -> bool:
        return bool(self.bhs[1] & 0x80)

    @property
    def tag(self) -> int:
        return self.word(16)

    @property
    def transfer_tag(self) -> int:
        return self.word(20)

    @property
    def stat_sn(self) -> int:
        return self.word(24)

    @property
    def exp_cmd_sn(self) -> int:
        return self.word(28)

    @property
    def max_cmd_sn(self) -> int:
        return self.word(32)

    @property
    def status(self) -> int:
        """SCSI status of a response or of a Data-In with the S bit."""
        return self.bhs[3]

    @property
    def response(self) -> int:
        """Byte 2: response, reject reason."""
        return self.bhs[2]

    @property
    def login_status(self) -> int:
        return self.word(36) >> 16

    @property
    def residual(self) -> int:
        return self.word(44)

    @property
    def overflow(self) -> bool:
        return bool(self.flags & 0x04)

    @property
    def underflow(self) -> bool:
        return bool(self.flags & 0x02)

    @property
    def sense(self) -> bytes:
        """Sense data of a SCSI response, without its length field."""
        length = int.from_bytes(self.data[:2], "big")
        return self.data[2 : 2 + length]

    @property
    def sense_code(self) -> tuple[int, int]:
        """(sense key, ASC<<8|ASCQ) of fixed-format sense data."""
        return self.sense[2] & 0xF, int.from_bytes(self.sense[12:14], "big")

    @property
    def keys(self) -> dict[str, str]:
        """The text of a login or text response."""
        pairs = (item.split("=", 1) for item in self.data.decode().split("\0") if item)
        return {item[0]: item[1] for item in pairs}

    def word(self, offset: int) -> int:
        return int.from_bytes(self.bhs[offset : offset + 4], "big")


def build(
    opcode: int,
    flags: int = 0x80,
    *,
    lun: int = 0,
    tag: int = 1,
    word20: int = 0,
    cmd_sn: int = 0,
    exp_stat_sn: int = 0,
    tail: bytes = b"",
    data: bytes = b"",
    ahs: bytes = b"",
    byte2: int = 0,
    byte3: int = 0,
    header_digest: bool = False,
    data_digest: bool = False,
    data_length: int | None = None,
) -> bytes:
    """Any PDU of an initiator.  `tail` = bytes 32-47; `lun` = bytes 8-15; `data_length` lies."""
    length = len(data) if data_length is None else data_length
    bhs = struct.pack(
        ">BBBBIQIIII16s",
        opcode,
        flags,
        byte2,
        byte3,
        (len(ahs) // 4) << 24 | length,
        lun,
        tag,
        word20,
        cmd_sn,
        exp_stat_sn,
        tail,
    )
    header = bhs + ahs
    padded = data + bytes(-len(data) % 4)
    out = header
    if header_digest:
        out += struct.pack("<I", crc32c(header))
    out += padded
    if data_digest and data:
        out += struct.pack("<I", crc32c(padded))
    return out


def text(keys: Iterable[str]) -> bytes:
    """`["A=1", …]` as login text."""
    return b"".join(key.encode() + b"\0" for key in keys)


@dataclass(slots=True)
class Initiator:
    """Numbering, digests and parsing; no I/O."""

    cmd_sn: int = 1
    exp_stat_sn: int = 0
    header_digest: bool = False
    data_digest: bool = False
    isid: bytes = b"\x80\x00\x00\x00\x00\x01"
    tsih: int = 0
    cid: int = 1
    max_cmd_sn: int = 0
    _tag: int = 0
    _buffer: bytearray = field(default_factory=bytearray)

    def new_tag(self) -> int:
        self._tag += 1
        return self._tag

    def feed(self, data: bytes) -> list[Pdu]:
        """The complete PDUs that `data` finishes; digests are checked."""
        self._buffer += data
        pdus: list[Pdu] = []
        while (pdu := self._next()) is not None:
            pdus.append(pdu)
        return pdus

    def _next(self) -> Pdu | None:
        buffer = self._buffer
        if len(buffer) < BHS:
            return None
        ahs = buffer[4] * 4
        length = int.from_bytes(buffer[5:8], "big")
        start = BHS + ahs + 4 * self.header_digest
        stop = start + (length + 3) // 4 * 4
        end = stop + 4 * (self.data_digest and length > 0)
        if len(buffer) < end:
            return None
        header = bytes(buffer[: BHS + ahs])
        if self.header_digest:
            assert buffer[BHS + ahs : start] == struct.pack("<I", crc32c(header)), "header digest"
        if end > stop:
            expected = struct.pack("<I", crc32c(bytes(buffer[start:stop])))
            assert buffer[stop:end] == expected, "data digest"
        pdu = Pdu(header[:BHS], bytes(buffer[start : start + length]))
        del buffer[:end]
        self.max_cmd_sn = pdu.max_cmd_sn
        if pdu.opcode not in (0x31,) and not (pdu.opcode == 0x25 and not pdu.flags & 1):
            self.exp_stat_sn = (pdu.stat_sn + 1) & MASK
        return pdu

    # -- requests

    def request(
        self,
        opcode: int,
        flags: int = 0x80,
        *,
        immediate: bool = False,
        tag: int | None = None,
        lun: int = 0,
        word20: int = NO_TAG,
        tail: bytes = b"",
        data: bytes = b"",
        ahs: bytes = b"",
    ) -> tuple[int, bytes]:
        """A numbered request; (its task tag, its bytes)."""
        number = self.cmd_sn
        if not immediate:
            self.cmd_sn = (number + 1) & MASK
        task = self.new_tag() if tag is None else tag
        pdu = build(
            opcode | (0x40 if immediate else 0),
            flags,
            lun=lun << 48,
            tag=task,
            word20=word20,
            cmd_sn=number,
            exp_stat_sn=self.exp_stat_sn,
            tail=tail,
            data=data,
            ahs=ahs,
            header_digest=self.header_digest,
            data_digest=self.data_digest,
        )
        return task, pdu

    def login(
        self,
        keys: Iterable[str],
        *,
        stage: int = 0,
        next_stage: int | None = 1,
        tag: int = 0,
        incomplete: bool = False,
        raw: bytes | None = None,
    ) -> bytes:
        flags = stage << 2 | (0x80 | next_stage if next_stage is not None else 0)
        flags |= 0x40 if incomplete else 0
        return build(
            0x43,
            flags,
            lun=int.from_bytes(self.isid, "big") << 16 | self.tsih,
            tag=tag,
            word20=self.cid << 16,
            cmd_sn=self.cmd_sn,
            exp_stat_sn=self.exp_stat_sn,
            data=text(keys) if raw is None else raw,
        )

    def command(
        self,
        cdb: bytes,
        *,
        read: int = 0,
        write: int = 0,
        data: bytes = b"",
        final: bool = True,
        attribute: int = 1,
        immediate: bool = False,
        lun: int = 0,
        tag: int | None = None,
        ahs: bytes = b"",
    ) -> tuple[int, bytes]:
        """A SCSI command; `read`/`write`: expected length (and flag), `data`: immediate data."""
        flags = attribute | (0x80 if final else 0) | (0x40 if read else 0) | (0x20 if write else 0)
        return self.request(
            0x01,
            flags,
            immediate=immediate,
            tag=tag,
            lun=lun,
            word20=read or write,
            tail=cdb.ljust(16, b"\0")[:16],
            data=data,
            ahs=ahs,
        )

    def data_out(
        self,
        tag: int,
        data: bytes,
        *,
        offset: int,
        number: int = 0,
        transfer_tag: int = NO_TAG,
        final: bool = True,
    ) -> bytes:
        return build(
            0x05,
            0x80 if final else 0,
            tag=tag,
            word20=transfer_tag,
            exp_stat_sn=self.exp_stat_sn,
            tail=struct.pack(">III", 0, number, offset),
            data=data,
            header_digest=self.header_digest,
            data_digest=self.data_digest,
        )


def read_16(lba: int, blocks: int) -> bytes:
    return struct.pack(">BBQIBB", 0x88, 0, lba, blocks, 0, 0)


def write_16(lba: int, blocks: int, flags: int = 0) -> bytes:
    return struct.pack(">BBQIBB", 0x8A, flags, lba, blocks, 0, 0)


def read_10(lba: int, blocks: int) -> bytes:
    return struct.pack(">BBIBHB", 0x28, 0, lba, 0, blocks, 0)


def write_10(lba: int, blocks: int) -> bytes:
    return struct.pack(">BBIBHB", 0x2A, 0, lba, 0, blocks, 0)


TEST_UNIT_READY = bytes(6)
INQUIRY = bytes([0x12, 0, 0, 0, 96, 0])


class Transport(Protocol):
    """Bytes to and from the target."""

    def send(self, data: bytes) -> None: ...

    def receive(self) -> bytes:
        """Some bytes; raises `ConnectionClosed`."""
        ...

    def close(self) -> None: ...


class SocketTransport:
    """A blocking TCP connection; `receive` raises TimeoutError after `timeout` seconds."""

    def __init__(self, host: str, port: int, timeout: float = 10.0) -> None:
        self.socket = socket.create_connection((host, port), timeout=timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ConnectionClosed from error

    def receive(self) -> bytes:
        try:
            data = self.socket.recv(1 << 20)
        except ConnectionResetError as error:
            raise ConnectionClosed from error
        if not data:
            raise ConnectionClosed
        return data

    def close(self) -> None:
        self.socket.close()


class Engine(Protocol):
    """The target's `Connection`, as far as a transport needs it."""

    def receive_buffer(self) -> memoryview: ...

    def received(self, count: int, now: float) -> None: ...

    def process(self, now: float) -> None: ...

    def data_to_send(self) -> list[memoryview]: ...

    def sent(self, count: int) -> bool: ...

    @property
    def wants_close(self) -> bool: ...


class EngineTransport:
    """The target's engine in this process.  `step`: at most so many bytes go in at once."""

    def __init__(
        self, engine: Engine, *, clock: Callable[[], float] = lambda: 0.0, step: int = 1 << 30
    ) -> None:
        self.engine = engine
        self.clock = clock
        self.step = step

    def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if self.engine.wants_close:
                return
            space = self.engine.receive_buffer()
            assert space, "the engine takes no more input"
            count = min(len(space), len(view), self.step)
            space[:count] = view[:count]
            self.engine.received(count, self.clock())
            view = view[count:]

    def receive(self) -> bytes:
        pieces = self.engine.data_to_send()
        out = b"".join(pieces)
        if out:
            self.engine.sent(len(out))
            if getattr(self.engine, "paused", False):
                self.engine.process(self.clock())
            return out
        if self.engine.wants_close:
            raise ConnectionClosed
        raise AssertionError("nothing to receive and nothing to wait for")

    def close(self) -> None:
        """Nothing to close."""


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
