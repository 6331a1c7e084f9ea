"""The targetcli of PyPI, another generation than Debian's, typed into as by a user."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.guest import kernel_target
from tests.kernel.guest.kernel_target import CONFIGFS, backstores
from tests.kernel.guest.run import sh, wait_until
from tests.support import images
from tests.support.images import MIB
from tests.support.serve import ServeProcess

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(120)]

PROGRAMS = Path(sys.prefix, "targetcli/bin")
PLOOP = "/backstores/user:ploop"
LOOPS = ("naa.5001405000000001", "naa.5001405000000002")
SAVED = Path("/etc/target/saveconfig.json")


@pytest.fixture
def server(kernel: None, bus: None, scratch: Path) -> Iterator[ServeProcess]:
    if not (PROGRAMS / "targetcli").exists():
        pytest.skip("NOT TESTED WITH PYPI'S TARGETCLI: make setup says why it is not there")
    SAVED.parent.mkdir(exist_ok=True)
    SAVED.unlink(missing_ok=True)
    web = images.write_delta(scratch / "web.hds", 64 * MIB, {})
    with kernel_target.serve(web, directory=scratch) as server:
        wait_until(lambda: "dbus-name" in server.stderr, "the name on the bus")
        yield server
        kernel_target.clear()
        assert server.stop() == 0, server.stderr


def targetcli(*lines: str) -> str:
    """One session: what is typed into targetcli, and what it says."""
    done = subprocess.run(
        [PROGRAMS / "targetcli"],
        input="\n".join((*lines, "exit\n")),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)


def first_byte(disk: Path) -> bytes:
    sh("blockdev", "--flushbufs", disk)
    with disk.open("rb") as file:
        return file.read(1)


def test_from_create_to_restore(server: ServeProcess, scratch: Path) -> None:
    old = images.write_delta(scratch / "old.hds", 16 * MIB, {0: b"\x01" * MIB})
    new = images.write_delta(scratch / "new.hds", 16 * MIB, {0: b"\x02" * MIB})
    said = targetcli(
        f"{PLOOP} help create",
        f"{PLOOP} create name=bad size=64M cfgstring=mail",
        f"{PLOOP} create name=bad size=64M cfgstring=/nowhere/disk.hds",
        f"{PLOOP} create name=web size=64M cfgstring=web",
        f"{PLOOP} create name=medium size=16M cfgstring={old}",
        f"{PLOOP}/web info",
        f"/loopback create {LOOPS[0]}",
        f"/loopback/{LOOPS[0]}/luns create {PLOOP}/medium",
        "/ ls / 3",
    )
    for expected in (
        "absolute path",
        "there are: web",
        "/nowhere/disk.hds: no such file or directory",
        "Created user-backed storage object web size 67108864.",
        "Created user-backed storage object medium size 16777216.",
        "config: ploop/web",
        "web (64.0MiB) deactivated",
        f"{old} (16.0MiB) activated",
    ):
        assert expected in said, said
    assert backstores() == ["medium", "web"]
    disk = kernel_target.wait_for_loop_disk()
    assert first_byte(disk) == b"\x01"
    said = targetcli(
        f"{PLOOP} changemedium name=medium size=32M cfgstring={new}",
        f"{PLOOP} changemedium name=medium size=16M cfgstring={new}",
        f"/loopback create {LOOPS[1]}",
        f"/loopback/{LOOPS[1]}/luns create {PLOOP}/web",
    )
    assert "keeps its size" in said
    assert "Medium Changed" in said
    assert "Created LUN 0" in said
    assert first_byte(disk) == b"\x02"
    saved = json.loads(SAVED.read_text())  # at the exit
    assert {each["config"] for each in saved["storage_objects"]} == {"ploop/web", f"ploop/{old}"}
    check_restoring(server)


def check_restoring(server: ServeProcess) -> None:
    """By targetctl, which comes with rtslib, and by targetcli."""
    sh(PROGRAMS / "targetctl", "clear")
    assert backstores() == []
    assert sh(PROGRAMS / "targetctl", "restore") == "", server.stderr
    assert backstores() == ["medium", "web"]
    wait_until(lambda: len(kernel_target.loop_disks()) == 2, "both disks")
    for disk in kernel_target.loop_disks():
        sh("dd", "if=/dev/urandom", f"of={disk}", "bs=64k", "count=16", "oflag=direct")
    said = targetcli(
        "restoreconfig clear_existing=True",
        f"{PLOOP} ls",
        f"{PLOOP} delete medium",
        f"{PLOOP} delete web",
    )
    assert "Configuration restored from /etc/target/saveconfig.json" in said
    assert "web (64.0MiB) activated" in said
    assert "Deleted storage object medium" in said
    assert backstores() == []
    assert not list((CONFIGFS / "core").glob("user_*/*/enable"))
