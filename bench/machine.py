"""A description of the machine and the programs, so that a table can be read a year later."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path


def describe() -> dict[str, str]:
    """What the numbers depend on: CPU, memory, kernel, versions of everything compared."""
    return {
        "cpu": f"{os.cpu_count()} x {_cpu_model()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "system": _os_name(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "tgt": _version(["tgtadm", "--version"]),
        "qemu": _version(["qemu-storage-daemon", "--version"]),
        "ploopd": _version([sys.executable, "-m", "ploopd.cli.ploopd", "--version"]),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load": " ".join(f"{x:.2f}" for x in os.getloadavg()),
    }


def file_system(path: Path) -> str:
    """The type of the file system that `path` is on, as mountinfo names it (proc(5))."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return "unknown"


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "unknown"


def _cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _os_name() -> str:
    for line in _read("/etc/os-release").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.split("=", 1)[1].strip('"')
    return platform.system()


def _version(command: list[str]) -> str:
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    try:
        result = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=20,
            env=os.environ | {"PATH": path},
        )
    except (OSError, subprocess.TimeoutExpired):
        return "not installed"
    lines = (result.stdout + result.stderr).strip().splitlines()
    return lines[0] if lines and result.returncode == 0 else "not installed"
