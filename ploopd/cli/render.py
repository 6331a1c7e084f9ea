"""What goes to stdout: aligned tables for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
import msgspec

OUTPUT = click.option(
    "--output",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="Format of stdout.",
)


def echo_json(value: Any) -> None:
    """Print anything that msgspec can encode, indented."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def echo_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset()
) -> None:
    """Print columns as wide as their widest cell; those in `right` are aligned to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


def echo_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Print `name: value` lines with the values below each other."""
    width = max(len(name) for name, _ in fields) + 1
    for name, value in fields:
        click.echo(f"{name + ':':<{width}} {value}".rstrip())
