"""The PDUs of an iSCSI initiator: every one can be right, and every one can be wrong.  No I/O."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from crc32c import crc32c

BHS = 48
NO_TAG = 0xFFFFFFFF
MASK = 0xFFFFFFFF


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
