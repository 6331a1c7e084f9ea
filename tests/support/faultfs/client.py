"""`FaultFs`: the fault file system as tests use it."""

from __future__ import annotations

import contextlib
import errno as errno_names
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.faultfs.script import OPERATIONS, parse

START = 20.0
"""Seconds in which it must have mounted."""

UNMOUNTED, TERMINATED = 1.0, 10.0
"""Seconds in which it ends by itself after the unmount, and after a signal."""


class FaultFsError(AssertionError):
    """It does not mount, has ended, or does not take a rule."""


class FaultFs:
    """A context manager around the process; `mountpoint` shows the files of `source`.

    Paths in rules are globs relative to `source`.  `control` is the control file: everything here
    can be done with `echo` and `cat`, too.  `ended`: the exit code, after `close`.
    """

    def __init__(self, source: Path, mountpoint: Path, *, allow_other: bool = False) -> None:
        self.source = source
        self.mountpoint = mountpoint
        self._options = ["--allow-other"] if allow_other else []
        self._directory = Path(tempfile.mkdtemp(prefix="faultfs."))
        self.control = self._directory / "control"
        self._process: subprocess.Popen[bytes] | None = None
        self.ended: int | None = None

    # -- the process -----------------------------------------------------------------------

    def __enter__(self) -> FaultFs:
        self.start()
        return self

    def start(self) -> None:
        self.mountpoint.mkdir(exist_ok=True)
        self.ended = None
        command = [sys.executable, "-m", "tests.support.faultfs", *self._options]
        self._process = subprocess.Popen(
            [*command, str(self.source), str(self.mountpoint), "--control", str(self.control)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=Path(__file__).resolve().parents[3],
        )
        deadline = time.monotonic() + START
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                ended = self._process.poll()
                self.close()
                raise FaultFsError(f"faultfs does not mount: {ended}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            return self.control.is_symlink() and bool(self.status())
        except OSError:
            return False

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """End the process: the kernel answers ENOTCONN to everything until `remount`."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def remount(self) -> None:
        """Mount anew: another file system for the kernel.  Old descriptors stay dead."""
        self._unmount()
        self.control.unlink(missing_ok=True)
        self.start()

    def _unmount(self) -> None:
        subprocess.run(
            ["fusermount3", "-u", "-q", "-z", str(self.mountpoint)],
            check=False,
            stderr=subprocess.DEVNULL,
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let everything go on that hangs, unmount and end the process."""
        if self.ended is not None:
            return
        assert self._process is not None
        if self._process.poll() is None:
            with contextlib.suppress(OSError):
                self.script("alive", "clear")
        self._unmount()
        # While somebody has a file open it is unmounted, but not at its end.
        if not self._ends_within(UNMOUNTED):
            self._process.terminate()
            if not self._ends_within(TERMINATED):
                self._process.kill()
        self.ended = self._process.wait()
        self.control.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._directory.rmdir()

    def _ends_within(self, seconds: float) -> bool:
        assert self._process is not None
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    # -- the control file ------------------------------------------------------------------

    def script(self, *lines: str) -> None:
        """Give it rules and commands; all are in force, or none and FaultFsError is raised."""
        text = "\n".join(lines)
        parse(text)
        descriptor = os.open(self.control, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, text.encode())
        except OSError as error:
            if error.errno != errno_names.EINVAL:
                raise
            raise FaultFsError(self.report()["error"]) from error
        finally:
            os.close(descriptor)

    def report(self) -> dict[str, Any]:
        """What the control file shows: `rules`, `open`, `unsynced`, `stuck`, `seen`, …"""
        found: dict[str, Any] = json.loads(self.control.read_bytes())
        return found

    def status(self) -> dict[str, Any]:
        """`seen`: operations by name; `hits`: per rule; `hanging`: how many wait."""
        found = self.report()
        found["hits"] = [rule["hits"] for rule in found["rules"]]
        return found

    def add(self, verb: str, path: str, *operations: str, **options: Any) -> None:
        """A rule: `skip`, `count` or `times`, `every`, `range`, and those of the verb.

        A `range` is what the language takes ("bat", "cluster:3", "0-64") or a pair of offsets.
        """
        unknown = set(operations) - OPERATIONS - {"*"}
        assert not unknown, f"faultfs knows no {unknown}"
        options["count"] = options.pop("times", None) or options.get("count")
        words = [verb, shlex.quote(path), *([",".join(operations)] if operations else [])]
        for name, value in options.items():
            if value is True:
                words.append(name)
            elif value is not None and value is not False:
                words.append(f"{name}={_text(name, value)}")
        self.script(" ".join(words))

    def fail(self, path: str, *operations: str, errno: int, **when: Any) -> None:
        """Fail with `errno`: until cleared, or as `skip`, `times`, `every` and `range` say.

        `stick=True` lets the error stick to the inode, `lose=True` drops what is not synced, and
        `late=S` answers S seconds after that.
        """
        self.add("fail", path, *operations, errno=errno, **when)

    def delay(self, path: str, *operations: str, seconds: float, **when: Any) -> None:
        self.add("delay", path, *operations, seconds=seconds, **when)

    def hang(self, path: str, *operations: str, **when: Any) -> None:
        """Operations do not return before `clear` or `release`; with `errno` they fail then."""
        self.add("hang", path, *operations, **when)

    def short(self, path: str, *operations: str, length: int, **when: Any) -> None:
        """Reads or writes of at most `length` bytes."""
        self.add("short", path, *operations, bytes=length, **when)

    def cache(self, path: str, *, lie: bool = False) -> None:
        """Acknowledge writes and keep them in memory until an fsync, or for ever if it lies."""
        self.add("cache", path, fsync="lie" if lie else "honest")

    def lose(self, path: str = "*", *, keep: float = 0.0, seed: int = 0) -> None:
        """Drop what is not synced, but for the share `keep` of its pages."""
        self.script(f"lose {shlex.quote(path)} keep={keep} seed={seed}")

    def sync(self, path: str = "*") -> None:
        """Write what is not synced."""
        self.script(f"sync {shlex.quote(path)}")

    def dead(self, errno: int = errno_names.ENOTCONN, *, unsynced: int = 0) -> None:
        """Everything fails, on every path, until `alive`; what hangs fails now.

        With `unsynced` it dies after the write that leaves so many bytes not synced.
        """
        self.script(f"dead {errno_names.errorcode[errno]} unsynced={unsynced}")

    def alive(self) -> None:
        self.script("alive")

    def clear(self) -> None:
        """Drop all rules; what hangs goes on.  What is not synced, and what sticks, stays."""
        self.script("alive", "clear")

    def release(self) -> None:
        """What hangs goes on; the rules stay."""
        self.script("release")


def _text(name: str, value: Any) -> str:
    if name == "errno":
        return errno_names.errorcode[value]
    if isinstance(value, tuple | range):
        start, stop = (value.start, value.stop) if isinstance(value, range) else value
        return f"{start}-{'' if stop is None else stop}"
    return str(value)
