"""One run of the guest's tests, in the foreground or beside the tests of the host.

The guest has one CPU, so in a run of everything it is booted first, and its result is looked at
when its turn comes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = Path(os.environ.get("PLOOPD_TEST_OUT", ROOT / "out")) / "kernel"
JUNIT = OUT / "junit.xml"
CONSOLE = OUT / "console.log"
TIMEOUT = 900
"""Seconds for the guest, which runs on one CPU and shares it with whatever else there is."""


class GuestRun:
    """The guest's pytest; `beside`: its words go to a file until `finish`."""

    def __init__(self, *, beside: bool) -> None:
        OUT.mkdir(parents=True, exist_ok=True)
        JUNIT.unlink(missing_ok=True)
        command = [str(HERE / "run.sh"), "-t", str(TIMEOUT), "-o", str(OUT), "--"]
        command += [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no"]
        command += ["--durations=10", "-m", "kernel"]
        command += ["--junitxml=/out/junit.xml", str(HERE / "guest")]
        environment = os.environ | {"PLOOPD_IN_GUEST": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self._console = CONSOLE.open("wb") if beside else None
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._console,
            stderr=subprocess.STDOUT if beside else None,
            start_new_session=beside,
        )

    def finish(self) -> int:
        """Wait for the end, and say what the guest said; its exit status."""
        status = self._process.wait()
        if self._console is not None:
            self._console.close()
            with CONSOLE.open(errors="replace") as text:
                shutil.copyfileobj(text, sys.stdout)
            sys.stdout.flush()
        return status

    def stop(self) -> None:
        """End a guest that nobody waits for any more."""
        if self._console is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait()
