"""A small iSCSI initiator on raw sockets: what the load, crash and standby tests talk with.

It knows one connection, no digests and no authentication, and shows every status as it comes: no
retries and no recovery that could hide a fault.  Source: RFC 7143.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from dataclasses import dataclass
from enum import Enum, auto

from tests.support.serve import ServedUrl

BHS = 48
SEGMENT = 262144
GOOD, CHECK_CONDITION, BUSY = 0x00, 0x02, 0x08
KEYS = (
    "HeaderDigest=None",
    "DataDigest=None",
    "InitialR2T=Yes",
    "ImmediateData=Yes",
    f"MaxRecvDataSegmentLength={SEGMENT}",
    "MaxBurstLength=1048576",
    "FirstBurstLength=65536",
    "MaxConnections=1",
    "MaxOutstandingR2T=1",
    "DefaultTime2Wait=2",
    "DefaultTime2Retain=0",
    "ErrorRecoveryLevel=0",
)


class ConnectionLostError(Exception):
    """The target closed the connection, reset it or is not there."""


class ProtocolError(AssertionError):
    """The target sent something that no conforming target sends."""


class Kind(Enum):
    """What an answer answers."""

    COMMAND = auto()
    NOP = auto()
    TASK_MANAGEMENT = auto()
    LOGOUT = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The end of one request: `status` is SCSI's, or the response code of a TMF or logout."""

    tag: int
    kind: Kind
    status: int
    data: bytes = b""
    sense: bytes = b""

    @property
    def sense_text(self) -> str:
        """key/asc/ascq of fixed-format sense, for messages."""
        if len(self.sense) < 14:
            return f"status {self.status:#04x}"
        return f"sense {self.sense[2] & 15:02x}/{self.sense[12]:02x}/{self.sense[13]:02x}"


class Initiator:
    """One session with one connection.  `submit` and friends queue, `poll` sends and receives."""

    def __init__(
        self,
        url: ServedUrl,
        *,
        name: str = "iqn.2026-01.org.ploopd:test",
        timeout: float = 30.0,
        isid: bytes | None = None,
    ) -> None:
        """`isid`: that of a session with the same `name`, to take its place."""
        self.lun = url.lun
        self.isid = isid if isid is not None else b"\x80" + os.urandom(2) + b"\0" + os.urandom(2)
        self._tag = 1
        self._cmd_sn = 1
        self._exp_stat_sn = 0
        self._max_cmd_sn = 1
        self._target_segment = 8192
        self._first_burst = 65536
        self._out = bytearray()
        self._in = bytearray()
        self._data_out: dict[int, bytes] = {}
        self._data_in: dict[int, bytearray] = {}
        self._held: list[tuple[int, bytes, bytes, int, int, int]] = []
        self._pings: list[bytes] = []
        host = url.host.strip("[]")
        try:
            self._socket = socket.create_connection((host, url.port), timeout)
        except OSError as error:
            raise ConnectionLostError(str(error)) from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._login(url.iqn, name)
        self._socket.setblocking(False)

    # --- login ------------------------------------------------------------------------------

    def _login(self, iqn: str, name: str) -> None:
        first = [f"InitiatorName={name}", f"TargetName={iqn}", "SessionType=Normal"]
        self._login_step(0x81, [*first, "AuthMethod=None"])
        flags = self._login_step(0x87, list(KEYS))
        for _ in range(8):
            if flags & 0x80:
                return
            flags = self._login_step(0x87, [])
        raise ProtocolError("the login does not end")

    def _login_step(self, flags: int, keys: list[str]) -> int:
        text = b"".join(key.encode() + b"\0" for key in keys)
        header = bytearray(BHS)
        header[0], header[1] = 0x43, flags
        header[5:8] = len(text).to_bytes(3, "big")
        header[8:14] = self.isid
        struct.pack_into(">I", header, 16, 1)
        struct.pack_into(">II", header, 24, self._cmd_sn, self._exp_stat_sn)
        self._socket.sendall(header + text + b"\0" * (-len(text) % 4))
        answer = self._receive_exactly(BHS)
        length = int.from_bytes(answer[5:8], "big")
        payload = self._receive_exactly(length + -length % 4)[:length]
        if answer[0] & 0x3F != 0x23:
            raise ProtocolError(f"a login was answered by opcode {answer[0]:#x}")
        if answer[36]:
            raise ProtocolError(f"login refused with status {answer[36]:02x}{answer[37]:02x}")
        self._exp_stat_sn = (struct.unpack_from(">I", answer, 24)[0] + 1) & 0xFFFFFFFF
        self._max_cmd_sn = struct.unpack_from(">I", answer, 32)[0]
        for pair in payload.decode().split("\0"):
            key, _, value = pair.partition("=")
            if key == "MaxRecvDataSegmentLength":
                self._target_segment = int(value)
            elif key == "FirstBurstLength":
                self._first_burst = int(value)
        return answer[1]

    def _receive_exactly(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = self._socket.recv(length - len(data))
            if not piece:
                raise ConnectionLostError("closed during login")
            data += piece
        return data

    # --- requests ---------------------------------------------------------------------------

    def submit(self, cdb: bytes, *, data: bytes = b"", expect: int = 0, attribute: int = 1) -> int:
        """Queue a command with `data` to write or `expect` bytes to read; returns its tag."""
        tag = self._new_tag()
        self._held.append((tag, cdb.ljust(16, b"\0"), data, expect, attribute, self.lun))
        self._release_held()
        return tag

    def read(self, lba: int, blocks: int) -> int:
        """READ(16) of `blocks` logical blocks of 512 bytes."""
        return self.submit(struct.pack(">BBQIBB", 0x88, 0, lba, blocks, 0, 0), expect=blocks * 512)

    def write(self, lba: int, data: bytes, *, attribute: int = 1) -> int:
        """WRITE(16)."""
        cdb = struct.pack(">BBQIBB", 0x8A, 0, lba, len(data) // 512, 0, 0)
        return self.submit(cdb, data=data, attribute=attribute)

    def unmap(self, lba: int, blocks: int) -> int:
        """UNMAP of one range (SBC-3 5.28)."""
        data = struct.pack(">HHIQII", 22, 16, 0, lba, blocks, 0)
        return self.submit(struct.pack(">BBIBHB", 0x42, 0, 0, 0, len(data), 0), data=data)

    def write_zeroes(self, lba: int, blocks: int, *, unmap: bool = False) -> int:
        """WRITE SAME(16) of one block of zeros."""
        cdb = struct.pack(">BBQIBB", 0x93, 8 if unmap else 0, lba, blocks, 0, 0)
        return self.submit(cdb, data=bytes(512))

    def synchronize_cache(self) -> int:
        """SYNCHRONIZE CACHE(16) of everything."""
        return self.submit(struct.pack(">BBQIBB", 0x91, 0, 0, 0, 0, 0))

    def test_unit_ready(self) -> int:
        return self.submit(b"\0" * 6)

    def nop(self) -> int:
        """NOP-Out as a ping."""
        tag = self._new_tag()
        header = bytearray(BHS)
        header[0], header[1] = 0x40, 0x80
        struct.pack_into(">II", header, 16, tag, 0xFFFFFFFF)
        struct.pack_into(">II", header, 24, self._cmd_sn, self._exp_stat_sn)
        self._out += header
        return tag

    def task_management(self, function: int, referenced: int = 0xFFFFFFFF) -> int:
        """ABORT TASK (1), LOGICAL UNIT RESET (5), … as an immediate request."""
        tag = self._new_tag()
        header = bytearray(BHS)
        header[0], header[1], header[9] = 0x42, 0x80 | function, self.lun
        struct.pack_into(">II", header, 16, tag, referenced)
        struct.pack_into(">III", header, 24, self._cmd_sn, self._exp_stat_sn, self._cmd_sn)
        self._out += header
        return tag

    def _new_tag(self) -> int:
        self._tag += 1
        return self._tag

    def _release_held(self) -> None:
        while self._held and (self._max_cmd_sn - self._cmd_sn) & 0xFFFFFFFF < 0x80000000:
            self._send_command(*self._held.pop(0))

    def _send_command(
        self, tag: int, cdb: bytes, data: bytes, expect: int, attribute: int, lun: int
    ) -> None:
        immediate = data[: min(self._first_burst, self._target_segment)]
        direction = 0x20 if data else 0x40 if expect else 0
        header = bytearray(BHS)
        header[0], header[1], header[9] = 0x01, 0x80 | direction | attribute, lun
        header[5:8] = len(immediate).to_bytes(3, "big")
        struct.pack_into(
            ">IIII", header, 16, tag, len(data) or expect, self._cmd_sn, self._exp_stat_sn
        )
        header[32:48] = cdb
        self._cmd_sn = (self._cmd_sn + 1) & 0xFFFFFFFF
        self._out += header
        self._out += immediate + b"\0" * (-len(immediate) % 4)
        if data:
            self._data_out[tag] = data
        if expect:
            self._data_in[tag] = bytearray(expect)

    # --- answers ----------------------------------------------------------------------------

    def poll(self, timeout: float) -> list[Answer]:
        """Send what is queued and return the answers that arrive; [] after `timeout` seconds.

        Raises ConnectionLostError.
        """
        deadline = time.monotonic() + timeout
        answers: list[Answer] = []
        while not answers:
            left = deadline - time.monotonic()
            wants = [self._socket] if self._out else []
            readable, writable, _ = select.select([self._socket], wants, [], max(0.0, left))
            try:
                if writable:
                    del self._out[: self._socket.send(memoryview(bytes(self._out[: 1 << 20])))]
                if readable:
                    piece = self._socket.recv(1 << 20)
                    if not piece:
                        raise ConnectionLostError("closed by the target")
                    self._in += piece
            except BlockingIOError:
                continue
            except OSError as error:
                raise ConnectionLostError(str(error)) from error
            answers = self._parse()
            self._release_held()
            if not readable and left <= 0:
                break
        return answers

    def wait(self, tag: int, timeout: float = 30.0) -> Answer:
        """The answer to `tag`; other answers that come before it are dropped.

        Raises TimeoutError.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for answer in self.poll(deadline - time.monotonic()):
                if answer.tag == tag:
                    return answer
        raise TimeoutError(f"no answer to tag {tag} within {timeout} s")

    def good(self, tag: int, timeout: float = 30.0) -> bytes:
        """The data of `tag`, which must end with GOOD."""
        answer = self.wait(tag, timeout)
        assert answer.status == GOOD, answer.sense_text
        return answer.data

    def _parse(self) -> list[Answer]:
        answers = []
        position = 0
        buffer = self._in
        while len(buffer) - position >= BHS:
            length = int.from_bytes(buffer[position + 5 : position + 8], "big")
            end = position + BHS + length + -length % 4
            if len(buffer) < end:
                break
            header = bytes(buffer[position : position + BHS])
            data = bytes(buffer[position + BHS : position + BHS + length])
            position = end
            answer = self._take(header, data)
            if answer is not None:
                answers.append(answer)
        del buffer[:position]
        return answers

    def _take(self, header: bytes, data: bytes) -> Answer | None:
        opcode = header[0] & 0x3F
        tag, word20, stat_sn, _, max_cmd_sn = struct.unpack_from(">IIIII", header, 16)
        if (max_cmd_sn - self._max_cmd_sn) & 0xFFFFFFFF < 0x80000000:
            self._max_cmd_sn = max_cmd_sn
        if opcode == 0x31:
            self._answer_r2t(header)
            return None
        if opcode == 0x25:
            offset = struct.unpack_from(">I", header, 40)[0]
            self._data_in[tag][offset : offset + len(data)] = data
            if not header[1] & 1:
                return None
            self._exp_stat_sn = (stat_sn + 1) & 0xFFFFFFFF
            return self._command_answer(tag, header[3], b"")
        if opcode == 0x20 and tag == 0xFFFFFFFF:
            self._answer_ping(header, word20)
            return None
        if opcode not in (0x20, 0x21, 0x22, 0x26):
            raise ProtocolError(f"unexpected PDU: opcode {opcode:#04x}, {header.hex()}")
        self._exp_stat_sn = (stat_sn + 1) & 0xFFFFFFFF
        if opcode == 0x21:
            if header[2]:
                raise ProtocolError(f"iSCSI response {header[2]:#04x} to tag {tag}")
            return self._command_answer(tag, header[3], data[2:])
        kind = {0x20: Kind.NOP, 0x22: Kind.TASK_MANAGEMENT, 0x26: Kind.LOGOUT}[opcode]
        return Answer(tag=tag, kind=kind, status=0 if opcode == 0x20 else header[2], data=data)

    def _command_answer(self, tag: int, status: int, sense: bytes) -> Answer:
        self._data_out.pop(tag, None)
        data = bytes(self._data_in.pop(tag, b""))
        return Answer(tag=tag, kind=Kind.COMMAND, status=status, data=data, sense=sense)

    def _answer_r2t(self, header: bytes) -> None:
        tag, transfer_tag = struct.unpack_from(">II", header, 16)
        offset, length = struct.unpack_from(">II", header, 40)
        data = self._data_out[tag]
        if offset + length > len(data):
            raise ProtocolError(f"R2T for {offset}+{length} of {len(data)} bytes")
        number = 0
        while length:
            piece = data[offset : offset + min(length, self._target_segment)]
            out = bytearray(BHS)
            out[0], out[1] = 0x05, 0x80 if len(piece) == length else 0
            out[5:8] = len(piece).to_bytes(3, "big")
            out[8:16] = header[8:16]
            struct.pack_into(">II", out, 16, tag, transfer_tag)
            struct.pack_into(">I", out, 28, self._exp_stat_sn)
            struct.pack_into(">II", out, 36, number, offset)
            self._out += out + piece + b"\0" * (-len(piece) % 4)
            offset += len(piece)
            length -= len(piece)
            number += 1

    def _answer_ping(self, header: bytes, transfer_tag: int) -> None:
        if transfer_tag == 0xFFFFFFFF:
            return
        out = bytearray(BHS)
        out[0], out[1] = 0x40, 0x80
        out[8:16] = header[8:16]
        struct.pack_into(">II", out, 16, 0xFFFFFFFF, transfer_tag)
        struct.pack_into(">II", out, 24, self._cmd_sn, self._exp_stat_sn)
        self._out += out

    # --- the end ----------------------------------------------------------------------------

    def settle(self) -> None:
        """Take the unit attentions that a new session gets."""
        for _ in range(8):
            if self.wait(self.test_unit_ready()).status == GOOD:
                return
        raise ProtocolError("the logical unit does not become ready")

    def logout(self, timeout: float = 5.0) -> None:
        self.wait(self.request_logout(), timeout)
        self.close()

    def request_logout(self) -> int:
        """Queue a logout; its answer has the kind LOGOUT."""
        tag = self._new_tag()
        header = bytearray(BHS)
        header[0], header[1] = 0x46, 0x80
        struct.pack_into(">I", header, 16, tag)
        struct.pack_into(">II", header, 24, self._cmd_sn, self._exp_stat_sn)
        self._out += header
        return tag

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Initiator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
