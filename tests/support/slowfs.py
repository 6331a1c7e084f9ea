"""Storage with a fixed latency and any number of requests at once: slowfs.c, built when needed."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

from tests.support import oracles


class SlowFsMissingError(Exception):
    """slowfs cannot be built here; the text says what is missing."""


class SlowFs:
    """A context manager around the process; `mountpoint` shows the files of `source`."""

    def __init__(self, source: Path, mountpoint: Path, *, delay_us: int, build: Path) -> None:
        self.source = source
        self.mountpoint = mountpoint
        self.delay_us = delay_us
        self.program = build / "slowfs"
        self._process: subprocess.Popen[bytes] | None = None

    def _build(self) -> None:
        missing = oracles.missing_for_fuse()
        if missing is not None:
            raise SlowFsMissingError(missing)
        flags = ["pkg-config", "--cflags", "--libs", "fuse3"]
        try:
            found = subprocess.run(flags, capture_output=True, text=True, check=True).stdout
            code = str(Path(__file__).with_name("slowfs.c"))
            compiler = [os.environ.get("CC", "cc"), "-O2", "-o", str(self.program), code]
            subprocess.run([*compiler, *shlex.split(found)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SlowFsMissingError("apt-get install gcc pkg-config libfuse3-dev") from error

    def __enter__(self) -> SlowFs:
        self._build()
        self.mountpoint.mkdir(exist_ok=True)
        command = [str(self.program), str(self.source), str(self.mountpoint), str(self.delay_us)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while not os.path.ismount(self.mountpoint):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("slowfs does not mount")
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            subprocess.run(["fusermount3", "-u", "-z", str(self.mountpoint)], check=False)
