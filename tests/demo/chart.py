"""Latency and throughput over time, with the standby episode marked."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.demo.summary import Outcome

_STEP = 0.25
"""Seconds of one point of the lines."""

_DOTS = 20_000
"""Requests that are drawn one by one; more would be a smear."""

_BLUE, _DARK, _SHADE = "#3b76af", "#16324f", "#f2b134"


def write_chart(path: Path, outcome: Outcome) -> None:
    """Draw the PNG; ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    episode, load = outcome.episode, outcome.load
    assert episode is not None
    moments = np.array(load.answered) - outcome.began
    latencies = 1000 * np.array(load.latency)
    entered, recovered = episode.entered - outcome.began, episode.recovered - outcome.began
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(11, 6.4), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    figure.suptitle(
        f"A disk outlives its storage: {len(moments):,} requests, no error, nothing lost",
        fontsize=13,
    )
    every = max(1, len(moments) // _DOTS)
    late = latencies > 1000 * (recovered - entered) / 2
    drawn = late | (np.arange(len(moments)) % every == 0)
    upper.scatter(
        *(moments[drawn], latencies[drawn]),
        s=3,
        alpha=0.35,
        color=_BLUE,
        linewidths=0,
        label="one request",
    )
    edges = np.arange(0, moments.max() - _STEP, _STEP)  # whole steps only
    which = np.floor(moments / _STEP).astype(int)
    p99 = [
        np.percentile(latencies[which == n], 99) if (which == n).any() else np.nan
        for n in range(len(edges))
    ]
    upper.plot(edges + _STEP / 2, p99, color=_DARK, linewidth=1.2, label="p99")
    upper.set_yscale("log")
    upper.set_ylabel("latency, ms (logarithmic)")
    rate = np.bincount(which, minlength=len(edges))[: len(edges)] / _STEP
    lower.fill_between(edges, rate, step="post", color=_BLUE, alpha=0.6, linewidth=0)
    lower.set_ylabel("requests answered per s")
    lower.set_xlabel("time when answered, s")
    lower.set_ylim(bottom=0)
    lower.set_xlim(0, edges[-1])
    for axis in (upper, lower):
        axis.axvspan(entered, recovered, color=_SHADE, alpha=0.3, linewidth=0, label="standby")
        axis.grid(alpha=0.3)
    _annotate(upper, outcome, entered, recovered)
    upper.legend(fontsize=9, loc="upper left", markerscale=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _annotate(axis: object, outcome: Outcome, entered: float, recovered: float) -> None:
    episode = outcome.episode
    assert episode is not None
    first = outcome.load.first_after(episode.recovered)
    assert first is not None
    axis.annotate(  # type: ignore[attr-defined]
        "the parked requests\nare answered",
        (recovered, 1000 * max(outcome.load.latency)),
        xytext=(25, -14),
        textcoords="offset points",
        fontsize=9,
        arrowprops={"arrowstyle": "->", "color": _DARK},
    )
    text = (
        f"standby, {recovered - entered:.1f} s\n"
        f"{episode.cause}\n"
        f"{episode.most_parked} requests parked\n"
        f"first answer {1000 * first:.0f} ms\nafter the replace"
    )
    axis.text(  # type: ignore[attr-defined]
        *((entered + recovered) / 2, 0.5),
        text,
        transform=axis.get_xaxis_transform(),  # type: ignore[attr-defined]
        ha="center",
        va="center",
        fontsize=9,
    )
