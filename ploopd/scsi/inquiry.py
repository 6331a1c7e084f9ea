"""INQUIRY data: the standard data and the vital product data pages.

Source: SPC-4 6.6 (INQUIRY), 7.8 (VPD); SBC-3 6.5 (block limits, characteristics, provisioning).
"""

from __future__ import annotations

import hashlib
import re
import struct
import uuid
from dataclasses import dataclass

MAX_TRANSFER_BLOCKS = 16384
"""MAXIMUM TRANSFER LENGTH: 8 MiB."""
OPTIMAL_TRANSFER_BLOCKS = 2048
OPTIMAL_GRANULARITY_BLOCKS = 8
MAX_COMPARE_AND_WRITE_BLOCKS = 128
MAX_UNMAP_BLOCKS = 1 << 20
"""MAXIMUM UNMAP LBA COUNT: 512 MiB, so that one UNMAP ends well within a SCSI timeout."""
MAX_UNMAP_DESCRIPTORS = 256
MAX_WRITE_SAME_BLOCKS = 32768
"""MAXIMUM WRITE SAME LENGTH: 16 MiB, a multiple of the usual cluster sizes."""
WSNZ = 1
"""WRITE SAME of 0 blocks, which would mean to the end of the unit, is not supported."""

NO_DEVICE = 0x7F
"""Peripheral qualifier 011b, device type 1Fh: no logical unit here."""

VERSION_DESCRIPTORS = (0x00A0, 0x0960, 0x0460, 0x04C0)
"""SAM-5, iSCSI, SPC-4, SBC-3."""

STANDARD_LENGTH = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who a logical unit is, the same on every path.

    `identity`: the image's UUID.  `serial`: ASCII, VPD page 80h.
    """

    identity: uuid.UUID
    serial: str
    vendor: str
    product: str
    revision: str

    def __post_init__(self) -> None:
        for name, limit in (("vendor", 8), ("product", 16), ("revision", 4), ("serial", 200)):
            text = getattr(self, name)
            if len(text) > limit or not (text.isascii() and text.isprintable()):
                raise ValueError(f"{name} must be at most {limit} printable ASCII characters")

    @property
    def naa(self) -> bytes:
        """NAA 3, locally assigned: 4 bits of type and 60 bits derived from the whole UUID."""
        digest = hashlib.blake2b(self.identity.bytes, digest_size=8).digest()
        return bytes([0x30 | digest[0] & 0x0F]) + digest[1:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Provisioning:
    """What block limits and capacity depend on.

    `granularity`: blocks per cluster.  `physical_exponent`: LBPPBE, 3 for 4 KiB physical blocks.
    """

    thin: bool
    granularity: int
    physical_exponent: int = 3


def standard(identity: Identity | None) -> bytes:
    """Standard INQUIRY data; None: what a LUN without a logical unit answers."""
    data = bytearray(STANDARD_LENGTH)
    data[0] = 0 if identity is not None else NO_DEVICE
    data[2] = 0x06  # SPC-4
    data[3] = 0x02  # response data format
    data[4] = STANDARD_LENGTH - 5
    data[7] = 0x02  # CMDQUE
    data[8:36] = b" " * 28
    if identity is not None:
        data[8:36] = (
            identity.vendor.encode().ljust(8)
            + identity.product.encode().ljust(16)
            + identity.revision.encode().ljust(4)
        )
    for index, descriptor in enumerate(VERSION_DESCRIPTORS):
        struct.pack_into(">H", data, 58 + 2 * index, descriptor)
    return bytes(data)


def vpd_page(code: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0, code, len(body)) + body


def designator(*, code_set: int, association: int, kind: int, value: bytes, iscsi: bool) -> bytes:
    """SPC-4 7.8.6.1.  `association`: 0 logical unit, 1 target port, 2 target device."""
    protocol = 0x50 if iscsi else 0
    flags = (0x80 if iscsi else 0) | association << 4 | kind
    return bytes([protocol | code_set, flags, 0, len(value)]) + value


def scsi_name(text: str) -> bytes:
    """A SCSI name string: UTF-8, NUL terminated, padded to a multiple of four."""
    raw = text.encode() + b"\0"
    return raw + bytes(-len(raw) % 4)


def relative_port(target_port: str) -> int:
    """The relative target port identifier: the portal group tag of `iqn…,t,0xTPGT`, or 1."""
    match = re.search(r",t,0x([0-9a-fA-F]{1,4})$", target_port)
    return (int(match[1], 16) if match else 0) or 1


def device_identification(identity: Identity, target_port: str) -> bytes:
    """Page 83h.  The designators of the unit come first and are equal on all paths."""
    name = identity.vendor.ljust(8) + identity.product.ljust(16) + identity.serial
    device = target_port.partition(",t,")[0]
    port = struct.pack(">HH", 0, relative_port(target_port))
    parts = [
        designator(code_set=1, association=0, kind=3, value=identity.naa, iscsi=False),
        designator(code_set=2, association=0, kind=1, value=name.encode(), iscsi=False),
        designator(code_set=1, association=1, kind=4, value=port, iscsi=True),
        designator(code_set=3, association=1, kind=8, value=scsi_name(target_port), iscsi=True),
        designator(code_set=3, association=2, kind=8, value=scsi_name(device), iscsi=True),
    ]
    return vpd_page(0x83, b"".join(parts))


def serial_number(identity: Identity) -> bytes:
    return vpd_page(0x80, identity.serial.encode())


def extended_inquiry() -> bytes:
    """Page 86h: HEADSUP, ORDSUP, SIMPSUP; V_SUP; LUICLR."""
    body = bytearray(0x3C)
    body[1], body[2], body[3] = 0x07, 0x01, 0x01
    return vpd_page(0x86, bytes(body))


def block_limits(provisioning: Provisioning) -> bytes:
    """Page B0h, in SBC-3's length of 3Ch."""
    thin = provisioning.thin
    body = struct.pack(
        ">BBHIIIIIIIQ20x",
        WSNZ,
        MAX_COMPARE_AND_WRITE_BLOCKS,
        OPTIMAL_GRANULARITY_BLOCKS,
        MAX_TRANSFER_BLOCKS,
        OPTIMAL_TRANSFER_BLOCKS,
        0,
        MAX_UNMAP_BLOCKS if thin else 0,
        MAX_UNMAP_DESCRIPTORS if thin else 0,
        provisioning.granularity if thin else 0,
        0x8000_0000 if thin else 0,
        MAX_WRITE_SAME_BLOCKS,
    )
    return vpd_page(0xB0, body)


def block_characteristics() -> bytes:
    """Page B1h: non-rotating; FUAB: FUA is honoured whether or not the cache is volatile."""
    body = bytearray(0x3C)
    body[1] = 1
    body[4] = 0x02
    return vpd_page(0xB1, bytes(body))


def provisioning_page(provisioning: Provisioning) -> bytes:
    """Page B2h: LBPU, LBPWS, LBPWS10, LBPRZ = 1; provisioning type 2 (thin)."""
    if not provisioning.thin:
        return vpd_page(0xB2, bytes(4))
    return vpd_page(0xB2, bytes([0, 0xE0 | 1 << 2, 2, 0]))


PAGES = (0x00, 0x80, 0x83, 0x86, 0xB0, 0xB1, 0xB2)


def page(
    code: int, identity: Identity, provisioning: Provisioning, target_port: str
) -> bytes | None:
    """A vital product data page; None if there is none with this code."""
    match code:
        case 0x00:
            return vpd_page(0x00, bytes(PAGES))
        case 0x80:
            return serial_number(identity)
        case 0x83:
            return device_identification(identity, target_port)
        case 0x86:
            return extended_inquiry()
        case 0xB0:
            return block_limits(provisioning)
        case 0xB1:
            return block_characteristics()
        case 0xB2:
            return provisioning_page(provisioning)
    return None
