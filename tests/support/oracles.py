"""Independent judges of an image's content and structure: QEMU's tools."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

Layer = tuple[str, Path]
"""QEMU's driver name ("parallels" or "raw") and the file."""

PLOOP = "/usr/sbin/ploop"
"""libploop's command; users other than root do not have its directory in their PATH."""

PACKAGES = {
    PLOOP: "ploop",
    "cc": "gcc",
    "fio": "fio",
    "flock": "util-linux",
    "fusermount3": "fuse3",
    "iscsi-inq": "libiscsi-bin",
    "iscsi-ls": "libiscsi-bin",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-storage-daemon": "qemu-system-common",
    "setpriv": "util-linux",
    "strace": "strace",
    "unshare": "util-linux",
}
"""The programs that tests start, and their Debian packages."""


class OracleError(AssertionError):
    """An oracle refused to work or disagrees; the text is what it printed."""


def run(*command: str, accept: tuple[int, ...] = (0,), timeout: float = 120) -> str:
    """Run a peer's tool and return its stdout; raises OracleError on another exit code."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if result.returncode not in accept:
        raise OracleError(
            f"{' '.join(command)} ended with {result.returncode}: "
            f"{result.stdout.strip()} {result.stderr.strip()}"
        )
    return result.stdout


def have(*tools: str) -> list[str]:
    """Those of `tools` that are not installed."""
    return [tool for tool in tools if shutil.which(tool) is None]


def missing_for_fuse() -> str | None:
    """What keeps this user from mounting FUSE file systems and unmounting them again."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "no FUSE here: /dev/fuse is needed"
    if shutil.which("fusermount3") is None:
        return "fusermount3 is not installed: apt-get install fuse3"
    if os.geteuid() != 0 and not Path("/etc/mtab").exists():
        return "fusermount3 does not unmount without /etc/mtab: ln -s ../proc/self/mounts /etc/mtab"
    return None


def require_libploop_locks() -> None:
    """Skip the test where libploop cannot lock: it wants a directory in /var/lock."""
    place = Path("/var/lock").resolve()
    if not os.access(place / "ploop", os.W_OK) and not os.access(place, os.W_OK):
        pytest.skip(f"libploop locks in {place}/ploop, where this user cannot write")


def chain_spec(layers: Sequence[Layer]) -> str:
    """QEMU's `json:` pseudo file name for a chain, base first: the last layer is the top."""
    node: dict[str, Any] = {}
    for driver, path in layers:
        upper: dict[str, Any] = {
            "driver": driver,
            "file": {"driver": "file", "filename": str(path)},
        }
        if node:
            upper["backing"] = node
        node = upper
    return "json:" + json.dumps(node)


def read_through_qemu(layers: Sequence[Layer], out: Path) -> Path:
    """The chain's content as QEMU's own drivers see it, as a raw file."""
    run("qemu-img", "convert", "-O", "raw", chain_spec(layers), str(out))
    return out


def read_through_iscsi(url: str, out: Path) -> Path:
    """The LUN's content as libiscsi sees it, as a raw file."""
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", url, str(out))
    return out


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def assert_same_content(one: Path, other: Path) -> None:
    """Byte for byte, size included; qemu-img knows holes, so large disks are fast."""
    assert one.stat().st_size == other.stat().st_size, f"{one} and {other} differ in size"
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(one), str(other))


def qemu_io(
    target: str, *commands: str, driver: str | None = "raw", read_only: bool = False
) -> str:
    """Run qemu-io commands on a file, URL or `json:` spec; raises OracleError if one fails.

    qemu-io ends with 0 although a read's pattern differs, so its words are looked at, too.
    """
    arguments = ["qemu-io"]
    if read_only:
        arguments.append("-r")
    if driver is not None and not target.startswith("json:"):
        arguments += ["-f", driver]
    for command in commands:
        arguments += ["-c", command]
    output = run(*arguments, target)
    if "failed" in output or "error" in output.lower():
        raise OracleError(f"qemu-io {target} {commands}: {output}")
    return output


def qemu_check(path: Path) -> dict[str, Any]:
    """`qemu-img check`'s report; leaks are allowed, corruptions raise OracleError."""
    output = run(
        "qemu-img", "check", "-f", "parallels", "--output=json", str(path), accept=(0, 2, 3)
    )
    report: dict[str, Any] = json.loads(output)
    if report.get("corruptions") or report.get("check-errors"):
        raise OracleError(f"qemu-img check {path}: {report}")
    return report


def bat_problems(path: Path) -> list[str]:
    """What is wrong with the BAT of a ploop file, by our own reading of the format.

    QEMU 7.2 overlooks duplicate entries, entries inside the header and a ragged last cluster.
    """
    raw = path.read_bytes()[: 1 << 26]
    magic = raw[:16]
    cluster_sectors = int.from_bytes(raw[28:32], "little")
    count = int.from_bytes(raw[32:36], "little")
    cluster = cluster_sectors * 512
    unit = 512 if magic == b"WithoutFreeSpace" else cluster
    first = -(-(64 + 4 * count) // cluster)
    clusters_in_file = -(-path.stat().st_size // cluster)
    seen: dict[int, int] = {}
    problems = []
    for index, entry in enumerate(memoryview(raw)[64 : 64 + 4 * count].cast("I")):
        if not entry:
            continue
        place, rest = divmod(entry * unit, cluster)
        if rest:
            problems.append(f"entry {index} = {entry} is not cluster-aligned")
        elif place < first:
            problems.append(f"entry {index} = {entry} points into the header")
        elif place >= clusters_in_file:
            problems.append(f"entry {index} = {entry} points past the end of the file")
        if place in seen:
            problems.append(f"entries {seen[place]} and {index} share cluster {place}")
        seen[place] = index
    return problems


def in_use_word(path: Path) -> int:
    with path.open("rb") as file:
        file.seek(44)
        return int.from_bytes(file.read(4), "little")
