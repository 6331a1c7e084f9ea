"""The README's section about the kernel's target, typed as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.guest.conftest import ROOT, OpenIscsi
from tests.kernel.guest.kernel_target import backstores, targets
from tests.kernel.guest.run import disk_digest, sh, wait_until
from tests.support import images, oracles
from tests.support.images import MIB

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(170)]

HEADING = "### Export through the kernel's target (LIO)"
SIZES = {101: 320 * MIB, 102: 1024 * MIB}
"""The second one is in the README; for the first one what XFS takes is enough."""


def blocks() -> list[str]:
    """The section's shell blocks."""
    section = (ROOT / "README.md").read_text().split(f"{HEADING}\n", 1)[1].split("\n### ", 1)[0]
    return re.findall(r"```sh\n(.*?)```", section, re.DOTALL)


def environment() -> dict[str, str]:
    """As if ploopd were installed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def type_in(block: str) -> str:
    result = subprocess.run(
        ["bash", "-exc", block],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture
def vz(kernel: None, bus: None, scratch: Path) -> Iterator[Path]:
    """/vz with two disks, each a base and a delta on it."""
    place = Path("/vz")
    place.mkdir(exist_ok=True)
    sh("mount", "--bind", scratch, place)
    for number, size in SIZES.items():
        disk = place / f"private/{number}/root.hdd"
        disk.mkdir(parents=True)
        images.write_delta(disk / "base.hds", size, {300: b"\x5a" * MIB})
        images.write_delta(disk / "top.hds", size, {})
        rows = [
            (images.guid(1), "Compressed", "base.hds"),
            (images.TOP_GUID, "Compressed", "top.hds"),
        ]
        images.write_descriptor(disk, size, rows)
    yield place
    sh("umount", place)


@pytest.fixture
def daemon(vz: Path, scratch: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The first block: its last line is the daemon, which stays in the foreground."""
    *before, serve = blocks()[0].strip().split("\n")
    type_in("\n".join(before))
    output = scratch / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {serve}"], env=environment(), stdout=file, stderr=file
        )
    try:
        wait_until(lambda: "/root.hdd  320 MiB" in output.read_text(), "the daemon", 30)
        wait_until(lambda: "dbus-name" in output.read_text(), "the name on the bus", 30)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(30)
        assert process.returncode == 0, output.read_text()


def use(disk: Path, mountpoint: Path, make: str) -> None:
    """A file system, a verified load in a file of it, and its own check."""
    sh(make, "-q", disk)
    sh("mount", disk, mountpoint)
    words = ["--name=v", f"--filename={mountpoint}/data", "--rw=randwrite", "--bs=32k"]
    words += ["--size=64m", "--ioengine=libaio", "--iodepth=16", "--direct=1"]
    sh("fio", *words, "--verify=crc32c", "--verify_fatal=1", "--do_verify=1")
    sh("umount", mountpoint)
    if make == "mkfs.ext4":
        sh("e2fsck", "-f", "-n", disk)
    else:
        sh("xfs_repair", "-n", disk)


def test_the_readme(
    daemon: subprocess.Popen[bytes],
    initiator: OpenIscsi,
    vz: Path,
    scratch: Path,
    mountpoint: Path,
) -> None:
    _, export, unexport, create, delete = blocks()
    seen = {}
    for name, begin, end, make in [
        ("web", export, unexport, "mkfs.xfs"),
        ("db", create, delete, "mkfs.ext4"),
    ]:
        iqn = f"iqn.2026-11.org.example:{name}"
        type_in(begin)
        assert targets() == [iqn]
        disk = disk_of(initiator, iqn)
        use(disk, mountpoint, make)
        seen[name] = disk_digest(disk)
        type_in(end)
        assert (backstores(), targets()) == ([], [])
    daemon.terminate()
    assert daemon.wait(30) == 0
    for name, number in (("web", 101), ("db", 102)):
        place = vz / f"private/{number}/root.hdd"
        layers: list[oracles.Layer] = [
            ("parallels", place / "base.hds"),
            ("parallels", place / "top.hds"),
        ]
        flat = oracles.read_through_qemu(layers, scratch / "flat")
        assert oracles.digest(flat) == seen[name]
        flat.unlink()


def disk_of(initiator: OpenIscsi, iqn: str) -> Path:
    wait_until(lambda: initiator.disks(iqn), "the disk")
    disk = Path("/dev", initiator.disks(iqn)[0])
    wait_until(disk.exists, f"{disk}")
    return disk
