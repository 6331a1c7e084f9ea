"""Options and conversions that several commands share."""

from __future__ import annotations

import math

import click

DEFAULT_TIMEOUT = 30.0

TIMEOUT = click.option(
    "--timeout",
    type=click.FloatRange(min=0.0, min_open=True),
    default=DEFAULT_TIMEOUT,
    show_default=True,
    metavar="SECONDS",
    help="Give up after this time, saying what was waited for.",
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
