"""The kernel's target in the guest, with Debian's own tools: rtslib's targetctl and targetcli."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType

import pytest

from ploopd.cli.errors import run_to_code
from ploopd.cli.ploopctl import cli as ploopctl
from tests.kernel.guest.run import can_be_opened, sh, wait_until
from tests.support.serve import ServeProcess

CONFIGFS = Path("/sys/kernel/config/target")
SAVED = Path("/etc/rtslib-fb-target/saveconfig.json")
MEMORY = Path("/var/lib/ploopd/lio.json")
TOOLS = {"targetcli": "targetcli-fb", "dbus-daemon": "dbus", "gdbus": "libglib2.0-bin"}
MODULES = ("target_core_user", "tcm_loop", "iscsi_target_mod", "sd_mod")


def require_tools() -> None:
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: apt-get install {' '.join(missing)}")


def start_kernel_target() -> None:
    """Load the modules, as a machine with target.service does at its start."""
    sh("modprobe", "configfs")
    if not Path("/sys/kernel/config").is_mount():
        sh("mount", "-t", "configfs", "configfs", "/sys/kernel/config")
    sh("modprobe", "target_core_mod")
    SAVED.parent.mkdir(exist_ok=True)
    (CONFIGFS / "dbroot").write_text(f"{SAVED.parent}\n")
    sh("modprobe", "-a", *MODULES)


class Served(ServeProcess):
    """A daemon whose `ploopctl` runs in this process: to start Python costs thousands of page
    faults, and each of them several system calls of the host."""

    def ctl(
        self, *arguments: str, timeout: float = 30.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        words = ["--control", str(self.control), *arguments]
        files = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
        with contextlib.redirect_stdout(files[0]), contextlib.redirect_stderr(files[1]):
            code = run_to_code("ploopctl", ploopctl, words)
        stdout, stderr = (file.buffer.getvalue().decode() for file in files)
        if check and code:
            raise AssertionError(
                f"ploopctl {' '.join(arguments)} ended with {code}: {stderr.strip()}\n"
                f"ploopd wrote: {self.stderr[-2000:]}"
            )
        return subprocess.CompletedProcess(words, code, stdout, stderr)


def serve(*images: Path, directory: Path, options: tuple[str, ...] = ()) -> Served:
    """A daemon that is the handler of user:ploop; the kernel's target has port 3260."""
    return Served(*images, directory=directory, options=("--lio", "on", *options))


def targetcli(*words: str, check: bool = True) -> str:
    """One command of Debian's targetcli; it exits with 0 even where it says that it failed."""
    return _plain(sh("targetcli", *words, check=check, timeout=60))


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


class TargetcliShell:
    """One targetcli that is typed into: for many commands in a row, since its start is slow here.

    It keeps the other ones out as long as it lives.  It does not come to the end where it would
    save the configuration.
    """

    PROMPT = "/> "

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            ["targetcli"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )

    def __enter__(self) -> TargetcliShell:
        self._answer()
        return self

    def __call__(self, *words: str) -> str:
        """What it says to a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{' '.join(words)}\n".encode())
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        text = b""
        while not text.endswith(self.PROMPT.encode()):
            more = os.read(self._process.stdout.fileno(), 65536)
            assert more, f"targetcli has ended: {text.decode()}"
            text += more
        return _plain(text.decode().removesuffix(self.PROMPT))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._process as process:
            process.kill()


def loop_disk(backstore: str, wwn: str = "naa.5001405000000001") -> Path:
    """Link a backstore into tcm_loop: a disk of this machine without iSCSI."""
    with TargetcliShell() as shell:
        link_loop(shell, backstore, wwn)
    return wait_for_loop_disk()


def link_loop(shell: TargetcliShell, backstore: str, wwn: str = "naa.5001405000000001") -> None:
    shell("/loopback", "create", wwn)
    shell(f"/loopback/{wwn}/luns", "create", f"/backstores/user:ploop/{backstore}")


def wait_for_loop_disk() -> Path:
    wait_until(loop_disks, "the disk of tcm_loop")
    return loop_disks()[0]


def loop_disks() -> list[Path]:
    """The disks of tcm_loop."""
    disks = [
        Path("/dev", block.name)
        for block in Path("/sys/block").iterdir()
        if "tcm_loop" in os.path.realpath(block)
    ]
    return sorted(disk for disk in disks if can_be_opened(disk))


def backstores() -> list[str]:
    """The names of all backstores that the kernel has."""
    return sorted(each.name for each in (CONFIGFS / "core").glob("*_[0-9]*/*") if each.is_dir())


def targets() -> list[str]:
    """The names of the iSCSI targets that the kernel has."""
    iscsi = CONFIGFS / "iscsi"
    return sorted(each.name for each in iscsi.glob("iqn.*")) if iscsi.is_dir() else []


def is_empty() -> bool:
    """Whether the kernel has neither a backstore nor a target of any fabric."""
    configured = [each for each in CONFIGFS.glob("*/*") if each.is_dir()]
    own = {"alua", "discovery_auth"}
    return all(each.name in own for each in configured)


def clear() -> None:
    """Take everything away that a test has left in the kernel."""
    if not is_empty():
        sh("/usr/bin/targetctl", "clear", timeout=60)
    SAVED.unlink(missing_ok=True)
    MEMORY.unlink(missing_ok=True)


def stuck_processes() -> list[str]:
    """Processes in uninterruptible sleep: `PID COMM`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                text = (entry / "stat").read_text()
            except OSError:
                continue
            name, _, rest = text.partition(" (")[2].rpartition(") ")
            if rest.startswith("D"):
                found.append(f"{entry.name} {name}")
    return found


def assert_nothing_is_stuck(seconds: float = 10) -> None:
    """Nothing stays in state D: a process may be there for the time of an I/O."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        before = set(stuck_processes())
        if not before:
            return
        time.sleep(0.2)
    stacks = {each: _stack(each) for each in stuck_processes()}
    assert not stacks, stacks


def _stack(process: str) -> str:
    try:
        return Path("/proc", process.split()[0], "stack").read_text()
    except OSError as error:
        return os.strerror(error.errno or 0)
