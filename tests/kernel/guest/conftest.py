"""Fixtures inside the guest: open-iscsi, and images on /scratch."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kernel.conftest import IN_GUEST
from tests.kernel.guest import kernel_target
from tests.kernel.guest.run import can_be_opened, sh, wait_until
from tests.support.serve import ServedUrl

ROOT = Path(__file__).resolve().parents[3]
INITIATOR_NAME = "iqn.2026-01.org.ploopd:guest"


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
            return bool(found) and can_be_opened(found[0])

        wait_until(disk_is_there, f"the disk of {url}")
        return found[0]

    def _disks(self, url: ServedUrl) -> list[str]:
        return self.disks(url.iqn, str(url.lun))

    def disks(self, iqn: str, lun: str = "*") -> list[str]:
        """The names of a target's disks, of one LUN or of all."""
        names = []
        for session in Path("/sys/class/iscsi_session").glob("session*"):
            if (session / "targetname").read_text().strip() == iqn:
                blocks = (session / "device").glob(f"target*/*:{lun}/block/*")
                names += [block.name for block in blocks]
        return names

    def forget(self, url: ServedUrl) -> None:
        """End the session of a target that may not be there any more."""
        sh("iscsiadm", "-m", "node", "-T", url.iqn, "--logout", check=False)
        wait_until(lambda: not self.disks(url.iqn), "the disks going away")
        sh("iscsiadm", "-m", "node", "-T", url.iqn, "-o", "delete", check=False)

    def logout(self, url: ServedUrl) -> None:
        self._node(url, "--logout")
        wait_until(lambda: not self._disks(url), "the disk going away")

    def update(self, url: ServedUrl, key: str, value: str) -> None:
        self._node(url, "-o", "update", "-n", key, "-v", value)

    def _node(self, url: ServedUrl, *arguments: str) -> str:
        portal = f"{url.host}:{url.port}"
        return sh("iscsiadm", "-m", "node", "-T", url.iqn, "-p", portal, *arguments)


def start_initiator() -> OpenIscsi:
    """Load the modules and start iscsid, which Debian would have systemd do."""
    sh("modprobe", "-a", "iscsi_tcp", "sd_mod", "loop")
    Path("/run/lock/iscsi").mkdir(parents=True, exist_ok=True)
    # Nothing of this machine's configuration; the host may keep it from all but its root, too.
    sh("mount", "-t", "tmpfs", "iscsi", "/etc/iscsi")
    Path("/etc/iscsi/initiatorname.iscsi").write_text(f"InitiatorName={INITIATOR_NAME}\n")
    Path("/etc/iscsi/iscsid.conf").write_text("node.startup = manual\n")
    sh("iscsid")
    return OpenIscsi()


@pytest.fixture(scope="session")
def initiator() -> OpenIscsi:
    if not IN_GUEST:
        pytest.skip("changes the machine it runs on, which is to be the guest: make kernel")
    return start_initiator()


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


@pytest.fixture(scope="session", autouse=True)
def nothing_hangs() -> Iterator[None]:
    """At the end of the guest's life no process is in uninterruptible sleep."""
    yield
    if IN_GUEST:
        kernel_target.assert_nothing_is_stuck()


@pytest.fixture(scope="session")
def lio() -> None:
    """The kernel's target is loaded, and Debian's targetcli is there."""
    if not IN_GUEST:
        pytest.skip("changes the machine it runs on, which is to be the guest: make kernel")
    kernel_target.require_tools()
    kernel_target.start_kernel_target()


@pytest.fixture
def kernel(lio: None) -> Iterator[None]:
    """The kernel's target, empty, and nothing of it left afterwards, nor of who used it."""
    yield
    if any(Path("/sys/class/iscsi_session").glob("session*")):  # of a test that has failed
        sh("iscsiadm", "-m", "node", "--logoutall=all", check=False)
    kernel_target.clear()
    kernel_target.assert_nothing_is_stuck()


@pytest.fixture(scope="session")
def bus(lio: None) -> Iterator[None]:
    """The system bus, with ploopd's policy and nobody else's."""
    policies = Path("/usr/share/dbus-1/system.d")
    for directory in (policies, Path("/etc/dbus-1/system.d")):
        if directory.is_dir():
            sh("mount", "-t", "tmpfs", "policies", directory)
    policies.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "systemd/ploopd-dbus.conf", policies / "ploopd.conf")
    Path("/run/dbus").mkdir(exist_ok=True)
    sh("dbus-uuidgen", "--ensure")
    daemon = subprocess.Popen(["dbus-daemon", "--system", "--nofork", "--nopidfile"])
    wait_until(Path("/run/dbus/system_bus_socket").exists, "the system bus")
    yield
    daemon.terminate()
    daemon.wait(20)
