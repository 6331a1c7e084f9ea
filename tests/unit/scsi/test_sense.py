"""Sense codes against the standard's table, and both encodings byte by byte."""

from __future__ import annotations

import re

import pytest

from ploopd.scsi.sense import (
    Asc,
    CheckCondition,
    FieldPointer,
    Sense,
    SenseKey,
    invalid_cdb_field,
    invalid_parameter,
    miscompare,
)

# SPC-4 annex D, the texts as printed there.
STANDARD = {
    0x0000: "NO ADDITIONAL SENSE INFORMATION",
    0x0401: "LOGICAL UNIT IS IN PROCESS OF BECOMING READY",
    0x0403: "LOGICAL UNIT NOT READY, MANUAL INTERVENTION REQUIRED",
    0x0C00: "WRITE ERROR",
    0x0C0C: "WRITE ERROR - UNEXPECTED UNSOLICITED DATA",
    0x0C0D: "WRITE ERROR - NOT ENOUGH UNSOLICITED DATA",
    0x0E03: "INVALID FIELD IN COMMAND INFORMATION UNIT",
    0x1100: "UNRECOVERED READ ERROR",
    0x1A00: "PARAMETER LIST LENGTH ERROR",
    0x1D00: "MISCOMPARE DURING VERIFY OPERATION",
    0x2000: "INVALID COMMAND OPERATION CODE",
    0x2100: "LOGICAL BLOCK ADDRESS OUT OF RANGE",
    0x2400: "INVALID FIELD IN CDB",
    0x2500: "LOGICAL UNIT NOT SUPPORTED",
    0x2600: "INVALID FIELD IN PARAMETER LIST",
    0x2700: "WRITE PROTECTED",
    0x2702: "LOGICAL UNIT SOFTWARE WRITE PROTECTED",
    0x2707: "SPACE ALLOCATION FAILED WRITE PROTECT",
    0x2900: "POWER ON, RESET, OR BUS DEVICE RESET OCCURRED",
    0x2903: "BUS DEVICE RESET FUNCTION OCCURRED",
    0x2907: "I_T NEXUS LOSS OCCURRED",
    0x2A01: "MODE PARAMETERS CHANGED",
    0x2A09: "CAPACITY DATA HAS CHANGED",
    0x2F00: "COMMANDS CLEARED BY ANOTHER INITIATOR",
    0x3900: "SAVING PARAMETERS NOT SUPPORTED",
    0x3F0E: "REPORTED LUNS DATA HAS CHANGED",
    0x4400: "INTERNAL TARGET FAILURE",
    0x4705: "PROTOCOL SERVICE CRC ERROR",
    0x4E00: "OVERLAPPED COMMANDS ATTEMPTED",
}
KEYS = {
    0x0: "NO SENSE",
    0x1: "RECOVERED ERROR",
    0x2: "NOT READY",
    0x3: "MEDIUM ERROR",
    0x4: "HARDWARE ERROR",
    0x5: "ILLEGAL REQUEST",
    0x6: "UNIT ATTENTION",
    0x7: "DATA PROTECT",
    0x8: "BLANK CHECK",
    0x9: "VENDOR SPECIFIC",
    0xA: "COPY ABORTED",
    0xB: "ABORTED COMMAND",
    0xD: "VOLUME OVERFLOW",
    0xE: "MISCOMPARE",
    0xF: "COMPLETED",
}


def name(text: str) -> str:
    text = text.removeprefix("WRITE ERROR - ")
    return re.sub(r"[^A-Z0-9]+", "_", text).strip("_")


def test_names_and_codes_are_the_standards() -> None:
    assert {code.value: code.name for code in Asc} == {
        value: name(text) for value, text in STANDARD.items()
    }
    assert {key.value: key.name for key in SenseKey} == {
        value: name(text) for value, text in KEYS.items()
    }


def test_names_are_distinct() -> None:
    assert len(Asc.__members__) == len({code.value for code in Asc})
    assert len(SenseKey.__members__) == len({key.value for key in SenseKey})


def test_fixed_format() -> None:
    sense = Sense(SenseKey.MEDIUM_ERROR, Asc.UNRECOVERED_READ_ERROR, information=0x12345678)
    assert sense.pack(False).hex(" ") == ("f0 00 03 12 34 56 78 0a 00 00 00 00 11 00 00 00 00 00")
    assert Sense(SenseKey.NOT_READY, Asc.WRITE_ERROR).pack(False)[0] == 0x70


def test_information_that_does_not_fit_is_not_valid() -> None:
    sense = Sense(SenseKey.MEDIUM_ERROR, Asc.WRITE_ERROR, information=1 << 32)
    assert sense.pack(False).hex(" ") == "70 00 03 00 00 00 00 0a 00 00 00 00 0c 00 00 00 00 00"
    assert sense.pack(True).hex(" ") == (
        "72 03 0c 00 00 00 00 0c 00 0a 80 00 00 00 00 01 00 00 00 00"
    )


@pytest.mark.parametrize(
    ("condition", "fixed", "descriptor"),
    [
        (
            invalid_cdb_field(2, 6),
            "70 00 05 00 00 00 00 0a 00 00 00 00 24 00 00 ce 00 02",
            "72 05 24 00 00 00 00 08 02 06 00 00 ce 00 02 00",
        ),
        (
            invalid_cdb_field(0x0102),
            "70 00 05 00 00 00 00 0a 00 00 00 00 24 00 00 c0 01 02",
            "72 05 24 00 00 00 00 08 02 06 00 00 c0 01 02 00",
        ),
        (
            invalid_parameter(12, 0),
            "70 00 05 00 00 00 00 0a 00 00 00 00 26 00 00 88 00 0c",
            "72 05 26 00 00 00 00 08 02 06 00 00 88 00 0c 00",
        ),
        (
            miscompare(513),
            "f0 00 0e 00 00 02 01 0a 00 00 00 00 1d 00 00 00 00 00",
            "72 0e 1d 00 00 00 00 0c 00 0a 80 00 00 00 00 00 00 00 02 01",
        ),
    ],
)
def test_encodings(condition: CheckCondition, fixed: str, descriptor: str) -> None:
    assert condition.sense.pack(False).hex(" ") == fixed
    assert condition.sense.pack(True).hex(" ") == descriptor


def test_field_pointer_of_a_whole_byte_has_no_bit_pointer() -> None:
    assert FieldPointer(1).pack() == bytes([0xC0, 0, 1])
    assert FieldPointer(1, 0).pack() == bytes([0xC8, 0, 1])
