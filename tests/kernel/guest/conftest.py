"""Fixtures inside the guest: open-iscsi, and images on /scratch."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kernel.conftest import IN_GUEST
from tests.support.serve import ServedUrl

INITIATOR_NAME = "iqn.2026-01.org.ploopd:guest"


def sh(*command: str | Path, timeout: float = 90, check: bool = True) -> str:
    """Run a command; its output is in the error message when it fails."""
    result = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and result.returncode:
        line = " ".join(str(word) for word in command)
        raise AssertionError(f"{line}: exit code {result.returncode}\n{result.stdout}")
    return result.stdout


def wait_until(condition: object, what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    assert callable(condition)
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


@dataclass(frozen=True, slots=True)
class OpenIscsi:
    """The kernel's initiator, driven by iscsiadm."""

    def discover(self, url: ServedUrl) -> str:
        return sh("iscsiadm", "-m", "discovery", "-t", "st", "-p", f"{url.host}:{url.port}")

    def login(self, url: ServedUrl) -> Path:
        """Log in and return the disk of the URL's LUN."""
        self._node(url, "--login")
        found: list[Path] = []

        def disk_is_there() -> bool:
            found[:] = [Path("/dev") / name for name in self._disks(url)]
            return bool(found) and found[0].exists()

        wait_until(disk_is_there, f"the disk of {url}")
        return found[0]

    def _disks(self, url: ServedUrl) -> list[str]:
        names = []
        for session in Path("/sys/class/iscsi_session").glob("session*"):
            if (session / "targetname").read_text().strip() == url.iqn:
                blocks = (session / "device").glob(f"target*/*:{url.lun}/block/*")
                names += [block.name for block in blocks]
        return names

    def logout(self, url: ServedUrl) -> None:
        self._node(url, "--logout")
        wait_until(lambda: not self._disks(url), "the disk going away")

    def update(self, url: ServedUrl, key: str, value: str) -> None:
        self._node(url, "-o", "update", "-n", key, "-v", value)

    def _node(self, url: ServedUrl, *arguments: str) -> str:
        portal = f"{url.host}:{url.port}"
        return sh("iscsiadm", "-m", "node", "-T", url.iqn, "-p", portal, *arguments)


@pytest.fixture(scope="session")
def initiator() -> OpenIscsi:
    """Load the modules and start iscsid, which Debian would have systemd do."""
    if not IN_GUEST:
        pytest.skip("changes the machine it runs on, which is to be the guest: make kernel")
    sh("modprobe", "-a", "iscsi_tcp", "sd_mod", "loop")
    Path("/run/lock/iscsi").mkdir(parents=True, exist_ok=True)
    # Nothing of this machine's configuration; the host may keep it from all but its root, too.
    sh("mount", "-t", "tmpfs", "iscsi", "/etc/iscsi")
    Path("/etc/iscsi/initiatorname.iscsi").write_text(f"InitiatorName={INITIATOR_NAME}\n")
    Path("/etc/iscsi/iscsid.conf").write_text("node.startup = manual\n")
    sh("iscsid")
    return OpenIscsi()


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory on a real ext4."""
    directory = Path(tempfile.mkdtemp(dir="/scratch"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def mountpoint() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="mnt."))
    yield directory
    if directory.is_mount():
        sh("umount", directory, check=False)
    directory.rmdir()
