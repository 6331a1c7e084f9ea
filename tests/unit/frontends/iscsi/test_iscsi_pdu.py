"""Serial numbers, additional header segments, digests, names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ploopd.frontends.iscsi.digest import data_digest, digest, verify
from ploopd.frontends.iscsi.names import initiator_port, normalize_name, target_port
from ploopd.frontends.iscsi.pdu import ProtocolError, extended_cdb, padded, serial_in_window

WORD = st.integers(0, 0xFFFFFFFF)


@given(WORD, st.integers(0, 4096), st.integers(0, 4096))
def test_window_holds_exactly_its_numbers(low: int, size: int, step: int) -> None:
    value = (low + step) & 0xFFFFFFFF
    high = (low + size - 1) & 0xFFFFFFFF
    assert serial_in_window(value, low, high) == (step < size)
    assert not serial_in_window((low - 1) & 0xFFFFFFFF, low, high)


@given(st.integers(0, 1 << 24))
def test_padding(length: int) -> None:
    assert padded(length) % 4 == 0
    assert 0 <= padded(length) - length < 4


def test_extended_cdb() -> None:
    ahs = bytes([0, 17, 1, 0]) + bytes(range(16))
    assert extended_cdb(memoryview(ahs)) == bytes(range(16))


@pytest.mark.parametrize(
    "ahs",
    [
        bytes([0, 0, 1, 0]),  # a length of 0 leaves no room for the reserved byte
        bytes([0, 200, 1, 0]),  # longer than the segment
        bytes([0, 5, 9, 0, 0, 0, 0, 0]),  # an unknown type
        bytes([0, 4, 2, 0, 0, 0, 0, 0]),  # a bidirectional length with a wrong size
    ],
)
def test_bad_additional_header_segments(ahs: bytes) -> None:
    with pytest.raises(ProtocolError):
        extended_cdb(memoryview(ahs))


def test_crc32c_known_answer() -> None:
    """RFC 7143 appendix A.4 / the catalogue's check value, least significant byte first."""
    assert digest(b"123456789") == bytes.fromhex("839206e3")
    assert digest(bytes(32)) == bytes.fromhex("aa36918a")
    assert digest(b"\xff" * 32) == bytes.fromhex("43aba862")


def test_data_digest_covers_the_padding() -> None:
    assert data_digest(b"abc") == digest(b"abc\0")
    assert data_digest(b"abcd") == digest(b"abcd")
    assert verify(b"abc\0", data_digest(b"abc"))
    assert not verify(b"abd\0", data_digest(b"abc"))


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("iqn.2026-11.org.Example:Disk", "iqn.2026-11.org.example:disk"),
        ("eui.02004567A425678D", "eui.02004567a425678d"),
        ("naa.52004567BA64678D", "naa.52004567ba64678d"),
        ("iqn.2026-13.org.example", None),
        ("iqn.2026-11.org.example:a/../b", None),
        ("iqn.2026-11.org.example:a\nb", None),
        ("iqn.2026-11.org.example:ａ", None),
        ("iqn.2026-11.org.example:" + "a" * 300, None),
        ("", None),
        ("evil", None),
    ],
)
def test_names(name: str, result: str | None) -> None:
    assert normalize_name(name) == result


def test_port_names() -> None:
    assert initiator_port("iqn.x", b"\x80\0\0\0\0\1") == "iqn.x,i,0x800000000001"
    assert target_port("iqn.y", 1) == "iqn.y,t,0x0001"
