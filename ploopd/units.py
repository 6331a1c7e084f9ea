"""Sizes as people write and read them: binary units, as qemu-img has them (K = KiB = 1024)."""

from __future__ import annotations

import re

from ploopd.errors import UsageError

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGTPE]?)(?:i?B)?", re.IGNORECASE)


def format_size(size: int) -> str:
    """`10 GiB`, `1.5 KiB`, `512 B`: at most two digits after the point, no trailing zeros."""
    value, unit = float(size), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    number = f"{value:.2f}".rstrip("0").rstrip(".")
    return f"{number} {_UNITS[unit]}"


def format_size_exact(size: int) -> str:
    """`10 GiB (10,737,418,240 bytes)`."""
    return f"{format_size(size)} ({size:,} bytes)"


def parse_size(text: str) -> int:
    """Bytes of `10G`, `10GiB`, `1.5M`, `4096`.  Raises `UsageError` when it is none of those."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            "is not a size", field="size", value=text, hint="write 512, 64K, 10M, 10G or 1T"
        )
    unit = match["unit"].upper()
    factor = 1024 ** ("KMGTPE".index(unit) + 1) if unit else 1
    number = match["number"]
    size = float(number) * factor if "." in number else int(number) * factor
    if size != int(size):
        raise UsageError("is not a whole number of bytes", field="size", value=text)
    return int(size)
