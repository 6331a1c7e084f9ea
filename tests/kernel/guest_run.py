"""One run of the guest's tests: two guests at the same time, each with a part of them.

A guest has one CPU, and waits for much of its time.  In a run of more than these tests the guests
are booted first, and their result is looked at when its turn comes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = Path(os.environ.get("PLOOPD_TEST_OUT", ROOT / "out")) / "kernel"
JUNIT = OUT / "junit.xml"
TESTS = HERE / "guest"
KERNEL_TARGET = "test_lio_*.py"
"""The files of the one part; what is called otherwise is the other one."""
TIMEOUT = 900
"""Seconds for a guest, which runs on one CPU and shares it with whatever else there is."""
NO_GUEST = 125
"""The status of run.sh where none starts."""


@dataclass(kw_only=True)
class _Guest:
    """A guest with its part of the tests.  What it says goes to `console`, if that is a file."""

    out: Path
    process: subprocess.Popen[bytes]
    console: IO[bytes] | None

    def finish(self) -> int:
        """Wait for the end, and say what the guest said; its exit status."""
        status = self.process.wait()
        if self.console is not None:
            self.console.close()
            with Path(self.console.name).open(errors="replace") as text:
                shutil.copyfileobj(text, sys.stdout)
            sys.stdout.flush()
        return status

    def stop(self) -> None:
        """The whole session, not only its first process group: timeout(1) has one of its own, and
        is who ends the guest."""
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(ProcessLookupError):
                if entry.name.isdecimal() and os.getsid(int(entry.name)) == self.process.pid:
                    os.kill(int(entry.name), signal.SIGTERM)
        self.process.wait()


def _boot(name: str, tests: list[str], *, cpu: int, memory: str, beside: bool) -> _Guest:
    out = OUT / name
    out.mkdir(parents=True, exist_ok=True)
    (out / "junit.xml").unlink(missing_ok=True)
    command = [str(HERE / "run.sh"), "-m", memory, "-t", str(TIMEOUT), "-o", str(out), "--"]
    command += [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no"]
    command += ["--durations=10", "-m", "kernel", "--junitxml=/out/junit.xml", *tests]
    # What Python compiles is kept for the next process, in memory.
    environment = os.environ | {"PLOOPD_IN_GUEST": "1", "PLOOPD_GUEST_CPU": str(cpu)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    console = (out / "console.log").open("wb") if beside else None
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=console,
        stderr=subprocess.STDOUT if beside else None,
        start_new_session=True,
    )
    return _Guest(out=out, process=process, console=console)


class GuestRun:
    """The guests' pytest; `beside`: all of their words go to files until `finish`, otherwise the
    first one's are seen as they come."""

    def __init__(self, *, beside: bool) -> None:
        OUT.mkdir(parents=True, exist_ok=True)
        JUNIT.unlink(missing_ok=True)
        cpus = sorted(os.sched_getaffinity(0))
        others = ["--ignore-glob", str(TESTS / KERNEL_TARGET), str(TESTS)]
        kernel_target = [str(path) for path in sorted(TESTS.glob(KERNEL_TARGET))]
        self._guests = [
            # 64 devices at once have rings of 8 MiB each.
            _boot("lio", kernel_target, cpu=cpus[-1], memory="2G", beside=beside),
            _boot("disks", others, cpu=cpus[0], memory="1G", beside=True),
        ]

    def finish(self) -> list[int]:
        """Wait for the end, say what the guests said, and put their results together in `JUNIT`;
        the exit statuses."""
        statuses = [guest.finish() for guest in self._guests]
        results = ElementTree.Element("testsuites")
        for guest in self._guests:
            if (guest.out / "junit.xml").exists():
                results.extend(ElementTree.parse(guest.out / "junit.xml").getroot())
        if len(results):
            ElementTree.ElementTree(results).write(JUNIT, encoding="utf-8", xml_declaration=True)
        return statuses

    def stop(self) -> None:
        """End guests that nobody waits for any more."""
        for guest in self._guests:
            if guest.process.poll() is None:
                guest.stop()
