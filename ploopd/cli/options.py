"""Options and conversions that several commands share."""

from __future__ import annotations

import math
from typing import Any

import click

from ploopd.errors import UsageError
from ploopd.units import parse_size

DEFAULT_TIMEOUT = 30.0
LONGEST_TIMEOUT = 7 * 24 * 3600.0


class _Seconds(click.FloatRange):
    """A positive number of seconds, which `nan` is not."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value!r} is not a number of seconds", param, ctx)
        return seconds


TIMEOUT = click.option(
    "--timeout",
    type=_Seconds(min=0.0, min_open=True, max=LONGEST_TIMEOUT),
    default=DEFAULT_TIMEOUT,
    show_default=True,
    metavar="SECONDS",
    help="Give up after this time, saying what was waited for.",
)

NEW_SIZE = click.option(
    "--size",
    required=True,
    metavar="[+]SIZE",
    help="New size of the disk, e.g. 20G (binary units), or with + how much is added.",
)

ON_OFF = click.Choice(["on", "off"])


def seconds_or_forever(
    context: click.Context, parameter: click.Parameter, value: str
) -> float | None:
    """Callback of an option that takes a positive number of seconds or `forever` (None)."""
    if value == "forever":
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise click.BadParameter(
            f"{value!r} is neither a positive number of seconds nor `forever`", context, parameter
        )
    return seconds


def parse_size_option(context: click.Context, parameter: click.Parameter, value: str) -> int:
    """Callback of an option that takes a size with a binary unit."""
    try:
        return parse_size(value)
    except UsageError as error:
        hint = error.hint or "use a smaller unit"
        raise click.BadParameter(
            f"{value!r} {error.message}; {hint}", context, parameter
        ) from error
