"""What is measured: the jobs, and one run of one job by the load generator."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.servers import Endpoint

TICKS = os.sysconf("SC_CLK_TCK")
KIB = 1024
MIB = 1024 * KIB
QUIET = 0.25
"""Cores that others may use during a run that counts as clean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One access pattern: `block` bytes per request, `depth` requests in flight."""

    name: str
    title: str
    operation: str
    pattern: str
    block: int
    depth: int

    @property
    def unit(self) -> str:
        """Small blocks are told in requests, large ones in bytes."""
        return "IOPS" if self.block <= 16 * KIB else "MB/s"


JOBS = (
    Job(
        name="randread-4k-qd1",
        title="4 KiB random read, QD1",
        operation="read",
        pattern="random",
        block=4 * KIB,
        depth=1,
    ),
    Job(
        name="randread-4k-qd32",
        title="4 KiB random read, QD32",
        operation="read",
        pattern="random",
        block=4 * KIB,
        depth=32,
    ),
    Job(
        name="randwrite-4k-qd32",
        title="4 KiB random write, QD32",
        operation="write",
        pattern="random",
        block=4 * KIB,
        depth=32,
    ),
    Job(
        name="read-128k-qd8",
        title="128 KiB sequential read, QD8",
        operation="read",
        pattern="sequential",
        block=128 * KIB,
        depth=8,
    ),
    Job(
        name="write-128k-qd8",
        title="128 KiB sequential write, QD8",
        operation="write",
        pattern="sequential",
        block=128 * KIB,
        depth=8,
    ),
    Job(
        name="read-1m-qd4",
        title="1 MiB sequential read, QD4",
        operation="read",
        pattern="sequential",
        block=MIB,
        depth=4,
    ),
    Job(
        name="write-1m-qd4",
        title="1 MiB sequential write, QD4",
        operation="write",
        pattern="sequential",
        block=MIB,
        depth=4,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long a run lasts, in seconds, and over how much of the disk it goes."""

    warmup: float
    measured: float
    size_mib: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The result of one run.

    `server_cpu_us`: microseconds of CPU of all of the server's threads per request.  `client_cpu`:
    cores the generator used.  `foreign_cpu`: cores used by neither of the two, steal included.
    """

    iops: float
    bytes_per_second: float
    server_cpu_us: float
    server_cores: float
    client_cpu: float
    foreign_cpu: float
    latency_mean_us: float
    latency_p50_us: float
    latency_p99_us: float

    def value(self, job: Job) -> float:
        """The number that the job is compared by, in `job.unit`."""
        return self.iops if job.unit == "IOPS" else self.bytes_per_second / 1e6

    @property
    def clean(self) -> bool:
        """Did server and generator have the machine to themselves?"""
        return self.foreign_cpu <= QUIET

    def as_json(self) -> dict[str, float]:
        return asdict(self)


class RunError(Exception):
    """The load generator or the server failed; the text says how."""


def process_cpu(pid: int) -> float:
    """CPU seconds of a process, its dead and living threads included (proc(5): utime + stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def machine_cpu() -> float:
    """Seconds that the CPUs of this machine were not idle, steal included."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / TICKS


def build_generator(source: Path, directory: Path) -> Path:
    """Compile the load generator; raises RunError with the compiler's words."""
    program = directory / "loadgen"
    command = [os.environ.get("CC", "cc"), "-O2", "-o", str(program), str(source)]
    try:
        result = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RunError("no C compiler: apt-get install gcc libc6-dev") from error
    if result.returncode:
        raise RunError(f"compiling {source} failed: {result.stderr.strip()}")
    return program


def run_job(generator: Path, endpoint: Endpoint, pid: int, job: Job, timing: Timing) -> Sample:
    """Run one job once against a running server; raises RunError."""
    command = [
        str(generator),
        *endpoint.generator_arguments(),
        job.operation,
        job.pattern,
        str(job.block),
        str(job.depth),
        str(timing.measured),
        str(timing.warmup),
        str(timing.size_mib),
    ]
    deadline = timing.warmup + timing.measured + 60
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stderr is not None
    marks: dict[str, tuple[float, float, float]] = {}
    complaints = []
    started = time.monotonic()
    for line in process.stderr:
        word = line.strip()
        if word in ("BEGIN", "END"):
            marks[word] = (time.monotonic(), process_cpu(pid), machine_cpu())
        else:
            complaints.append(word)
        if time.monotonic() - started > deadline:
            process.kill()
    output, _ = process.communicate(timeout=30)
    if process.returncode or "END" not in marks:
        raise RunError(
            "; ".join(complaints) or f"the load generator ended with {process.returncode}"
        )
    return _sample(json.loads(output), marks["BEGIN"], marks["END"])


def _sample(
    result: dict[str, float | dict[str, float]],
    begin: tuple[float, float, float],
    end: tuple[float, float, float],
) -> Sample:
    seconds = end[0] - begin[0]
    server = end[1] - begin[1]
    latency = result["latency_us"]
    assert isinstance(latency, dict)
    numbers = {key: value for key, value in result.items() if isinstance(value, int | float)}
    client = numbers["client_cpu_seconds"]
    return Sample(
        iops=numbers["iops"],
        bytes_per_second=numbers["bytes_per_second"],
        server_cpu_us=server / numbers["requests"] * 1e6,
        server_cores=server / seconds,
        client_cpu=client / seconds,
        foreign_cpu=max(0.0, (end[2] - begin[2] - server - client) / seconds),
        latency_mean_us=latency["mean"],
        latency_p50_us=latency["p50"],
        latency_p99_us=latency["p99"],
    )
