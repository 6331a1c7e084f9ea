"""Text format, numbers and binary values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ploopd.frontends.iscsi.text import (
    TextError,
    encode_binary,
    encode_text,
    parse_binary,
    parse_number,
    parse_text,
)

KEY = st.from_regex(r"[A-Za-z][A-Za-z0-9]{0,40}", fullmatch=True)
VALUE = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=60)


@given(st.dictionaries(KEY, VALUE, max_size=20))
def test_round_trip(pairs: dict[str, str]) -> None:
    assert parse_text(encode_text(pairs.items())) == list(pairs.items())


def test_extra_nuls_are_ignored() -> None:
    assert parse_text(b"A=1\0\0\0B=2\0\0") == [("A", "1"), ("B", "2")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"A=1", "NUL"),
        (b"A\0", "no '='"),
        (b"=1\0", "0 bytes"),
        (b"A" * 64 + b"=1\0", "64 bytes"),
        (b"A=1\0A=2\0", "twice"),
        (b"A=\xff\0", "UTF-8"),
        (b"\xc3\xa9=1\0", "UTF-8"),
        (b"A B=1\0", "characters"),
        (b"A=" + b"x" * 9000 + b"\0", "9000 bytes"),
        (b"".join(b"K%d=1\0" % i for i in range(200)), "more than"),
    ],
)
def test_malformed_text_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(TextError, match=message):
        parse_text(data)


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("0", 0),
        ("0x10", 16),
        ("0XfF", 255),
        ("16776192", 16776192),
        ("", None),
        ("-1", None),
        ("1e3", None),
        ("0x", None),
        ("٣", None),  # a digit, but not one of the standard's
        ("1" * 30, None),
    ],
)
def test_numbers(value: str, number: int | None) -> None:
    assert parse_number(value) == number


@given(st.binary(min_size=1, max_size=64))
def test_hexadecimal_round_trip(data: bytes) -> None:
    assert parse_binary(encode_binary(data), 64) == data


def test_base64_and_odd_hexadecimal() -> None:
    assert parse_binary("0bAQID", 16) == b"\1\2\3"
    assert parse_binary("0x123", 16) == b"\x01\x23"


@pytest.mark.parametrize(
    "value", ["", "0x", "0b", "0xzz", "0b!!!!", "1234", "0x" + "00" * 17, "0b" + "A" * 28]
)
def test_bad_binary_values_are_refused(value: str) -> None:
    with pytest.raises(TextError):
        parse_binary(value, 16)
