"""What nobody ought to do to a backstore, on the real kernel: each gets one clear answer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.guest import kernel_target, scsi_generic
from tests.kernel.guest.kernel_target import TargetcliShell, backstores, link_loop, targetcli
from tests.kernel.guest.run import sh, wait_until
from tests.support import images
from tests.support.images import MIB
from tests.support.serve import ServeProcess

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(120)]

PLOOP = "/backstores/user:ploop"
CHECK_CONDITION = 2
ILLEGAL_REQUEST = 5


@pytest.fixture
def server(kernel: None, bus: None, scratch: Path) -> Iterator[ServeProcess]:
    web = images.write_delta(scratch / "web.hds", 64 * MIB, {0: b"\x5a" * MIB})
    with kernel_target.serve(web, directory=scratch) as server:
        wait_until(lambda: "dbus-name" in server.stderr, "the name on the bus")
        yield server
        kernel_target.clear()  # a disk that goes away still has commands for its handler
        assert server.stop() == 0, server.stderr


def create(shell: TargetcliShell, name: str, config: object) -> None:
    answer = shell(PLOOP, "create", f"name={name}", "size=64M", f"cfgstring={config}")
    assert "Created" in answer


def disk_of_web(wwn: str = "naa.5001405000000001") -> Path:
    """A backstore of the daemon's disk, and a disk of this machine of it."""
    with TargetcliShell() as shell:
        create(shell, "web", "web")
        link_loop(shell, "web", wwn)
    return kernel_target.wait_for_loop_disk()


def test_commands_that_make_no_sense(server: ServeProcess) -> None:
    disk = disk_of_web()
    good = scsi_generic.read(disk, 0)
    assert good == b"\x5a" * 4096
    for cdb, asc in [
        (bytes([0xF7, *range(15)]), 0x20),  # an operation code that nobody has
        (bytes([0x7F, 0, 0, 0, 0, 0, 0, 24, 0, 0x0B]) + bytes(22), 0x20),  # 32 bytes: WRITE (32)
        (bytes([0x7F, 0, 0, 0, 0, 0, 0, 24, 0xFF, 0xFF]) + bytes(22), 0x20),
        (b"\x28\0\xff\xff\xff\xff\0\0\x08\0", 0x21),  # beyond the end
    ]:
        answer = scsi_generic.execute(disk, cdb, expect=4096)
        assert (answer.status, answer.host) == (CHECK_CONDITION, 0), cdb.hex()
        assert (answer.sense[2] & 0xF, answer.sense[12]) == (ILLEGAL_REQUEST, asc), cdb.hex()
    assert scsi_generic.read(disk, 0) == good


def test_a_buffer_that_does_not_match_the_command(server: ServeProcess) -> None:
    """READ and WRITE of 4096 bytes with less or more memory for them: nobody else's bytes come
    back, and nothing is written that was not sent."""
    disk = disk_of_web()
    read = b"\x28\0\0\0\0\0\0\0\x08\0"
    for length in (512, 2048, 8192):
        before = scsi_generic.read(disk, 0)
        answer = scsi_generic.execute(disk, read, expect=length)
        assert (answer.status, answer.host) == (0, 0)
        assert answer.data[:4096] == before[:length]
        assert set(answer.data[4096:]) <= {0, 0xAA}
        sent = bytes([length >> 8]) * length
        answer = scsi_generic.execute(disk, b"\x2a" + read[1:], out=sent)
        assert answer.host == 0
        after = scsi_generic.read(disk, 0)
        assert after[length:] == before[length:]
        assert after[:length] in (before[:length], sent[:4096])
        assert scsi_generic.read(disk, 1) == b"\x5a" * 4096


def test_somebody_else_has_the_uio_device(server: ServeProcess, scratch: Path) -> None:
    assert server.stop() == 0
    (hba,) = [kernel_target.CONFIGFS / "core/user_9"]
    store = hba / "web"
    store.mkdir(parents=True)
    control = "dev_config=ploop/web,nl_reply_supported=-1"
    for text in (control, f"dev_size={64 * MIB}"):
        (store / "control").write_text(text)
    (store / "enable").write_text("1")
    (uio,) = Path("/sys/class/uio").iterdir()
    thief = os.open(f"/dev/{uio.name}", os.O_RDWR)
    try:
        server.restart()
        expected = f"/dev/{uio.name}: is open in another process"
        wait_until(lambda: expected in server.stderr, "the refusal")
        assert server.logged(f"fuser /dev/{uio.name} tells which one"), server.stderr
        (listed,) = server.ctl_json("lio", "list")["backstores"]
        assert listed["device"] is None
        assert expected in listed["error"]
    finally:
        os.close(thief)
    wait_until(lambda: "tcmu-attached uio=web" in server.stderr, "its turn", 40)
    assert scsi_generic.read(kernel_target.loop_disk("web"), 0) == b"\x5a" * 4096


def test_one_image_behind_two_backstores(server: ServeProcess, scratch: Path) -> None:
    """By its name and by its path: one disk, and what one writes the other reads."""
    with TargetcliShell() as shell:
        create(shell, "web", "web")
        create(shell, "again", scratch / "web.hds")
        assert server.device_names() == ["web"]
        link_loop(shell, "web", "naa.5001405000000001")
        link_loop(shell, "again", "naa.5001405000000002")
    wait_until(lambda: len(kernel_target.loop_disks()) == 2, "the second disk")
    one, other = kernel_target.loop_disks()
    assert scsi_generic.write(one, 7, b"\x77" * 4096).status == 0
    assert scsi_generic.read(other, 7) == b"\x77" * 4096
    identities = {sh("cat", f"/sys/block/{disk.name}/device/wwid") for disk in (one, other)}
    assert len(identities) == 1


def test_a_backstore_is_deleted_under_a_file_system(server: ServeProcess, mountpoint: Path) -> None:
    disk = disk_of_web()
    sh("mkfs.ext4", "-q", disk)
    sh("mount", disk, mountpoint)
    (mountpoint / "file").write_bytes(b"x" * MIB)
    sh("sync", "-f", mountpoint)
    assert "Deleted" in targetcli(PLOOP, "delete", "web")
    assert backstores() == []
    sh("umount", mountpoint, check=False)
    kernel_target.assert_nothing_is_stuck()
    disk = disk_of_web("naa.5001405000000002")
    sh("mount", disk, mountpoint)
    assert (mountpoint / "file").read_bytes() == b"x" * MIB
    sh("umount", mountpoint)
