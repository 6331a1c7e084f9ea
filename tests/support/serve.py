"""`ploopd serve` as a separate process: what users start, seen from outside."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

URL = re.compile(r"iscsi://(?P<host>\[[^]]+\]|[^:/]+):(?P<port>\d+)/(?P<iqn>[^/\s]+)/(?P<lun>\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedUrl:
    """One LUN that `ploopd serve` announced."""

    host: str
    port: int
    iqn: str
    lun: int

    def __str__(self) -> str:
        return f"iscsi://{self.host}:{self.port}/{self.iqn}/{self.lun}"

    @property
    def portal(self) -> str:
        """The URL that iscsi-ls takes."""
        return f"iscsi://{self.host}:{self.port}"

    def with_credentials(self, user: str, password: str) -> str:
        """libiscsi's form for CHAP."""
        return f"iscsi://{user}%{password}@{self.host}:{self.port}/{self.iqn}/{self.lun}"


class ServeError(Exception):
    """ploopd did not get ready; carries its exit code and what it wrote to stderr."""

    def __init__(self, message: str, returncode: int | None, stderr: str) -> None:
        super().__init__(f"{message}: exit code {returncode}, stderr: {stderr.strip()}")
        self.returncode = returncode
        self.stderr = stderr


class ServeProcess:
    """A running `ploopd serve IMAGE…`; a context manager that stops it.

    `directory` holds the control socket and the log.  `start` waits for one URL line per image and
    raises `ServeError` if the process ends before or takes longer than `timeout`.
    """

    def __init__(
        self,
        *images: str | os.PathLike[str],
        directory: Path,
        options: tuple[str, ...] = (),
        portal: str = "127.0.0.1:0",
        env: dict[str, str] | None = None,
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.images = [os.fspath(image) for image in images]
        self.directory = directory
        self.options = list(options)
        self.portal = portal
        self.env = env or {}
        self.prefix = list(prefix)
        # A Unix socket's path has at most 107 bytes, and pytest's directories are long.
        self.control = Path(tempfile.mkdtemp(prefix="ploopd-test.")) / "control.sock"
        self.log = directory / f"serve-{self.control.parent.name[12:]}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.urls: list[ServedUrl] = []

    def command(self) -> list[str]:
        serve = [*self.prefix, sys.executable, "-m", "ploopd.cli.ploopd", "serve"]
        portal = ["--portal", self.portal, "--control", str(self.control)]
        return [*serve, *portal, *self.options, *self.images]

    def start(self, timeout: float = 30.0) -> ServeProcess:
        self.urls = []
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | self.env,
            )
        deadline = time.monotonic() + timeout
        pending = b""
        while len(self.urls) < len(self.images):
            pending += self._read_stdout(deadline)
            *lines, pending = pending.split(b"\n")
            for line in lines:
                match = URL.match(line.decode())
                if match is not None:
                    self.urls.append(
                        ServedUrl(
                            host=match["host"],
                            port=int(match["port"]),
                            iqn=match["iqn"],
                            lun=int(match["lun"]),
                        )
                    )
        return self

    def _read_stdout(self, deadline: float) -> bytes:
        process = self.process
        assert process is not None
        assert process.stdout is not None
        left = deadline - time.monotonic()
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, left))
        data = os.read(process.stdout.fileno(), 65536) if ready else b""
        if data:
            return data
        if not ready:
            process.kill()
        code = process.wait(20)
        process.stdout.close()
        self.process = None
        raise ServeError("ended early" if ready else "is not ready in time", code, self.stderr)

    @property
    def url(self) -> ServedUrl:
        """The first LUN."""
        return self.urls[0]

    @property
    def stderr(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def logged(self, text: str, timeout: float = 10.0) -> bool:
        """Whether its log has `text`, now or soon: a thread of its own writes the log."""
        deadline = time.monotonic() + timeout
        while text not in self.stderr:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def stop(self, timeout: float = 30.0) -> int:
        """SIGTERM and wait; returns the exit code.  Kills after `timeout` and raises."""
        process = self.process
        assert process is not None
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self._forget()
        return code

    def kill(self) -> None:
        """SIGKILL: no chance to flush, close or unlock anything."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self._forget()

    def restart(self, timeout: float = 30.0) -> ServeProcess:
        """Start again on the same port, so that URLs stay valid."""
        if self.urls:
            self.portal = f"{self.urls[0].host}:{self.urls[0].port}"
        return self.start(timeout)

    def _forget(self) -> None:
        if self.process is not None and self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None

    def ctl(
        self, *arguments: str, timeout: float = 30.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run `ploopctl --control … ARGUMENTS`."""
        command = [sys.executable, "-m", "ploopd.cli.ploopctl", "--control", str(self.control)]
        result = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and result.returncode:
            raise AssertionError(
                f"ploopctl {' '.join(arguments)} ended with {result.returncode}: "
                f"{result.stderr.strip()}\nploopd wrote: {self.stderr[-2000:]}"
            )
        return result

    def ctl_json(self, *arguments: str) -> Any:
        return json.loads(self.ctl(*arguments, "--output", "json").stdout)

    def standby(self, device: str) -> str:
        """The state string of a device: "on", "off" or "not supported"."""
        return self.ctl("device", "standby", device, "show").stdout.strip()

    def device_names(self) -> list[str]:
        """The names of the devices, in the order of the LUNs."""
        return [row["name"] for row in self.ctl_json("device", "list")]

    def memory_mib(self) -> float:
        """Resident memory of the process (proc(5): VmRSS)."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise AssertionError("no VmRSS")

    def __enter__(self) -> ServeProcess:
        if self.process is None:
            self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process is not None:
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                if kind is None:
                    raise
        self.control.unlink(missing_ok=True)
        self.control.parent.rmdir()
