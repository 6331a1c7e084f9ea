"""The iSCSI PDU layer: opcodes, flags, codes and the structs of the basic header segment (BHS).

Source: RFC 7143 chapter 11.  All integers are big-endian.  Requests share the first 32 bytes of
their layout, and every PDU that a target sends fits one layout of thirteen fields, so two structs
are enough for nearly everything.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

BHS_LENGTH: Final = 48
MAX_AHS_LENGTH: Final = 255 * 4
DIGEST_LENGTH: Final = 4
RESERVED_TAG: Final = 0xFFFFFFFF
"""The tag value that means "no tag" (initiator task tag, target transfer tag)."""
SERIAL_MASK: Final = 0xFFFFFFFF
SERIAL_HALF: Final = 0x80000000
MAX_DATA_SEGMENT: Final = 0xFFFFFF

IMMEDIATE: Final = 0x40
OPCODE_MASK: Final = 0x3F
FINAL: Final = 0x80
CONTINUE: Final = 0x40

REQUEST: Final = struct.Struct(">BBHIQIIII")
"""opcode|I, flags, bytes 2-3, TotalAHSLength<<24|DataSegmentLength, LUN (bytes 8-15), initiator
task tag, bytes 20-23, CmdSN, ExpStatSN."""

RESPONSE: Final = struct.Struct(">BBBBIQIIIIIIII")
"""opcode, flags, byte 2, byte 3, DataSegmentLength, bytes 8-15, initiator task tag, bytes 20-23,
StatSN, ExpCmdSN, MaxCmdSN, bytes 36-39, bytes 40-43, bytes 44-47."""

DATA_OUT_TAIL: Final = struct.Struct(">II")
"""At byte 36 of a SCSI Data-Out: DataSN, BufferOffset."""

TMF_TAIL: Final = struct.Struct(">II")
"""At byte 32 of a task management request: RefCmdSN, ExpDataSN."""


class Opcode(IntEnum):
    """RFC 7143 11.2.1.2; 0x00-0x1f come from the initiator, 0x20-0x3f from the target."""

    NOP_OUT = 0x00
    SCSI_COMMAND = 0x01
    TASK_MANAGEMENT = 0x02
    LOGIN = 0x03
    TEXT = 0x04
    DATA_OUT = 0x05
    LOGOUT = 0x06
    SNACK = 0x10
    NOP_IN = 0x20
    SCSI_RESPONSE = 0x21
    TASK_MANAGEMENT_RESPONSE = 0x22
    LOGIN_RESPONSE = 0x23
    TEXT_RESPONSE = 0x24
    DATA_IN = 0x25
    LOGOUT_RESPONSE = 0x26
    R2T = 0x31
    ASYNC_MESSAGE = 0x32
    REJECT = 0x3F


class RejectReason(IntEnum):
    """RFC 7143 11.17.1."""

    DATA_DIGEST_ERROR = 0x02
    SNACK_REJECT = 0x03
    PROTOCOL_ERROR = 0x04
    COMMAND_NOT_SUPPORTED = 0x05
    TOO_MANY_IMMEDIATE_COMMANDS = 0x06
    TASK_IN_PROGRESS = 0x07
    INVALID_DATA_ACK = 0x08
    INVALID_PDU_FIELD = 0x09
    OUT_OF_RESOURCES = 0x0A
    WAITING_FOR_LOGOUT = 0x0C


class LoginStatus(IntEnum):
    """RFC 7143 11.13.5: status class in the high byte, status detail in the low one."""

    SUCCESS = 0x0000
    INITIATOR_ERROR = 0x0200
    AUTHENTICATION_FAILED = 0x0201
    FORBIDDEN = 0x0202
    TARGET_NOT_FOUND = 0x0203
    TARGET_REMOVED = 0x0204
    UNSUPPORTED_VERSION = 0x0205
    TOO_MANY_CONNECTIONS = 0x0206
    MISSING_PARAMETER = 0x0207
    CANNOT_INCLUDE_IN_SESSION = 0x0208
    SESSION_TYPE_NOT_SUPPORTED = 0x0209
    SESSION_DOES_NOT_EXIST = 0x020A
    INVALID_REQUEST = 0x020B
    TARGET_ERROR = 0x0300
    SERVICE_UNAVAILABLE = 0x0301
    OUT_OF_RESOURCES = 0x0302


class TaskManagementResponse(IntEnum):
    """RFC 7143 11.6.1, RFC 7144 for FUNCTION_SUCCEEDED."""

    COMPLETE = 0
    TASK_DOES_NOT_EXIST = 1
    LUN_DOES_NOT_EXIST = 2
    TASK_STILL_ALLEGIANT = 3
    REASSIGNMENT_NOT_SUPPORTED = 4
    NOT_SUPPORTED = 5
    AUTHORIZATION_FAILED = 6
    FUNCTION_SUCCEEDED = 7
    REJECTED = 255


class AsyncEvent(IntEnum):
    """RFC 7143 11.9.1."""

    SCSI_EVENT = 0
    LOGOUT_REQUESTED = 1
    CONNECTION_DROPPED = 2
    ALL_CONNECTIONS_DROPPED = 3
    NEGOTIATION_REQUESTED = 4


class LogoutReason(IntEnum):
    """RFC 7143 11.14.1."""

    CLOSE_SESSION = 0
    CLOSE_CONNECTION = 1
    REMOVE_FOR_RECOVERY = 2


class LogoutResponse(IntEnum):
    """RFC 7143 11.15.1."""

    CLOSED = 0
    CID_NOT_FOUND = 1
    RECOVERY_NOT_SUPPORTED = 2
    CLEANUP_FAILED = 3


class ProtocolError(Exception):
    """The peer broke the protocol in a way that ends the connection."""


class Request:
    """One received PDU: its decoded BHS and views of its AHS and data in the receive buffer.

    `damaged`: the data digest does not match, so `data` is worth nothing.  The views are valid
    until the PDU has been handled; who wants to keep data copies it.
    """

    __slots__ = (
        "ahs",
        "bhs",
        "cmd_sn",
        "damaged",
        "data",
        "exp_stat_sn",
        "flags",
        "immediate",
        "lun",
        "opcode",
        "tag",
        "word2",
        "word20",
    )

    def __init__(
        self, bhs: memoryview, ahs: memoryview, data: memoryview, damaged: bool = False
    ) -> None:
        (
            opcode,
            self.flags,
            self.word2,
            _,
            self.lun,
            self.tag,
            self.word20,
            self.cmd_sn,
            self.exp_stat_sn,
        ) = REQUEST.unpack_from(bhs)
        self.opcode: int = opcode & OPCODE_MASK
        self.immediate = bool(opcode & IMMEDIATE)
        self.bhs = bhs
        self.ahs = ahs
        self.data = data
        self.damaged = damaged


@dataclass(frozen=True, slots=True, kw_only=True)
class LoginRequest:
    """A login request's fields (RFC 7143 11.12); `data` is its text, not yet decoded."""

    transit: bool
    incomplete: bool
    current_stage: int
    next_stage: int
    version_max: int
    version_min: int
    isid: bytes
    tsih: int
    tag: int
    cid: int
    cmd_sn: int
    exp_stat_sn: int
    data: bytes

    @classmethod
    def parse(cls, bhs: bytes | memoryview, data: bytes) -> LoginRequest:
        """The fields of a 48-byte BHS whose opcode is a login's."""
        flags = bhs[1]
        tag, cid, _, cmd_sn, exp_stat_sn = struct.unpack_from(">IHHII", bhs, 16)
        return cls(
            transit=bool(flags & FINAL),
            incomplete=bool(flags & CONTINUE),
            current_stage=flags >> 2 & 3,
            next_stage=flags & 3,
            version_max=bhs[2],
            version_min=bhs[3],
            isid=bytes(bhs[8:14]),
            tsih=int.from_bytes(bhs[14:16], "big"),
            tag=tag,
            cid=cid,
            cmd_sn=cmd_sn,
            exp_stat_sn=exp_stat_sn,
            data=data,
        )


def padded(length: int) -> int:
    """`length` rounded up to the four bytes that data segments are padded to."""
    return (length + 3) & ~3


def serial_in_window(value: int, low: int, high: int) -> bool:
    """Whether `low ≤ value ≤ high` in 32-bit serial number arithmetic (RFC 1982).

    `high == low - 1` is the closed window: nothing is in it.
    """
    size = (high - low + 1) & SERIAL_MASK
    return ((value - low) & SERIAL_MASK) < size


_AHS_HEADER: Final = struct.Struct(">HB")
AHS_EXTENDED_CDB: Final = 1
AHS_BIDIRECTIONAL_LENGTH: Final = 2


def extended_cdb(ahs: memoryview) -> bytes:
    """The CDB bytes beyond 16 that an additional header segment carries (RFC 7143 11.2.2.3).

    Raises `ProtocolError` for segments that do not add up, or of a type we do not know.
    """
    extra = b""
    position = 0
    while position < len(ahs):
        if len(ahs) - position < 4:
            raise ProtocolError("additional header segment is cut short")
        length, kind = _AHS_HEADER.unpack_from(ahs, position)
        end = position + 3 + length
        if length < 1 or padded(end) > len(ahs):
            raise ProtocolError(f"additional header segment has AHSLength {length}")
        if kind == AHS_EXTENDED_CDB and not extra:
            extra = bytes(ahs[position + 4 : end])
        elif kind != AHS_BIDIRECTIONAL_LENGTH or length != 5:
            raise ProtocolError(f"additional header segment of type {kind} is not supported")
        position = padded(end)
    return extra
