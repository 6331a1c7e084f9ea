"""`python -m bench`: measure ploopd and its peers side by side and write table, JSON and chart."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench import machine
from bench.images import drop_cache, make_images
from bench.jobs import JOBS, Job, RunError, Sample, Timing, build_generator, run_job
from bench.report import write_chart, write_reports
from bench.results import SUBJECT, Results
from bench.servers import (
    DEFAULT_SERVERS,
    DISK_SERVERS,
    TMPFS_SERVERS,
    Endpoint,
    Images,
    Server,
    StartError,
)

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one call of the benchmark is to do."""

    jobs: list[Job]
    servers: list[str]
    storages: dict[str, Path]
    reps: int
    tries: int
    timing: Timing


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 s runs, 1 repetition, 128 MiB")
    parser.add_argument("--out", type=Path, default=HERE.parent / "out" / "bench")
    parser.add_argument("--jobs", help=f"of {','.join(j.name for j in JOBS)}")
    parser.add_argument(
        "--servers", help=f"of {','.join(dict.fromkeys([*TMPFS_SERVERS, *DISK_SERVERS]))}"
    )
    parser.add_argument("--reps", type=int, help="repetitions (default 5)")
    parser.add_argument("--seconds", type=float, help="measured seconds of one run (default 4)")
    parser.add_argument("--size", type=int, help="size of the disk in MiB (default 1024)")
    parser.add_argument("--storage", default="tmpfs,disk", help="tmpfs, disk or both")
    parser.add_argument("--tmpfs-dir", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--disk-dir", type=Path, help="default: the directory of --out")
    return parser.parse_args(arguments)


def make_plan(options: argparse.Namespace) -> Plan:
    """Options → plan; raises SystemExit naming a word that is no job or server."""
    known = {job.name: job for job in JOBS}
    names = options.jobs.split(",") if options.jobs else list(known)
    for name in names:
        if name not in known:
            raise SystemExit(f"bench: no job {name!r}; there are {', '.join(known)}")
    servers = options.servers.split(",") if options.servers else list(DEFAULT_SERVERS)
    for name in servers:
        if name not in TMPFS_SERVERS and name not in DISK_SERVERS:
            raise SystemExit(f"bench: no server {name!r}; there are {', '.join(TMPFS_SERVERS)}")
    directories = {"tmpfs": options.tmpfs_dir, "disk": options.disk_dir or options.out}
    quick = options.quick
    return Plan(
        jobs=[known[name] for name in names],
        servers=servers,
        storages={name: directories[name] for name in options.storage.split(",")},
        reps=options.reps or (1 if quick else 5),
        tries=1 if quick else 4,
        timing=Timing(
            warmup=0.3 if quick else 1.0,
            measured=options.seconds or (1.0 if quick else 4.0),
            size_mib=options.size or (128 if quick else 1024),
        ),
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def check_storage(name: str, directory: Path) -> None:
    """Refuse a directory that is not what the table would say; raises StartError."""
    kind = machine.file_system(directory)
    if (name == "tmpfs") != (kind == "tmpfs"):
        raise StartError(f"{directory} is on {kind}: choose another with --{name}-dir")


def start_servers(
    plan: Plan, storage: str, directory: Path, images: Images, results: Results, stack: ExitStack
) -> list[tuple[Server, Endpoint]]:
    makers = TMPFS_SERVERS if storage == "tmpfs" else DISK_SERVERS
    running = []
    for name in plan.servers:
        if name not in makers:
            continue
        server = makers[name](directory, images)
        stack.callback(server.stop)
        try:
            running.append((server, server.start()))
        except StartError as error:
            results.missing.append(f"{storage}: {name}: {error}")
            say(f"{storage}: {name}: {error}")
    return running


def measure_storage(
    plan: Plan, generator: Path, storage: str, parent: Path, results: Results
) -> None:
    """All jobs × servers × repetitions on one storage: every server runs each job in turn."""
    check_storage(storage, parent)
    directory = Path(tempfile.mkdtemp(prefix="ploopd-bench.", dir=parent))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        images = make_images(directory, plan.timing.size_mib)
        running = start_servers(plan, storage, directory, images, results, stack)
        for rep in range(plan.reps):
            for job in plan.jobs:
                order = running[rep % len(running) :] + running[: rep % len(running)]
                for server, endpoint in order:
                    if storage == "disk":
                        drop_cache(images)
                    measure_once(plan, generator, storage, job, server, endpoint, rep, results)


def measure_once(
    plan: Plan,
    generator: Path,
    storage: str,
    job: Job,
    server: Server,
    endpoint: Endpoint,
    rep: int,
    results: Results,
) -> None:
    """One run, repeated when other programs took the CPUs meanwhile: the quietest one counts."""
    best: Sample | None = None
    for _ in range(plan.tries):
        try:
            sample = run_job(generator, endpoint, server.pid, job, plan.timing)
        except (RunError, OSError) as error:
            results.missing.append(f"{storage}: {server.name}: {job.name}: {error}")
            say(f"{storage}: {server.name}: {job.name}: {error}")
            return
        if best is None or sample.foreign_cpu < best.foreign_cpu:
            best = sample
        if best.clean:
            break
    assert best is not None
    results.add(storage, job, server.name, best)
    say(
        f"{storage} rep {rep} {job.name:18} {server.name:18} {best.value(job):10,.0f} {job.unit}"
        f"  {best.server_cpu_us:8.1f} us/request  p99 {best.latency_p99_us:7.0f} us"
        f"  other {best.foreign_cpu:.2f}"
    )


def _interrupt(number: int, frame: object) -> None:
    """SIGTERM ends like Ctrl-C: the servers are stopped and what there is gets reported."""
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    plan = make_plan(options)
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results()
    began = time.monotonic()
    signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.TemporaryDirectory(prefix="ploopd-bench.") as scratch:
        try:
            generator = build_generator(HERE / "loadgen.c", Path(scratch))
        except RunError as error:
            say(f"bench: {error}")
            return 1
        for storage, parent in plan.storages.items():
            try:
                measure_storage(plan, generator, storage, parent, results)
            except StartError as error:
                results.missing.append(f"{storage}: {error}")
                say(f"{storage}: {error}")
            except KeyboardInterrupt:
                results.missing.append(f"{storage}: interrupted")
                break
    timing = plan.timing
    setup = {
        "disk": f"{timing.size_mib} MiB, random content",
        "run": f"{plan.reps} x {timing.measured:g} s after {timing.warmup:g} s",
        "took": f"{time.monotonic() - began:.0f} s",
    }
    text = write_reports(options.out, machine.describe(), setup, results)
    try:
        write_chart(options.out, results)
    except ImportError:
        say("bench: no chart: matplotlib is not installed (the `bench` extra)")
    print(text)
    measured = any(
        SUBJECT in rows for by_job in results.samples.values() for rows in by_job.values()
    )
    return 0 if measured else 1


if __name__ == "__main__":
    sys.exit(main())
