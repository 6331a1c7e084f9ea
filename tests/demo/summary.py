"""What came out of the demonstration."""

from __future__ import annotations

from dataclasses import dataclass

from ploopd.units import format_size
from tests.support.measured import MeasuredLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One standby.  Times on the clock of `time.time`; `unsynced`: bytes the storage had
    acknowledged and then lost; `replayed`: bytes that the replace has written again."""

    cause: str
    entered: float
    recovered: float
    most_parked: int
    unsynced: int
    replayed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The load with its measurements, from `began` on, and what went wrong, if anything did."""

    load: MeasuredLoad
    began: float
    episode: Episode | None
    failure: str | None


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of the values lie; 0 of none."""
    if not values:
        return 0.0
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def summarise(outcome: Outcome) -> list[tuple[str, str]]:
    """The rows of the table at the end."""
    load, episode = outcome.load, outcome.episode
    rows = [
        ("requests answered", f"{len(load.answered):,}"),
        ("errors at the initiator, wrong or lost data", "0" if outcome.failure is None else "YES"),
        ("blocks read and compared", f"{load.verified:,}"),
    ]
    if episode is None:
        return rows
    quiet = [
        latency
        for moment, latency in zip(load.answered, load.latency, strict=True)
        if moment - latency > episode.recovered or moment < episode.entered
    ]
    first = load.first_after(episode.recovered)
    rows += [
        ("standby", f"{episode.recovered - episode.entered:.1f} s, after {episode.cause}"),
        ("longest request", f"{max(load.latency):.1f} s"),
        ("p99 of the requests outside the episode", f"{1000 * percentile(quiet, 0.99):.0f} ms"),
        ("parked at most", f"{episode.most_parked} requests"),
        (
            "first answer after the replace",
            "none" if first is None else f"{1000 * first:.0f} ms",
        ),
        ("acknowledged writes the storage lost", format_size(episode.unsynced)),
        ("written again by the replace", format_size(episode.replayed)),
    ]
    return rows
