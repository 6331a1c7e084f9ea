"""The results as a Markdown page, as JSON and as a chart."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

from bench.jobs import JOBS, QUIET, Job
from bench.results import SUBJECT, Results, Verdict, job_named, verdicts

STORAGE_TITLES = {
    "tmpfs": "Image on tmpfs",
    "disk": "Image on a disk file system, cold caches, every server with O_DIRECT",
}


def write_reports(
    out: Path, machine: dict[str, str], setup: dict[str, str], results: Results
) -> str:
    """Write bench.json, bench.md and bench.png (if matplotlib is there); returns the Markdown."""
    judged = verdicts(results)
    (out / "bench.json").write_text(
        json.dumps(
            {
                "machine": machine,
                "setup": setup,
                "samples": results.as_json(),
                "thresholds": [_verdict_json(v) for v in judged],
                "missing": results.missing,
            },
            indent=1,
        )
    )
    text = render(machine, setup, results, judged)
    (out / "bench.md").write_text(text)
    return text


def _verdict_json(verdict: Verdict) -> dict[str, object]:
    threshold = verdict.threshold
    return {
        "storage": threshold.storage,
        "job": threshold.job,
        "peer": threshold.peer,
        "measure": threshold.measure,
        "limit": threshold.limit,
        "ratio": verdict.ratio,
        "result": verdict.word,
    }


def render(
    machine: dict[str, str], setup: dict[str, str], results: Results, judged: list[Verdict]
) -> str:
    """The whole page: thresholds first, then one table per storage."""
    lines = ["# Benchmark", ""]
    lines += [f"- {key}: {value}" for key, value in (machine | setup).items()]
    lines += ["", "Medians over the repetitions, smallest–largest in brackets. Servers ran", ""]
    lines[-2] += (
        " interleaved, job by job, on the same filled content. A run is clean when other programs"
    )
    lines[-2] += f" and the hypervisor took at most {QUIET:g} cores; others are repeated."
    lines += _threshold_table(judged)
    for storage in results.samples:
        lines += ["", f"## {STORAGE_TITLES.get(storage, storage)}", ""]
        for job in JOBS:
            if job.name in results.samples[storage]:
                lines += _job_table(storage, job, results)
    if results.missing:
        lines += ["", "## Not measured", ""]
        lines += [f"- {text}" for text in results.missing]
    return "\n".join(lines) + "\n"


def _threshold_table(judged: list[Verdict]) -> list[str]:
    lines = ["## Ratios", "", "| storage | job | wanted | measured | |", "|---|---|---|---|---|"]
    for verdict in judged:
        threshold = verdict.threshold
        measured = "–" if verdict.ratio is None else f"{verdict.ratio:.2f}"
        title = job_named(threshold.job).title
        word = f"**{verdict.word}**" if verdict.word == "missed" else verdict.word
        lines.append(f"| {threshold.storage} | {title} | {threshold.text} | {measured} | {word} |")
    return lines


def _job_table(storage: str, job: Job, results: Results) -> list[str]:
    lines = [
        f"**{job.title}**",
        "",
        f"| server | {job.unit} | ploopd is | server CPU µs/request | cores | p50 µs | p99 µs "
        "| generator cores | other cores | clean runs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for server in results.servers(storage):
        samples = results.of(storage, job.name, server)
        if not samples:
            continue
        values = [s.value(job) for s in samples]
        ratio = results.ratio(storage, job, server, "throughput")
        factor = "" if server == SUBJECT or ratio is None else f"× {ratio:.2f}"
        cells = [
            server,
            f"{median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})",
            factor,
            f"{median(s.server_cpu_us for s in samples):,.1f}",
            f"{median(s.server_cores for s in samples):.2f}",
            f"{median(s.latency_p50_us for s in samples):,.0f}",
            f"{median(s.latency_p99_us for s in samples):,.0f}",
            f"{median(s.client_cpu for s in samples):.2f}",
            f"{median(s.foreign_cpu for s in samples):.2f}",
            f"{sum(s.clean for s in samples)} of {len(samples)}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def write_chart(out: Path, results: Results) -> None:
    """Throughput relative to ploopd, a panel per storage; ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    storages = list(results.samples)
    figure, axes = plt.subplots(
        len(storages), 1, figsize=(11, 4.2 * len(storages)), squeeze=False, layout="constrained"
    )
    for axis, storage in zip(axes[:, 0], storages, strict=True):
        jobs = [job for job in JOBS if job.name in results.samples[storage]]
        servers = results.servers(storage)
        width = 0.8 / max(1, len(servers))
        for column, server in enumerate(servers):
            heights, low, high = [], [], []
            for job in jobs:
                base = [s.value(job) for s in results.of(storage, job.name, SUBJECT)]
                values = [s.value(job) for s in results.of(storage, job.name, server)]
                unit = median(base) if base else 1.0
                middle = median(values) / unit if values else 0.0
                heights.append(middle)
                low.append(middle - min(values) / unit if values else 0.0)
                high.append(max(values) / unit - middle if values else 0.0)
            places = [i + column * width - 0.4 + width / 2 for i in range(len(jobs))]
            axis.bar(places, heights, width, yerr=[low, high], capsize=2, label=server)
        axis.set_xticks(range(len(jobs)), [job.title.replace(", ", "\n") for job in jobs])
        axis.tick_params(axis="x", labelsize=8)
        axis.set_ylabel("throughput, ploopd = 1")
        axis.set_title(STORAGE_TITLES.get(storage, storage), fontsize=10)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=8, ncols=len(servers))
    figure.savefig(out / "bench.png", dpi=110)
    plt.close(figure)
