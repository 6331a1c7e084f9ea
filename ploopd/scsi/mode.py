"""Mode pages: their current, changeable and default values, and MODE SELECT.

Source: SPC-4 7.5 (mode parameters, control page, informational exceptions), SBC-3 6.4 (read-write
error recovery, caching).  Changeable: WCE, D_SENSE and SWP; nothing is saved.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum

from ploopd.scsi.cdb import BLOCK_SIZE
from ploopd.scsi.sense import Asc, illegal_request, invalid_parameter

ERROR_RECOVERY = 0x01
CACHING = 0x08
CONTROL = 0x0A
INFORMATIONAL_EXCEPTIONS = 0x1C
ALL_PAGES = 0x3F
ALL_SUBPAGES = 0xFF

WCE = 0x04
D_SENSE = 0x04
SWP = 0x08
DPOFUA = 0x10
WP = 0x80


class PageControl(IntEnum):
    """SPC-4 table 149: which values MODE SENSE returns."""

    CURRENT = 0
    CHANGEABLE = 1
    DEFAULT = 2
    SAVED = 3


class ModeParameters:
    """The values that MODE SELECT can change, one set per logical unit, shared by all nexuses."""

    __slots__ = ("_default_write_cache", "descriptor_sense", "software_protect", "write_cache")

    def __init__(self, *, write_cache: bool) -> None:
        self._default_write_cache = write_cache
        self.write_cache = write_cache
        self.descriptor_sense = False
        self.software_protect = False

    @property
    def default_write_cache(self) -> bool:
        return self._default_write_cache

    def reset(self) -> None:
        """Back to the defaults (SAM-5 6.3.3: logical unit reset)."""
        self.write_cache = self._default_write_cache
        self.descriptor_sense = False
        self.software_protect = False

    def values(self) -> tuple[bool, bool, bool]:
        return self.write_cache, self.descriptor_sense, self.software_protect


def error_recovery(modes: ModeParameters, control: PageControl) -> bytes:
    """Nothing to tune: errors are the backing file system's business."""
    return bytes([ERROR_RECOVERY, 0x0A]) + bytes(10)


def caching(modes: ModeParameters, control: PageControl) -> bytes:
    page = bytearray(20)
    page[0], page[1] = CACHING, 0x12
    match control:
        case PageControl.CHANGEABLE:
            page[2] = WCE
        case PageControl.DEFAULT:
            page[2] = WCE if modes.default_write_cache else 0
        case _:
            page[2] = WCE if modes.write_cache else 0
    return bytes(page)


def control_page(modes: ModeParameters, control: PageControl) -> bytes:
    """TST 0, QERR 0, UA_INTLCK 0, TAS 0; reordering is unrestricted; no busy timeout is known."""
    page = bytearray(12)
    page[0], page[1] = CONTROL, 0x0A
    if control is PageControl.CHANGEABLE:
        page[2], page[4] = D_SENSE, SWP
        return bytes(page)
    page[3] = 0x10
    page[8:10] = b"\xff\xff"
    if control is PageControl.CURRENT:
        page[2] = D_SENSE if modes.descriptor_sense else 0
        page[4] = SWP if modes.software_protect else 0
    return bytes(page)


def informational_exceptions(modes: ModeParameters, control: PageControl) -> bytes:
    """DEXCPT = 1: there is no failure prediction."""
    page = bytearray(12)
    page[0], page[1] = INFORMATIONAL_EXCEPTIONS, 0x0A
    if control is not PageControl.CHANGEABLE:
        page[2] = 0x08
    return bytes(page)


PageBuilder = Callable[[ModeParameters, PageControl], bytes]
PAGES: dict[int, PageBuilder] = {
    ERROR_RECOVERY: error_recovery,
    CACHING: caching,
    CONTROL: control_page,
    INFORMATIONAL_EXCEPTIONS: informational_exceptions,
}


def pages(modes: ModeParameters, control: PageControl, code: int, subcode: int) -> bytes | None:
    """The pages MODE SENSE asks for; None if there are none like that."""
    if code == ALL_PAGES and subcode in (0, ALL_SUBPAGES):
        return b"".join(build(modes, control) for build in PAGES.values())
    build = PAGES.get(code)
    if build is None or subcode not in (0, ALL_SUBPAGES):
        return None
    return build(modes, control)


def block_descriptor(blocks: int, *, long_lba: bool) -> bytes:
    """SBC-3 6.4.2: short (8 bytes) or long (16 bytes) LBA mode parameter block descriptor."""
    if long_lba:
        return struct.pack(">Q4xI", blocks, BLOCK_SIZE)
    return struct.pack(">II", min(blocks, 0xFFFF_FFFF), BLOCK_SIZE)


def check_block_descriptor(data: memoryview, offset: int, blocks: int) -> None:
    """The block descriptor of a MODE SELECT may only say what is so already."""
    if len(data) == 16:
        count, size = struct.unpack(">Q4xI", data)
        same = count in (0, blocks, 0xFFFF_FFFF_FFFF_FFFF)
    else:
        count, size = struct.unpack(">II", data)
        size &= 0xFF_FFFF
        same = count in (0, min(blocks, 0xFFFF_FFFF), 0xFFFF_FFFF)
    if not same:
        raise invalid_parameter(offset)
    if size != BLOCK_SIZE:
        raise invalid_parameter(offset + len(data) - 4)


def select(modes: ModeParameters, data: memoryview, offset: int) -> bool:
    """Apply the mode pages in `data`, all or none; True if a value has changed.

    `offset`: where `data` begins in the parameter list, for the field pointer.  Raises
    `CheckCondition` 05/26/00 for unknown pages and for changes to what cannot be changed, 05/1A/00
    for a page that is cut off.
    """
    chosen: dict[int, bytes] = {}
    position = 0
    while position < len(data):
        page = _page_at(data, position, offset)
        _check_changes(modes, page, offset + position)
        chosen[page[0] & 0x3F] = page
        position += len(page)
    before = modes.values()
    if CACHING in chosen:
        modes.write_cache = bool(chosen[CACHING][2] & WCE)
    if CONTROL in chosen:
        modes.descriptor_sense = bool(chosen[CONTROL][2] & D_SENSE)
        modes.software_protect = bool(chosen[CONTROL][4] & SWP)
    return modes.values() != before


def _page_at(data: memoryview, position: int, offset: int) -> bytes:
    if len(data) - position < 2:
        raise illegal_request(Asc.PARAMETER_LIST_LENGTH_ERROR)
    code, length = data[position], data[position + 1]
    if code & 0x40 or code & 0x3F not in PAGES:
        raise invalid_parameter(offset + position)
    expected = len(PAGES[code & 0x3F](ModeParameters(write_cache=False), PageControl.CURRENT))
    if length + 2 != expected:
        raise invalid_parameter(offset + position + 1)
    if position + expected > len(data):
        raise illegal_request(Asc.PARAMETER_LIST_LENGTH_ERROR)
    return bytes(data[position : position + expected])


def _check_changes(modes: ModeParameters, page: bytes, offset: int) -> None:
    build = PAGES[page[0] & 0x3F]
    current = build(modes, PageControl.CURRENT)
    changeable = build(modes, PageControl.CHANGEABLE)
    for index in range(2, len(page)):
        wrong = (page[index] ^ current[index]) & ~changeable[index]
        if wrong:
            raise invalid_parameter(offset + index, wrong.bit_length() - 1)
