"""MooseFS and GlusterFS from their Debian packages, small, in namespaces of their own.

Both have their servers on the far side of a `Link` and their FUSE client on the near side.  The
clients' patience is made shorter than an administrator would, so that a cut takes seconds; what is
behind it is the same code.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from tests.torture.namespaces import SERVER, Link, run

READY = 30.0
"""Seconds that servers get to start."""


class Storage(Protocol):
    """A distributed file system, mounted at `mountpoint`.

    `programs`: (program, Debian package) that it needs.  `patience`: what was tuned.
    """

    name: str
    programs: tuple[tuple[str, str], ...]
    patience: str
    mountpoint: Path

    def __init__(self, directory: Path, link: Link) -> None: ...

    def start(self) -> None:
        """Start the servers and mount; RuntimeError or TimeoutError when that fails."""


def missing_programs(storage: type[Storage]) -> str | None:
    """Which packages are not installed."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = sorted(
        {package for program, package in storage.programs if not shutil.which(program, path=path)}
    )
    return f"not installed: apt-get install {' '.join(missing)}" if missing else None


class MooseFs:
    """A master, a chunk server and mfsmount."""

    name = "moosefs"
    programs = (
        ("mfsmaster", "moosefs-master"),
        ("mfschunkserver", "moosefs-chunkserver"),
        ("mfsmount", "moosefs-client"),
    )
    patience = "mfsioretries=5 (default 30)"
    _OPTIONS = f"mfsmaster={SERVER},mfsioretries=5"

    def __init__(self, directory: Path, link: Link) -> None:
        self.directory = directory
        self.link = link
        self.mountpoint = directory / "mnt"

    def start(self) -> None:
        base = self.directory
        for name in ("master", "chunkserver", "disk", "mnt"):
            (base / name).mkdir()
        (base / "master" / "metadata.mfs").write_bytes(b"MFSM NEW")
        (base / "exports.cfg").write_text("* / rw,alldirs,maproot=0\n")
        (base / "topology.cfg").touch()
        (base / "disks.cfg").write_text(f"{base / 'disk'}\n")
        self._server(
            "mfsmaster",
            "master",
            EXPORTS_FILENAME=base / "exports.cfg",
            TOPOLOGY_FILENAME=base / "topology.cfg",
        )
        self._server(
            "mfschunkserver",
            "chunkserver",
            HDD_CONF_FILENAME=base / "disks.cfg",
            HDD_LEAVE_SPACE_DEFAULT="64MiB",
            MASTER_HOST=SERVER,
            MASTER_RECONNECTION_DELAY=1,
        )
        until(lambda: self._mount() and self._has_room(), "a chunk server with room")

    def _server(self, program: str, place: str, **settings: object) -> None:
        common = {
            "WORKING_USER": "root",
            "WORKING_GROUP": "root",
            "DATA_PATH": self.directory / place,
            "NICE_LEVEL": 0,
        }
        file = self.directory / f"{place}.cfg"
        file.write_text("".join(f"{k} = {v}\n" for k, v in (common | settings).items()))
        with (self.directory / f"{place}.log").open("wb") as log:
            subprocess.Popen(
                self.link.inside(program, "-c", str(file), "-d", "start"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _mount(self) -> bool:
        if not os.path.ismount(self.mountpoint):
            with suppress(RuntimeError):
                run("mfsmount", "-o", self._OPTIONS, str(self.mountpoint))
        return os.path.ismount(self.mountpoint)

    def _has_room(self) -> bool:
        room = os.statvfs(self.mountpoint)
        return room.f_bavail * room.f_frsize > 0


class GlusterFs:
    """glusterd, one brick and the FUSE client with its usual translators, write-behind too.

    Without client.tcp-user-timeout writes that have failed may land seconds after the link is back:
    TCP keeps sending what was in the closed connection, and the brick executes it.
    """

    name = "glusterfs"
    programs = (
        ("glusterd", "glusterfs-server"),
        ("gluster", "glusterfs-cli"),
        ("glusterfs", "glusterfs-client"),
    )
    patience = "ping-timeout 3 s (default 42), client.tcp-user-timeout 2 s (default: none)"
    _OPTIONS = (("network.ping-timeout", "3"), ("client.tcp-user-timeout", "2"))

    def __init__(self, directory: Path, link: Link) -> None:
        self.directory = directory
        self.link = link
        self.mountpoint = directory / "mnt"

    def start(self) -> None:
        base = self.directory
        # glusterd has its places compiled in; the mount namespace is ours alone.
        for name, place in (
            ("lib", "/var/lib/glusterd"),
            ("log", "/var/log/glusterfs"),
            ("run", "/run"),
        ):
            (base / name).mkdir()
            run("mount", "--bind", str(base / name), place)
        (base / "run" / "gluster").mkdir()
        for name in ("brick", "mnt"):
            (base / name).mkdir()
        # A brick needs extended attributes, which not every temporary directory has.
        run("mount", "-t", "tmpfs", "brick", str(base / "brick"))
        (base / "glusterd.vol").write_text(_GLUSTERD)
        run(*self.link.inside("glusterd", "-f", str(base / "glusterd.vol")))
        brick = f"{SERVER}:{base / 'brick'}"
        until(lambda: self._volume("create", "disks", brick, "force"), "glusterd")
        for arguments in (*(("set", "disks", *each) for each in self._OPTIONS), ("start", "disks")):
            if not self._volume(*arguments):
                raise RuntimeError(f"gluster volume {' '.join(arguments)} fails")
        run("glusterfs", "-s", SERVER, "--volfile-id=disks", str(self.mountpoint))
        until(self._answers, "the mount")

    def _volume(self, *arguments: str) -> bool:
        with suppress(RuntimeError):
            run(*self.link.inside("gluster", "--mode=script", "volume", *arguments))
            return True
        return False

    def _answers(self) -> bool:
        with suppress(OSError):
            (self.mountpoint / "probe").write_bytes(b"1")
            (self.mountpoint / "probe").unlink()
            return os.path.ismount(self.mountpoint)
        return False


_GLUSTERD = """\
volume management
    type mgmt/glusterd
    option working-directory /var/lib/glusterd
    option transport-type socket
    option transport.socket.listen-port 24007
    option ping-timeout 0
end-volume
"""


def until(done: Callable[[], bool], what: str, seconds: float = READY) -> None:
    """Ask until `done`; TimeoutError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} is not there after {seconds:g} s")
        time.sleep(0.1)


STORAGES: dict[str, type[Storage]] = {"moosefs": MooseFs, "glusterfs": GlusterFs}
