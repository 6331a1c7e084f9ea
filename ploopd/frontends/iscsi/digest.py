"""Header and data digests: CRC32C, least significant byte first on the wire (RFC 7143 13.1)."""

from __future__ import annotations

import struct

from crc32c import crc32c

_DIGEST = struct.Struct("<I")
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")


def digest(data: bytes | memoryview) -> bytes:
    """The four digest bytes over `data`."""
    return _DIGEST.pack(crc32c(data))


def data_digest(data: bytes | memoryview) -> bytes:
    """The digest over a data segment and the zero bytes that pad it to a multiple of four."""
    value = crc32c(data)
    padding = _PADDING[len(data) & 3]
    if padding:
        value = crc32c(padding, value)
    return _DIGEST.pack(value)


def verify(data: bytes | memoryview, expected: bytes | memoryview) -> bool:
    """Whether `expected` (four bytes) is the digest of `data`, which includes its padding."""
    return _DIGEST.pack(crc32c(data)) == bytes(expected)
