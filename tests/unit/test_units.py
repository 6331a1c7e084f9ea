"""Sizes in words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ploopd.errors import UsageError
from ploopd.units import format_size, format_size_exact, parse_size

UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
K, M, G, T = 1 << 10, 1 << 20, 1 << 30, 1 << 40


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512),
        ("512B", 512),
        ("0", 0),
        ("64k", 64 * K),
        ("1M", M),
        ("10G", 10 * G),
        ("10GiB", 10 * G),
        ("10 gib", 10 * G),
        (" 1.5T ", 3 * T // 2),
        ("0.5K", 512),
        ("8E", 8 << 60),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_parse(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "G", "10X", "-1", "1e3", "0x10", "10Gi", "1,5G", "1.G", "0.3", "1.0001K", "٣G", "1" * 30],
)
def test_refused_text_is_named(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert caught.value.field == "size"
    assert caught.value.value == text


def test_gb_is_not_a_binary_unit() -> None:
    with pytest.raises(UsageError):
        parse_size("10GB")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (M - 1, "1 MiB"),
        (10 * G, "10 GiB"),
        (16 * T, "16 TiB"),
        (T + T // 8, "1.12 TiB"),
        (1 << 70, "1024 EiB"),
        (-1536, "-1.5 KiB"),
    ],
)
def test_format(size: int, text: str) -> None:
    assert format_size(size) == text


def test_exact_form_has_the_bytes() -> None:
    assert format_size_exact(10 * G) == "10 GiB (10,737,418,240 bytes)"


@given(st.integers(0, 1 << 63))
def test_what_is_printed_can_be_read_back(size: int) -> None:
    text = format_size(size)
    number, unit = text.split()
    assert abs(float(number) * 1024 ** UNITS.index(unit) - size) <= size * 0.006
    if "." not in number:
        assert abs(parse_size(text) - size) <= size * 0.006
