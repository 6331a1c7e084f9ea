"""iSCSI text: `key=value` pairs, each ended by a NUL byte (RFC 7143 6.1 and 6.2)."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable

MAX_KEY_LENGTH = 63
MAX_VALUE_LENGTH = 8192
MAX_PAIRS = 128

_KEY = re.compile(r"[A-Za-z][A-Za-z0-9.+@_#\-]*")
_DECIMAL = re.compile(r"[0-9]+")
_HEX = re.compile(r"0[xX][0-9a-fA-F]+")

NOT_UNDERSTOOD = "NotUnderstood"
REJECT = "Reject"
IRRELEVANT = "Irrelevant"
NONE = "None"


class TextError(ValueError):
    """The text is not well formed; the message says what is wrong with it."""


def parse_text(data: bytes) -> list[tuple[str, str]]:
    """The pairs of a complete text, in their order.

    Raises `TextError` for anything the format does not allow: a pair without NUL or `=`, an empty,
    overlong or repeated key, a value that is too long or not UTF-8.
    """
    if not data:
        return []
    if data[-1] != 0:
        raise TextError("the last key=value pair is not ended by a NUL")
    pairs: list[tuple[str, str]] = []
    seen: set[str] = set()
    for item in data.split(b"\0"):
        if not item:  # padding, or NULs that some initiators add
            continue
        key, value = _parse_pair(item)
        if key in seen:
            raise TextError(f"key {key} is given twice")
        seen.add(key)
        pairs.append((key, value))
        if len(pairs) > MAX_PAIRS:
            raise TextError(f"more than {MAX_PAIRS} keys")
    return pairs


def _parse_pair(item: bytes) -> tuple[str, str]:
    raw_key, equals, raw_value = item.partition(b"=")
    if not equals:
        raise TextError("a pair has no '='")
    if not 0 < len(raw_key) <= MAX_KEY_LENGTH:
        raise TextError(f"a key of {len(raw_key)} bytes (1 to {MAX_KEY_LENGTH} are allowed)")
    if len(raw_value) > MAX_VALUE_LENGTH:
        raise TextError(f"a value of {len(raw_value)} bytes")
    try:
        key, value = raw_key.decode("ascii"), raw_value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError("a pair is not UTF-8") from error
    if not _KEY.fullmatch(key):
        raise TextError("a key has characters that keys do not have")
    return key, value


def encode_text(pairs: Iterable[tuple[str, str]]) -> bytes:
    """The bytes of the pairs."""
    return b"".join(f"{key}={value}".encode() + b"\0" for key, value in pairs)


def parse_number(value: str) -> int | None:
    """A numerical value, decimal or `0x…`; None if it is not one."""
    if len(value) > 20:
        return None
    if _DECIMAL.fullmatch(value):
        return int(value)
    return int(value, 16) if _HEX.fullmatch(value) else None


def parse_binary(value: str, limit: int) -> bytes:
    """A binary value, `0x…` hexadecimal or `0b…` base64, of at most `limit` bytes.

    Raises `TextError`.  The length is checked before anything is decoded.
    """
    prefix, digits = value[:2].lower(), value[2:]
    try:
        if prefix == "0x":
            if not digits or len(digits) > 2 * limit:
                raise TextError(f"a binary value of {len(digits)} hexadecimal digits")
            return binascii.unhexlify(digits if len(digits) % 2 == 0 else "0" + digits)
        if prefix == "0b":
            if not digits or len(digits) > (limit + 2) // 3 * 4:
                raise TextError(f"a binary value of {len(digits)} base64 digits")
            decoded = base64.b64decode(digits, validate=True)
            if len(decoded) > limit:
                raise TextError(f"a binary value of {len(decoded)} bytes")
            return decoded
    except (binascii.Error, ValueError) as error:
        if isinstance(error, TextError):
            raise
        raise TextError("a binary value has wrong digits") from error
    raise TextError("a binary value begins with neither 0x nor 0b")


def encode_binary(data: bytes) -> str:
    """The hexadecimal form, which every initiator understands."""
    return "0x" + data.hex()
