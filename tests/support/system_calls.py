"""Stopping a process after each system call that changes one of some files, and killing it there.

strace gives the process a SIGSTOP with every such call: the call is done, its thread does not come
back from it, and the whole process stands still until it is told to go on, or is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

CHANGING = (
    "pwrite64,pwritev,pwritev2,write,fsync,fdatasync,rename,renameat,renameat2,link,linkat,"
    "unlink,unlinkat,ftruncate,fallocate,fchmod,fchown"
)
_CALL = re.compile(r"^\d+ +(\w+)\((.*)", re.MULTILINE)
_PATIENCE = 0.2
_DETACH = 10.0


class Stepper:
    """A context manager around a running process; `calls` are those that it has made so far.

    `paths`: the files and directories that are meant.  Nobody but `kill_after` tells the process to
    go on: call it at once.
    """

    def __init__(self, pid: int, paths: Sequence[Path], log: Path) -> None:
        self.pid = pid
        self._log = log
        only = [word for path in paths for word in ("-P", str(path))]
        self._command = ["strace", "-f", "-y", "-p", str(pid), "-o", str(log), *only]
        self._command += ["-e", f"trace={CHANGING}", "-e", f"inject={CHANGING}:signal=SIGSTOP"]
        self._strace: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Stepper:
        self._strace = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert self._strace.stderr is not None
        said = self._strace.stderr.readline().decode()
        assert "attached" in said, f"strace: {said}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        strace = self._strace
        assert strace is not None
        assert strace.stderr is not None
        strace.send_signal(signal.SIGINT)
        deadline = time.monotonic() + _DETACH
        try:
            while strace.poll() is None or time.monotonic() < deadline - _DETACH + 0.1:
                os.kill(self.pid, signal.SIGCONT)  # it lets go only of what runs
                if time.monotonic() > deadline:
                    strace.kill()
                time.sleep(0.005)
        except ProcessLookupError:
            strace.wait(_DETACH)
        strace.stderr.close()

    @property
    def calls(self) -> list[str]:
        """The calls so far, as strace prints them."""
        return [f"{name}({rest}" for name, rest in _CALL.findall(self._text())]

    def state(self) -> str:
        """What every thread of the process, and the end of strace's log, say; for a failed test."""
        found = []
        for task in sorted(Path(f"/proc/{self.pid}/task").glob("*")):
            with contextlib.suppress(OSError):
                said = (task / "stat").read_text().rpartition(")")[2].split()[0]
                found.append(f"{task.name}: {said} in {(task / 'wchan').read_text()}")
        return "\n".join([*found, *self._text().splitlines()[-20:]])

    def _text(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def kill_after(self, number: int, other: subprocess.Popen[str]) -> bool:
        """SIGKILL after call `number` (from 1); False if `other` ends before there are so many."""
        seen, since = 0, time.monotonic()
        while True:
            stops = self._text().count("--- SIGSTOP {")
            if stops >= number:
                os.kill(self.pid, signal.SIGKILL)
                return True
            if other.poll() is not None:
                return False
            if stops > seen or time.monotonic() - since > _PATIENCE:
                seen, since = stops, time.monotonic()
                os.kill(self.pid, signal.SIGCONT)
            time.sleep(0.001)
