"""Sense data: keys, additional sense codes, and their two encodings.

Source: SPC-4 4.5 (sense data), annex D for the codes.  Names and numbers are the standard's.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, unique


@unique
class SenseKey(IntEnum):
    """SPC-4 table 48."""

    NO_SENSE = 0x0
    RECOVERED_ERROR = 0x1
    NOT_READY = 0x2
    MEDIUM_ERROR = 0x3
    HARDWARE_ERROR = 0x4
    ILLEGAL_REQUEST = 0x5
    UNIT_ATTENTION = 0x6
    DATA_PROTECT = 0x7
    BLANK_CHECK = 0x8
    VENDOR_SPECIFIC = 0x9
    COPY_ABORTED = 0xA
    ABORTED_COMMAND = 0xB
    VOLUME_OVERFLOW = 0xD
    MISCOMPARE = 0xE
    COMPLETED = 0xF


@unique
class Asc(IntEnum):
    """Additional sense code and qualifier as one number, ASC in the high byte (SPC-4 annex D)."""

    NO_ADDITIONAL_SENSE_INFORMATION = 0x0000
    LOGICAL_UNIT_IS_IN_PROCESS_OF_BECOMING_READY = 0x0401
    LOGICAL_UNIT_NOT_READY_MANUAL_INTERVENTION_REQUIRED = 0x0403
    WRITE_ERROR = 0x0C00
    UNEXPECTED_UNSOLICITED_DATA = 0x0C0C
    NOT_ENOUGH_UNSOLICITED_DATA = 0x0C0D
    INVALID_FIELD_IN_COMMAND_INFORMATION_UNIT = 0x0E03
    UNRECOVERED_READ_ERROR = 0x1100
    PARAMETER_LIST_LENGTH_ERROR = 0x1A00
    MISCOMPARE_DURING_VERIFY_OPERATION = 0x1D00
    INVALID_COMMAND_OPERATION_CODE = 0x2000
    LOGICAL_BLOCK_ADDRESS_OUT_OF_RANGE = 0x2100
    INVALID_FIELD_IN_CDB = 0x2400
    LOGICAL_UNIT_NOT_SUPPORTED = 0x2500
    INVALID_FIELD_IN_PARAMETER_LIST = 0x2600
    WRITE_PROTECTED = 0x2700
    LOGICAL_UNIT_SOFTWARE_WRITE_PROTECTED = 0x2702
    SPACE_ALLOCATION_FAILED_WRITE_PROTECT = 0x2707
    POWER_ON_RESET_OR_BUS_DEVICE_RESET_OCCURRED = 0x2900
    BUS_DEVICE_RESET_FUNCTION_OCCURRED = 0x2903
    I_T_NEXUS_LOSS_OCCURRED = 0x2907
    MODE_PARAMETERS_CHANGED = 0x2A01
    CAPACITY_DATA_HAS_CHANGED = 0x2A09
    COMMANDS_CLEARED_BY_ANOTHER_INITIATOR = 0x2F00
    SAVING_PARAMETERS_NOT_SUPPORTED = 0x3900
    REPORTED_LUNS_DATA_HAS_CHANGED = 0x3F0E
    INTERNAL_TARGET_FAILURE = 0x4400
    PROTOCOL_SERVICE_CRC_ERROR = 0x4705
    OVERLAPPED_COMMANDS_ATTEMPTED = 0x4E00


@dataclass(frozen=True, slots=True)
class FieldPointer:
    """Where the illegal field is: `byte` of the CDB (`in_cdb`) or of the parameter list, and the
    most significant bit of the field when it is smaller than a byte (SPC-4 4.5.2.4.2)."""

    byte: int
    bit: int | None = None
    in_cdb: bool = True

    def pack(self) -> bytes:
        """The three sense-key specific bytes."""
        first = 0x80 | (0x40 if self.in_cdb else 0)
        if self.bit is not None:
            first |= 0x08 | self.bit
        return struct.pack(">BH", first, self.byte)


@dataclass(frozen=True, slots=True)
class Sense:
    """What a CHECK CONDITION says.  `information`: LBA or byte offset; None when not valid."""

    key: SenseKey
    asc: Asc
    information: int | None = None
    field: FieldPointer | None = None

    def pack(self, descriptor_format: bool) -> bytes:
        """Current sense data: descriptor format (72h) or fixed format (70h)."""
        return self._descriptors() if descriptor_format else self._fixed()

    def _fixed(self) -> bytes:
        """SPC-4 4.5.3.  An INFORMATION that needs more than 32 bits is left out, VALID stays 0."""
        data = bytearray(18)
        data[0] = 0x70
        data[2] = self.key
        if self.information is not None and self.information < 1 << 32:
            data[0] |= 0x80
            data[3:7] = self.information.to_bytes(4, "big")
        data[7] = 10
        data[12:14] = self.asc.to_bytes(2, "big")
        if self.field is not None:
            data[15:18] = self.field.pack()
        return bytes(data)

    def _descriptors(self) -> bytes:
        """SPC-4 4.5.2."""
        tail = b""
        if self.information is not None:
            tail += struct.pack(">BBBBQ", 0x00, 0x0A, 0x80, 0, self.information)
        if self.field is not None:
            tail += struct.pack(">BBBB3sB", 0x02, 0x06, 0, 0, self.field.pack(), 0)
        head = struct.pack(">BBHBBBB", 0x72, self.key, self.asc, 0, 0, 0, len(tail))
        return head + tail


NO_SENSE = Sense(SenseKey.NO_SENSE, Asc.NO_ADDITIONAL_SENSE_INFORMATION)


class CheckCondition(Exception):  # noqa: N818 - it is an answer, not an error of ours
    """The command ends with CHECK CONDITION and this sense."""

    def __init__(self, sense: Sense) -> None:
        super().__init__(f"{sense.key.name} {sense.asc.name}")
        self.sense = sense


def illegal_request(asc: Asc, field: FieldPointer | None = None) -> CheckCondition:
    """ILLEGAL REQUEST with `asc`."""
    return CheckCondition(Sense(SenseKey.ILLEGAL_REQUEST, asc, field=field))


def invalid_cdb_field(byte: int, bit: int | None = None) -> CheckCondition:
    """05/24/00 pointing at a byte (and bit) of the CDB."""
    return illegal_request(Asc.INVALID_FIELD_IN_CDB, FieldPointer(byte, bit))


def invalid_parameter(byte: int, bit: int | None = None) -> CheckCondition:
    """05/26/00 pointing at a byte (and bit) of the parameter list."""
    pointer = FieldPointer(byte, bit, in_cdb=False)
    return illegal_request(Asc.INVALID_FIELD_IN_PARAMETER_LIST, pointer)


def miscompare(offset: int) -> CheckCondition:
    """0E/1D/00; `offset` = first byte of the data-out that differs (SBC-3 5.2)."""
    asc = Asc.MISCOMPARE_DURING_VERIFY_OPERATION
    return CheckCondition(Sense(SenseKey.MISCOMPARE, asc, information=offset))
