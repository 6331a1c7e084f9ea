"""Namespaces of their own for storage that is cut off: nothing of it is on the host, nothing stays.

`command_inside` starts a program as the first process of new mount, network and process namespaces.
When it ends the kernel ends every other process in them, unmounts what they mounted and removes
their links.  Inside, a `Link` leads to a second network namespace, the storage's side.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from enum import Enum
from types import TracebackType

CLIENT, SERVER = "10.77.0.2", "10.77.0.1"
"""Addresses of the two ends of a link."""

_CLIENT_END, _SERVER_END = "client0", "server0"
_PROGRAMS = (
    ("unshare", "util-linux"),
    ("nsenter", "util-linux"),
    ("setpriv", "util-linux"),
    ("ip", "iproute2"),
)
_ISOLATE = ("--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")


class Cut(Enum):
    """How a link fails.

    CABLE: the other side is gone, packets vanish.  INTERFACE: our own side goes down, and with it
    the routes, so that whoever sends is told at once.
    """

    CABLE = "cable"
    INTERFACE = "interface"


def missing_for_namespaces() -> str | None:
    """What keeps this user from making such namespaces."""
    for program, package in _PROGRAMS:
        if shutil.which(program) is None:
            return f"{program} is not installed: apt-get install {package}"
    if os.geteuid() != 0:
        return "namespaces with a network of their own need root"
    probe = subprocess.run(command_inside(["true"]), capture_output=True, check=False)
    return None if probe.returncode == 0 else f"unshare: {probe.stderr.decode().strip()}"


def command_inside(command: Sequence[str]) -> list[str]:
    """`command` in new namespaces, which end with it; they end also with whoever started it."""
    return ["setpriv", "--pdeathsig", "KILL", "unshare", *_ISOLATE, *command]


class Link:
    """A veth pair to a network namespace in which the storage's servers run; a context manager.

    Use it inside `command_inside` only: the interfaces have fixed names and addresses.
    """

    def __init__(self) -> None:
        self._holder: subprocess.Popen[bytes] | None = None
        self._cut: Cut | None = None

    def __enter__(self) -> Link:
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        own = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{self._holder.pid}/ns/net") == own:
            time.sleep(0.01)
        ip("link", "set", "lo", "up")
        ip("link", "add", _CLIENT_END, "type", "veth", "peer", "name", _SERVER_END)
        ip("link", "set", _SERVER_END, "netns", str(self._holder.pid))
        ip("address", "add", f"{CLIENT}/24", "dev", _CLIENT_END)
        ip("link", "set", _CLIENT_END, "up")
        for arguments in (
            ("link", "set", "lo", "up"),
            ("address", "add", f"{SERVER}/24", "dev", _SERVER_END),
            ("link", "set", _SERVER_END, "up"),
        ):
            run(*self.inside("ip", *arguments))
        return self

    def inside(self, *command: str) -> list[str]:
        """`command` in the network namespace on the other side; mounts are the same."""
        assert self._holder is not None
        return ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net", *command]

    def cut(self, how: Cut) -> None:
        self._cut = how
        self._set("down")

    def restore(self) -> None:
        if self._cut is not None:
            self._set("up")
            self._cut = None

    def _set(self, state: str) -> None:
        if self._cut is Cut.INTERFACE:
            ip("link", "set", _CLIENT_END, state)
        else:
            run(*self.inside("ip", "link", "set", _SERVER_END, state))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._holder is not None
        self._holder.kill()
        self._holder.wait()


def ip(*arguments: str) -> None:
    """ip(8), in our own network namespace."""
    run("ip", *arguments)


def run(*command: str, timeout: float = 60.0) -> str:
    """The stdout of a command; RuntimeError with what it printed when it fails."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if result.returncode:
        text = f"{result.stdout.strip()} {result.stderr.strip()}".strip()
        raise RuntimeError(f"{' '.join(command)} ended with {result.returncode}: {text}")
    return result.stdout
