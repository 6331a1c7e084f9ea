"""Medians, spreads and ratios of the samples, and the thresholds they are held against."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from bench.jobs import JOBS, Job, Sample

SUBJECT = "ploopd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """ploopd's median divided by `peer`'s must be at least (or, for CPU, at most) `limit`."""

    storage: str
    job: str
    peer: str
    limit: float
    measure: str = "throughput"

    def holds(self, ratio: float) -> bool:
        return ratio <= self.limit if self.measure == "cpu" else ratio >= self.limit

    @property
    def text(self) -> str:
        sign = "≤" if self.measure == "cpu" else "≥"
        what = "server CPU per request" if self.measure == "cpu" else "throughput"
        return f"{what} {sign} {self.limit:g} × {self.peer}"


THRESHOLDS = (
    Threshold(storage="tmpfs", job="randread-4k-qd1", peer="tgtd-tuned", limit=1.0),
    Threshold(storage="tmpfs", job="randread-4k-qd32", peer="tgtd-tuned", limit=3.0),
    Threshold(storage="tmpfs", job="randwrite-4k-qd32", peer="tgtd-tuned", limit=2.2),
    Threshold(storage="tmpfs", job="read-128k-qd8", peer="tgtd-tuned", limit=2.0),
    Threshold(storage="tmpfs", job="write-128k-qd8", peer="tgtd-tuned", limit=1.8),
    Threshold(storage="tmpfs", job="read-1m-qd4", peer="tgtd-tuned", limit=1.2),
    Threshold(storage="tmpfs", job="write-1m-qd4", peer="tgtd-tuned", limit=1.3),
    Threshold(storage="tmpfs", job="randread-4k-qd32", peer="qsd", limit=2.0),
    Threshold(storage="tmpfs", job="randwrite-4k-qd32", peer="qsd", limit=2.0),
    Threshold(storage="tmpfs", job="randread-4k-qd32", peer="tgtd-tuned", limit=0.4, measure="cpu"),
    Threshold(storage="disk", job="randread-4k-qd32", peer="tgtd-direct", limit=1.2),
    Threshold(storage="disk", job="randwrite-4k-qd32", peer="tgtd-direct", limit=1.2),
)


@dataclass(slots=True)
class Results:
    """All samples of one run of the benchmark, by storage, job and server."""

    samples: dict[str, dict[str, dict[str, list[Sample]]]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def add(self, storage: str, job: Job, server: str, sample: Sample) -> None:
        by_job = self.samples.setdefault(storage, {})
        by_job.setdefault(job.name, {}).setdefault(server, []).append(sample)

    def of(self, storage: str, job: str, server: str) -> list[Sample]:
        return self.samples.get(storage, {}).get(job, {}).get(server, [])

    def servers(self, storage: str) -> list[str]:
        """In the order of their first sample."""
        names: dict[str, None] = {}
        for by_server in self.samples.get(storage, {}).values():
            names.update(dict.fromkeys(by_server))
        return sorted(names, key=lambda name: (name != SUBJECT, list(names).index(name)))

    def ratio(self, storage: str, job: Job, peer: str, measure: str) -> float | None:
        """ploopd's median over the peer's, or None when one of them was not measured."""
        ours, theirs = self.of(storage, job.name, SUBJECT), self.of(storage, job.name, peer)
        if not ours or not theirs:
            return None
        if measure == "cpu":
            below = median(s.server_cpu_us for s in theirs)
            return median(s.server_cpu_us for s in ours) / below if below else None
        return median(s.value(job) for s in ours) / median(s.value(job) for s in theirs)

    def as_json(self) -> dict[str, object]:
        return {
            storage: {
                job: {server: [s.as_json() for s in samples] for server, samples in rows.items()}
                for job, rows in by_job.items()
            }
            for storage, by_job in self.samples.items()
        }


def job_named(name: str) -> Job:
    """The job with that name; raises KeyError."""
    return {job.name: job for job in JOBS}[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A threshold and what was measured; `ratio` None: not measured in this run."""

    threshold: Threshold
    ratio: float | None

    @property
    def word(self) -> str:
        if self.ratio is None:
            return "not measured"
        return "met" if self.threshold.holds(self.ratio) else "missed"


def verdicts(results: Results) -> list[Verdict]:
    return [
        Verdict(
            threshold=t,
            ratio=results.ratio(t.storage, job_named(t.job), t.peer, t.measure),
        )
        for t in THRESHOLDS
    ]
