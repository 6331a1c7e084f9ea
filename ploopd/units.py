"""Sizes as people write and read them: binary units, as qemu-img has them (K = KiB = 1024)."""

from __future__ import annotations

import re
from fractions import Fraction

from ploopd.errors import UsageError

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_SIZE = re.compile(
    r"(?P<number>[0-9]{1,20}(?:\.[0-9]{1,20})?)[ ]*(?:(?P<unit>[KMGTPE])(?:iB)?|B)?", re.IGNORECASE
)


def format_size(size: int) -> str:
    """`10 GiB`, `1.5 KiB`, `512 B`: at most two digits after the point, no trailing zeros."""
    unit = max(0, (abs(size).bit_length() - 1) // 10)
    unit = min(unit, len(_UNITS) - 1)
    hundredths = round(Fraction(size * 100, 1024**unit))
    if abs(hundredths) >= 102400 and unit < len(_UNITS) - 1:
        # 1023.999 KiB is rounded to 1 MiB, not to 1024 KiB.
        unit += 1
        hundredths = round(Fraction(size * 100, 1024**unit))
    sign = "-" if hundredths < 0 else ""
    whole, rest = divmod(abs(hundredths), 100)
    number = f"{whole}.{rest:02}".rstrip("0").rstrip(".")
    return f"{sign}{number} {_UNITS[unit]}"


def format_size_exact(size: int) -> str:
    """`10 GiB (10,737,418,240 bytes)`."""
    return f"{format_size(size)} ({size:,} bytes)"


def parse_size(text: str) -> int:
    """Bytes of `10G`, `10GiB`, `1.5M`, `4096`, `512B`; always binary units.

    Raises UsageError, naming the text, when it is none of those or no whole number of bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            "is not a size", field="size", value=text, hint="write 512, 64K, 10M, 10GiB or 1T"
        )
    unit = match["unit"]
    factor = 1024 ** ("KMGTPE".index(unit.upper()) + 1) if unit else 1
    size = Fraction(match["number"]) * factor
    if size.denominator != 1:
        raise UsageError("is not a whole number of bytes", field="size", value=text)
    return size.numerator
