"""RELIABILITY.md's table, from the ledger."""

from __future__ import annotations

from pathlib import Path

from tests.torture.ledger import ROOT, Entry, Ledger
from tests.torture.programme import Programme

RELIABILITY = ROOT / "RELIABILITY.md"
BEGIN = "<!-- begin: `python -m tests.torture --report` writes what follows -->"
END = "<!-- end -->"


class ReportError(Exception):
    """RELIABILITY.md has no place for the table."""


def write(ledger: Ledger, programmes: dict[str, Programme], path: Path = RELIABILITY) -> None:
    """Replace the table in RELIABILITY.md, and keep the totals with the sources."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ReportError(f"{path} has no lines {BEGIN!r} and {END!r}")
    path.write_text(f"{before}{BEGIN}\n\n{render(ledger, programmes)}\n{END}{after}")
    ledger.record()


def render(ledger: Ledger, programmes: dict[str, Programme]) -> str:
    """Two tables in Markdown: the programmes, and the runs that make them up."""
    lines = [
        "| Programme | What | Goal | Run | Without a failure since | Errors | Mismatches | Worst |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, programme in programmes.items():
        entries = ledger.of(name)
        lines.append(
            f"| `{name}` | {programme.what} | {programme.goal:,} | "
            f"{sum(each.episodes for each in entries):,} | "
            f"{ledger.since_the_last_failure(name):,} | "
            f"{sum(each.errors for each in entries)} | "
            f"{sum(each.mismatches for each in entries)} | {_worst(entries)} |"
        )
    lines += [
        "",
        "| Begun (UTC) | Programme | Version | Commit | Episodes | Failures | Hours | Machine |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for each in sorted(ledger.entries.values(), key=lambda each: each.first):
        if each.batches:
            lines.append(
                f"| {each.first} | `{each.programme}` | {each.version} | {each.commit} | "
                f"{each.episodes:,} | {each.errors + each.mismatches} | "
                f"{each.seconds / 3600:.2f} | {each.machine} |"
            )
    failures = [f"* `{e.programme}` {note}" for e in ledger.entries.values() for note in e.notes]
    if failures:
        lines += ["", "What failed:", "", *failures]
    return "\n".join(lines) + "\n"


def _worst(entries: list[Entry]) -> str:
    names = dict.fromkeys(name for each in entries for name in each.worst)
    values = (
        f"{name} {max(each.worst[name] for each in entries if name in each.worst):g}"
        for name in names
    )
    return ", ".join(values)
