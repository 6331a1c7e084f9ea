"""Fixtures inside the guest whose process 1 is systemd: ploopd installed, a disk under load."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.conftest import IN_GUEST
from tests.kernel.guest.conftest import (  # noqa: F401  (fixtures)
    OpenIscsi,
    initiator,
    nothing_hangs,
)
from tests.kernel.guest.run import sh, wait_until

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = Path(sys.executable).parent
BLOCK = 4096


def ctl(*words: str) -> str:
    return sh(PROGRAMS / "ploopctl", *words)


def ctl_json(*words: str) -> Any:
    return json.loads(ctl(*words, "--output", "json"))


def show(unit: str, key: str) -> str:
    """A property of a unit."""
    return sh("systemctl", "show", "--property", key, "--value", unit).strip()


def restart(unit: str) -> None:
    """Start a unit anew; what it said is in the error message when that fails."""
    failed = subprocess.run(["systemctl", "restart", unit], check=False).returncode
    assert not failed, sh("journalctl", "--unit", unit, "--no-pager", "--lines", "30")


def main_process(unit: str) -> int:
    return int(show(unit, "MainPID"))


def journal(unit: str) -> list[dict[str, str]]:
    """The entries of a unit, with all their fields."""
    lines = sh("journalctl", "--unit", unit, "--output", "json", "--no-pager").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def drop_in(unit: str, name: str, text: str) -> None:
    directory = Path("/etc/systemd/system", f"{unit}.d")
    directory.mkdir(exist_ok=True)
    (directory / f"{name}.conf").write_text(text)
    sh("systemctl", "daemon-reload")


@pytest.fixture(scope="session")
def installed() -> None:
    """`make install` of everything but the program, which is the checkout's."""
    if not IN_GUEST or Path("/proc/1/comm").read_text() != "systemd\n":
        pytest.skip("changes the machine it runs on, which is to be the guest with systemd")
    os.environ |= {"PREFIX": "/usr/local", "BINDIR": str(PROGRAMS)}
    sh(ROOT / "tools/install", "data", "activate")


def pattern(number: int) -> bytes:
    return number.to_bytes(8, "little") * (BLOCK // 8)


@dataclass(eq=False)
class Load:
    """Writes blocks of a disk and reads them back, past the page cache, until it is stopped."""

    disk: Path
    done: int = 0
    errors: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        memory = mmap.mmap(-1, BLOCK)  # O_DIRECT wants it aligned
        written: dict[int, int] = {}
        chooser = random.Random(7)
        descriptor = os.open(self.disk, os.O_RDWR | os.O_DIRECT)
        try:
            while not self._stop.is_set() and not self.errors:
                block = chooser.randrange(256)
                memory[:] = pattern(self.done + 1)
                os.pwrite(descriptor, memory, block * BLOCK)
                written[block] = self.done + 1
                block = chooser.choice(list(written))
                os.preadv(descriptor, [memory], block * BLOCK)
                if memory[:] != pattern(written[block]):
                    self.errors.append(f"block {block} has something else")
                self.done += 1
        except OSError as error:
            self.errors.append(str(error))
        finally:
            os.close(descriptor)

    def goes_on(self, seconds: float = 20) -> None:
        """More is done than has been, and nothing has failed."""
        before = self.done
        wait_until(lambda: self.done > before + 3 or self.errors, "the load going on", seconds)
        assert not self.errors

    @contextlib.contextmanager
    def running(self) -> Iterator[Load]:
        thread = threading.Thread(target=self.run, daemon=True)
        thread.start()
        try:
            self.goes_on()
            yield self
        finally:
            self._stop.set()
            thread.join(30)
        assert not thread.is_alive(), "the load hangs"
        assert not self.errors
