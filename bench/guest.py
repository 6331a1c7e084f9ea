"""The kernel's target with two handlers side by side, in the user-mode-linux guest.

    make bench-kernel [BENCH_ARGS="--seconds S --rounds N"]

ploopd serves a ploop image, tcmu-runner a qcow2 image with the same bytes, both filled; fio reads
4 KiB at random through the kernel's SCSI layer.  The two take turns in short runs, so that what
else the machine does hits both.  The guest has one processor without preemption, and every system
call of it costs a change of processes on the host: compare the two, not with real hardware.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tests.kernel.guest import kernel_target
from tests.kernel.guest.conftest import OpenIscsi, start_initiator
from tests.kernel.guest.run import sh, wait_until
from tests.kernel.guest.tcmu_disk import Backstore

MIB = 1 << 20
DEPTHS = (1, 32)
FABRICS = ("tcm_loop", "iSCSI")
SUBJECT, PEER = "ploopd", "tcmu-runner"
LIMITS = {1: 1.0, 32: 1.3}
"""What ploopd's median must be, in tcmu-runner's, by queue depth."""

RUNNER_LIBRARY = Path("/usr/lib/x86_64-linux-gnu/tcmu-runner/handler_qcow.so")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """`iops`: commands a second; `cpu_us`: processor time of the handler for one of them."""

    iops: float
    cpu_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One fabric and queue depth; samples by handler, in the order in which they were taken."""

    fabric: str
    depth: int
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def iops(self, handler: str) -> list[float]:
        return [sample.iops for sample in self.samples[handler]]

    @property
    def ratio(self) -> float:
        return median(self.iops(SUBJECT)) / median(self.iops(PEER))

    def line(self) -> str:
        cells = [self.fabric, str(self.depth)]
        for handler in (SUBJECT, PEER):
            values = self.iops(handler)
            cells.append(f"{median(values):.0f} ({min(values):.0f}–{max(values):.0f})")
        cells.append(f"{self.ratio:.2f}")
        for handler in (SUBJECT, PEER):
            cells.append(f"{median(sample.cpu_us for sample in self.samples[handler]):.0f}")
        return f"| {' | '.join(cells)} |"


HEADER = (
    "| Fabric | Depth | ploopd, IOPS | tcmu-runner qcow, IOPS | ratio "
    "| ploopd, µs CPU per command | tcmu-runner, µs CPU |\n"
    "|---|--:|--:|--:|--:|--:|--:|"
)


def make_images(directory: Path, size_mib: int) -> tuple[Path, Path]:
    """The same random bytes as a ploop and as a qcow2 image."""
    raw, ploop, qcow = (directory / f"disk.{suffix}" for suffix in ("raw", "hds", "qcow2"))
    chunk = random.Random(20260101)
    with raw.open("wb") as file:
        for _ in range(size_mib):
            file.write(chunk.randbytes(MIB))
    for target, kind in ((ploop, "parallels"), (qcow, "qcow2")):
        sh("qemu-img", "convert", "-f", "raw", "-O", kind, raw, target, timeout=300)
    raw.unlink()
    return ploop, qcow


@contextmanager
def tcmu_runner(directory: Path) -> Iterator[int]:
    """tcmu-runner and the message bus that it does not start without; its process id."""
    Path("/run/dbus").mkdir(exist_ok=True)
    sh("dbus-uuidgen", "--ensure")
    bus = subprocess.Popen(["dbus-daemon", "--system", "--nofork", "--nopidfile"])
    wait_until(Path("/run/dbus/system_bus_socket").exists, "the system bus")
    with (directory / "tcmu-runner.log").open("wb") as log:
        runner = subprocess.Popen(["tcmu-runner"], stdout=log, stderr=log)
    try:
        wait_until(lambda: _owns_name("org.kernel.TCMUService1"), "tcmu-runner")
        yield runner.pid
    finally:
        for process in (runner, bus):
            process.terminate()
            process.wait(20)


def _owns_name(name: str) -> bool:
    call = "org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus.NameHasOwner"
    answer = sh("gdbus", "call", "--system", "-d", call[0], "-o", call[1], "-m", call[2], name,
                check=False)  # fmt: skip
    return "true" in answer


def cpu_seconds(pid: int) -> float:
    """User and system time of a process (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(disk: Path, depth: int, seconds: float, size_mib: int, pid: int) -> Sample:
    before = cpu_seconds(pid)
    result = json.loads(
        sh("fio", "--name=read", f"--filename={disk}", "--rw=randread", "--bs=4k", "--direct=1",
           "--ioengine=libaio", f"--iodepth={depth}", f"--size={size_mib}m", "--time_based",
           f"--runtime={seconds}", "--output-format=json", "--norandommap", "--randrepeat=0")
    )["jobs"][0]["read"]  # fmt: skip
    used = cpu_seconds(pid) - before
    return Sample(iops=result["iops"], cpu_us=1e6 * used / result["total_ios"])


def run(options: argparse.Namespace, directory: Path, stack: ExitStack) -> list[Row]:
    kernel_target.start_kernel_target()
    initiator = start_initiator()
    size = options.size * MIB
    ploop, qcow = make_images(directory, options.size)
    daemon = stack.enter_context(kernel_target.serve(ploop, directory=directory))
    pids = {SUBJECT: daemon.pid, PEER: stack.enter_context(tcmu_runner(directory))}
    stores = {
        SUBJECT: Backstore("disk", "disk", size),
        PEER: Backstore("peer", str(qcow), size, subtype="qcow"),
    }
    for handler, store in stores.items():
        # What targetcli gives to either of them: tcmu-runner is asked by netlink.
        store.create("hw_max_sectors=1024" if handler == PEER else "nl_reply_supported=-1")
        stack.callback(store.delete)
    stores[SUBJECT].wait_served()
    rows = []
    for fabric in FABRICS:
        disks = {
            handler: attach(store, fabric, number, initiator, stack)
            for number, (handler, store) in enumerate(stores.items(), 1)
        }
        for disk in disks.values():  # once through the caches of both
            sh("dd", f"if={disk}", "of=/dev/null", "bs=1M", "iflag=direct")
        for depth in options.depth or DEPTHS:
            row = Row(fabric=fabric, depth=depth, samples={SUBJECT: [], PEER: []})
            for number in range(options.rounds):
                for handler in (SUBJECT, PEER) if number % 2 else (PEER, SUBJECT):
                    disk, pid = disks[handler], pids[handler]
                    sample = measure(disk, depth, options.seconds, options.size, pid)
                    row.samples[handler].append(sample)
            rows.append(row)
            print(row.line(), flush=True)
    return rows


def attach(
    store: Backstore, fabric: str, number: int, initiator: OpenIscsi, stack: ExitStack
) -> Path:
    if fabric == "tcm_loop":
        return store.loop_disk(number)
    url = store.iscsi_target()
    initiator.discover(url)
    stack.callback(initiator.forget, url)
    return initiator.login(url)


def missing() -> list[str]:
    tools = dict(kernel_target.TOOLS) | {"fio": "fio", "qemu-img": "qemu-utils"}
    found = [package for tool, package in tools.items() if shutil.which(tool) is None]
    if shutil.which("tcmu-runner") is None or not RUNNER_LIBRARY.exists():
        found.append("tcmu-runner")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.guest", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each handler")
    parser.add_argument("--size", type=int, default=256, metavar="MIB", help="of the disks")
    parser.add_argument(
        "--depth", type=int, action="append", choices=DEPTHS, help="only this queue depth"
    )
    parser.add_argument("--output", type=Path, default=Path("/out"), help="for bench-kernel.md")
    options = parser.parse_args(arguments)
    if os.environ.get("PLOOPD_IN_GUEST") != "1":
        print("bench.guest: runs in the guest only: make bench-kernel", file=sys.stderr)
        return 2
    lacking = missing()
    if lacking:
        print(f"bench.guest: not installed: apt-get install {' '.join(lacking)}", file=sys.stderr)
        return 2
    directory = Path(tempfile.mkdtemp(dir="/scratch"))
    print(HEADER, flush=True)
    with ExitStack() as stack:
        rows = run(options, directory, stack)
    table = "\n".join([HEADER, *(row.line() for row in rows)])
    (options.output / "bench-kernel.md").write_text(table + "\n")
    missed = [row for row in rows if row.ratio < LIMITS[row.depth]]
    for row in missed:
        print(f"below {LIMITS[row.depth]:g} x {PEER}: {row.fabric}, depth {row.depth}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
