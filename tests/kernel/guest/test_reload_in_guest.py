"""A daemon reads its configuration again under the kernel's initiator and the kernel's target."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.functional.test_run_service import RunProcess
from tests.kernel.guest.conftest import OpenIscsi
from tests.kernel.guest.kernel_target import backstores, targets
from tests.kernel.guest.run import sh, wait_until
from tests.support import images, oracles
from tests.support.images import MIB

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(120)]

SIZE = 128 * MIB


def write_config(server: RunProcess, *devices: Path, lio: bool = False) -> None:
    tables = "".join(f'[[device]]\nimage = "{path}"\n' for path in devices)
    portals = 'portals = ["127.0.0.1:0"]' if not lio else ""
    (server.directory / "ploopd.toml").write_text(
        f'[daemon]\ncontrol = "{server.control}"\n[iscsi]\n{portals}\n'
        f"[lio]\nserve = {str(lio).lower()}\n{tables}"
    )


def test_disks_come_and_go_beside_a_mounted_one(
    initiator: OpenIscsi, scratch: Path, mountpoint: Path
) -> None:
    """ext4 on LUN 0 is written to all the time; LUN 1 goes, LUN 2 is there after a scan."""
    a, b, c = (images.write_delta(scratch / f"{n}.hds", SIZE, {}) for n in "abc")
    server = RunProcess(a, b, directory=scratch)
    write_config(server, a, b)
    with server:
        first, second = server.urls
        third = replace(first, lun=2)
        initiator.discover(first)
        disk = initiator.login(first)
        wait_until(lambda: len(initiator.disks(first.iqn)) == 2, "both disks")
        (gone,) = initiator.disks(first.iqn, str(second.lun))
        sh("mkfs.ext4", "-q", disk)
        sh("mount", disk, mountpoint)
        write = f"dd if=/dev/urandom of={mountpoint}/load$i bs=64k count=16 conv=fsync"
        load = subprocess.Popen(["bash", "-ec", f"for i in $(seq 20); do {write}; done"])
        write_config(server, a, c)
        assert server.ctl("reload").stdout == "added: c\nremoved: b\nafter the next start: c.lun\n"
        assert load.poll() is None, "the load has ended before the reload"
        assert load.wait(60) == 0
        # The initiator has not been asked; whoever reads the disk that is gone gets an error.
        assert "error" in sh("dd", f"if=/dev/{gone}", "of=/dev/null", "iflag=direct", check=False)
        sh("iscsiadm", "-m", "session", "--rescan")
        wait_until(lambda: bool(initiator.disks(third.iqn, "2")), "the new disk")
        (new,) = initiator.disks(third.iqn, "2")
        wait_until(Path("/dev", new).exists, "its node")
        sh("dd", "if=/dev/urandom", f"of=/dev/{new}", "bs=1M", "count=4", "oflag=direct")
        sh("umount", mountpoint)
        sh("e2fsck", "-f", "-n", disk)
        initiator.logout(first)
        assert server.stop() == 0, server.stderr
    for image in (a, b, c):
        assert oracles.bat_problems(image) == []
        assert oracles.in_use_word(image) == 0


def test_a_device_of_the_kernels_target_stays(
    bus: None, lio: None, kernel: None, scratch: Path
) -> None:
    a, b = (images.write_delta(scratch / f"{n}.hds", SIZE, {}) for n in "ab")
    server = RunProcess(a, b, directory=scratch)
    write_config(server, a, b, lio=True)
    server.images = []  # it listens nowhere, so no line begins with a URL
    with server:
        wait_until(lambda: server.ctl("info", check=False).returncode == 0, "the daemon")
        server.ctl("lio", "export", "b", "--iqn", "iqn.2026-01.org.example:disks")
        write_config(server, a, lio=True)
        result = server.ctl("reload", check=False)
        assert result.returncode == 6
        assert "not done: b: backstores of the kernel's target use it: 1" in result.stdout
        server.ctl("lio", "unexport", "b")
        wait_until(lambda: server.ctl("reload", check=False).stdout == "removed: b\n", "b's end")
        assert (backstores(), targets()) == ([], [])
        assert server.stop() == 0, server.stderr
