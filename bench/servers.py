"""The servers that are compared, each started and stopped as its own process on free ports."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

IQN = "iqn.2026-01.org.ploopd:bench"
START_TIMEOUT = 30.0
TUNED = {
    "MaxRecvDataSegmentLength": "262144",
    "MaxXmitDataSegmentLength": "262144",
    "FirstBurstLength": "262144",
    "MaxBurstLength": "262144",
    "InitialR2T": "No",
    "MaxOutstandingR2T": "1",
}


class StartError(Exception):
    """A server cannot be started here; the text says why and what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a started server answers: `name` is an IQN or an NBD export's name."""

    protocol: str
    host: str
    port: int
    name: str
    lun: int = 0

    def generator_arguments(self) -> list[str]:
        return [self.protocol, self.host, str(self.port), self.name, str(self.lun)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """The same content as a raw file and as ploop images (one for each server that locks it)."""

    raw: Path
    ploop: Path
    ploop_peer: Path


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when something listens; raises StartError when the process ends first."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StartError(f"ended with {process.returncode}: {log.read_text()[-400:].strip()}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise StartError(f"does not listen after {START_TIMEOUT:.0f} s: {log.read_text()[-400:]}")


class Server:
    """A server process: `start` and `stop`, once each.  `version` is set by `start`."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.directory = directory
        self.log = directory / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.description = ""

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> Endpoint:
        raise StartError("has no start")

    def spawn(self, command: list[str], *, stdout: int | IO[bytes], env: dict[str, str]) -> None:
        self.description = " ".join(command)
        with self.log.open("wb") as log:
            try:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log if stdout == subprocess.STDOUT else stdout,
                    stderr=log,
                    env=os.environ | env,
                )
            except FileNotFoundError as error:
                raise StartError(f"{command[0]} is not installed") from error

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None


class Ploopd(Server):
    """`ploopd serve` on the ploop image."""

    def __init__(self, name: str, directory: Path, image: Path, options: list[str]) -> None:
        super().__init__(name, directory)
        self.image = image
        self.options = options

    def start(self) -> Endpoint:
        control = self.directory / f"{self.name}.sock"
        command = [sys.executable, "-m", "ploopd.cli.ploopd", "serve", "--portal", "127.0.0.1:0"]
        command += ["--control", str(control), *self.options, str(self.image)]
        self.spawn(command, stdout=subprocess.PIPE, env={})
        assert self.process is not None
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], START_TIMEOUT)
        line = self.process.stdout.readline().decode() if ready else ""
        match = re.match(r"iscsi://(.+):(\d+)/([^/]+)/(\d+)", line)
        if match is None:
            raise StartError(f"printed no URL: {line!r} {self.log.read_text()[-400:].strip()}")
        return Endpoint(
            protocol="iscsi",
            host=match[1],
            port=int(match[2]),
            name=match[3],
            lun=int(match[4]),
        )


class Tgtd(Server):
    """Debian's tgtd on the raw file; `tuned` raises its bursts and asks for InitialR2T=No."""

    def __init__(
        self, name: str, directory: Path, image: Path, *, tuned: bool, direct: bool
    ) -> None:
        super().__init__(name, directory)
        self.image = image
        self.tuned = tuned
        self.direct = direct
        self.control = free_port() % 32000  # tgtd's -C: a number that nobody else uses

    def start(self) -> Endpoint:
        port = free_port()
        program = shutil.which("tgtd", path=os.environ.get("PATH", "") + ":/usr/sbin")
        if program is None:
            raise StartError("tgtd is not installed: apt-get install tgt")
        command = [program, "-f", "-C", str(self.control), "--iscsi", f"portal=127.0.0.1:{port}"]
        self.spawn(command, stdout=subprocess.STDOUT, env=self._environment())
        assert self.process is not None
        wait_for_port(port, self.process, self.log)
        self._configure()
        return Endpoint(protocol="iscsi", host="127.0.0.1", port=port, name=IQN, lun=1)

    def _environment(self) -> dict[str, str]:
        return {"TGT_IPC_SOCKET": str(self.directory / f"tgtd.{self.control}")}

    def _configure(self) -> None:
        self._admin("new", "target", "-T", IQN)
        unit = ["--lun", "1", "-b", str(self.image)]
        if self.direct:
            unit += ["--bsoflags", "direct"]
        self._admin("new", "logicalunit", *unit)
        self._admin("bind", "target", "-I", "ALL")
        for key, value in TUNED.items() if self.tuned else ():
            self._admin("update", "target", "--name", key, "--value", value)

    def _admin(self, operation: str, mode: str, *arguments: str) -> None:
        program = shutil.which("tgtadm", path=os.environ.get("PATH", "") + ":/usr/sbin")
        if program is None:
            raise StartError("tgtadm is not installed: apt-get install tgt")
        command = [program, "-C", str(self.control), "--lld", "iscsi", "--op", operation]
        command += ["--mode", mode, "--tid", "1", *arguments]
        for _ in range(50):
            result = subprocess.run(
                command,
                check=False,
                capture_output=True,
                text=True,
                env=os.environ | self._environment(),
            )
            if result.returncode == 0:
                return
            if "connect" not in result.stderr:
                break
            time.sleep(0.1)  # the control socket appears a little after the portal
        raise StartError(f"{' '.join(command)}: {result.stderr.strip()}")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()  # tgtd ignores SIGTERM while a target exists
        super().stop()


class QemuStorageDaemon(Server):
    """qemu-storage-daemon's parallels driver, exported over NBD on loopback TCP."""

    def __init__(self, name: str, directory: Path, image: Path, *, direct: bool) -> None:
        super().__init__(name, directory)
        self.image = image
        self.direct = direct

    def start(self) -> Endpoint:
        port = free_port()
        engine = "aio=native,cache.direct=on" if self.direct else "aio=threads,cache.direct=off"
        command = [
            "qemu-storage-daemon",
            "--blockdev",
            f"driver=file,node-name=f,filename={self.image},{engine}",
            "--blockdev",
            "driver=parallels,node-name=d,file=f",
            "--nbd-server",
            f"addr.type=inet,addr.host=127.0.0.1,addr.port={port}",
            "--export",
            "type=nbd,id=e,node-name=d,name=disk,writable=on",
        ]
        self.spawn(command, stdout=subprocess.STDOUT, env={})
        assert self.process is not None
        wait_for_port(port, self.process, self.log)
        return Endpoint(protocol="nbd", host="127.0.0.1", port=port, name="disk", lun=0)


Maker = Callable[[Path, Images], Server]

TMPFS_SERVERS: dict[str, Maker] = {
    "ploopd": lambda d, i: Ploopd("ploopd", d, i.ploop, []),
    "tgtd": lambda d, i: Tgtd("tgtd", d, i.raw, tuned=False, direct=False),
    "tgtd-tuned": lambda d, i: Tgtd("tgtd-tuned", d, i.raw, tuned=True, direct=False),
    "qsd": lambda d, i: QemuStorageDaemon("qsd", d, i.ploop_peer, direct=False),
    "ploopd-standby-off": lambda d, i: Ploopd(
        "ploopd-standby-off", d, i.ploop_peer, ["--standby", "off"]
    ),
    "ploopd-journal": lambda d, i: Ploopd("ploopd-journal", d, i.ploop_peer, ["--journal", "on"]),
}
DISK_SERVERS: dict[str, Maker] = {
    "ploopd": lambda d, i: Ploopd("ploopd", d, i.ploop, ["--cache", "none"]),
    "tgtd-direct": lambda d, i: Tgtd("tgtd-direct", d, i.raw, tuned=True, direct=True),
    "qsd": lambda d, i: QemuStorageDaemon("qsd", d, i.ploop_peer, direct=True),
}
DEFAULT_SERVERS = ("ploopd", "tgtd", "tgtd-tuned", "tgtd-direct", "qsd")
