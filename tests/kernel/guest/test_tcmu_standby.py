"""Standby under the kernel's target: parked, aborted, BUSY, replaced; nothing of it ever hangs."""

from __future__ import annotations

import errno
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.guest import scsi_generic
from tests.kernel.guest.conftest import OpenIscsi
from tests.kernel.guest.kernel_target import assert_nothing_is_stuck, serve
from tests.kernel.guest.run import sh, wait_until
from tests.kernel.guest.tcmu_disk import (
    Backstore,
    Load,
    backstore,
    disk_of,
    kernel_log,
    put,
    state,
    within,
)
from tests.support import images, oracles
from tests.support.faultfs import FaultFs
from tests.support.images import MIB
from tests.support.serve import ServeProcess

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(100)]

SIZE = 128 * MIB
BUSY = 8
GAVE_UP = 3
"""DID_TIME_OUT: Linux aborted the command."""

OLD, NEW = b"o" * 4096, b"n" * 4096


@pytest.fixture
def storage(kernel: None, scratch: Path) -> Iterator[FaultFs]:
    sh("modprobe", "fuse")
    missing = oracles.missing_for_fuse()
    if missing is not None:
        pytest.skip(missing)
    source = scratch / "source"
    source.mkdir()
    images.write_delta(source / "disk.hds", SIZE, {})
    with FaultFs(source, scratch / "mount") as fs:
        yield fs


@pytest.fixture(scope="module")
def park_max(request: pytest.FixtureRequest) -> int:
    """Seconds."""
    seconds: int = getattr(request, "param", 4)
    return seconds


@pytest.fixture(scope="module")
def one_daemon(lio: None, park_max: int) -> Iterator[ServeProcess]:
    """For the tests with the same `park_max`: each leaves it out of standby, and unused."""
    directory = Path(tempfile.mkdtemp(dir="/scratch"))
    image = images.write_delta(directory / "disk.hds", SIZE, {})
    with serve(image, directory=directory, options=("--park-max", str(park_max))) as process:
        yield process
    shutil.rmtree(directory)


@pytest.fixture
def daemon(one_daemon: ServeProcess, kernel: None) -> ServeProcess:
    return one_daemon


longer = pytest.mark.parametrize("park_max", [20], ids=["park_max=20"], indirect=True)
"""Than Linux waits for a command of SG_IO, 7 s at least."""


@pytest.fixture
def fabric() -> str:
    return "loop"


@pytest.fixture
def disk(daemon: ServeProcess, initiator: OpenIscsi, fabric: str) -> Iterator[Path]:
    """In standby, with OLD in its first two blocks."""
    with backstore("disk", "disk", SIZE) as made, disk_of(made, fabric, initiator) as disk:
        for block in (0, 1):
            assert scsi_generic.write(disk, block, OLD).status == 0
        enter(daemon)
        try:
            yield disk
        finally:
            leave(daemon)  # Linux flushes a disk that goes away


def enter(daemon: ServeProcess) -> None:
    daemon.ctl("device", "standby", "disk", "enter")


def leave(daemon: ServeProcess) -> None:
    daemon.ctl("device", "standby", "disk", "leave", check=False)


def parked(daemon: ServeProcess) -> int:
    count: int = daemon.ctl_json("device", "show", "disk")["parked_requests"]
    return count


def assert_never_lands(daemon: ServeProcess, disk: Path, block: int) -> None:
    leave(daemon)
    assert scsi_generic.read(disk, block) == OLD
    time.sleep(0.5)
    assert scsi_generic.read(disk, block) == OLD


@pytest.mark.parametrize(
    ("fabric", "errnos"),
    [("loop", (errno.EBUSY, errno.ENOTCONN, errno.EIO)), ("iscsi", (errno.EIO,))],
)
def test_the_storage_fails_and_is_replaced(
    fabric: str,
    errnos: tuple[int, ...],
    storage: FaultFs,
    initiator: OpenIscsi,
    scratch: Path,
) -> None:
    image = storage.mountpoint / "disk.hds"
    with (
        serve(image, directory=scratch) as daemon,
        backstore("disk", "disk", SIZE) as made,
        disk_of(made, fabric, initiator) as disk,
    ):
        log = len(kernel_log())
        load = Load(disk, scratch, "--rate=8m", size="32m")
        for number in errnos:
            storage.fail("disk.hds", "write", errno=number)
            daemon.ctl("device", "standby", "disk", "wait", "--state", "on")
            load.assert_stands_still()
            storage.clear()
            daemon.ctl("device", "replace", "disk", "--image", str(image))
            load.assert_goes_on()
        load.wait()
        assert state(disk) == "running"
        assert "reset" not in kernel_log()[log:].lower()
    assert oracles.bat_problems(storage.source / "disk.hds") == []


def test_busy_after_park_max(daemon: ServeProcess, disk: Path) -> None:
    """Linux repeats what is answered BUSY until its time is up, and then tells the last answer."""
    begin = time.monotonic()
    answer = scsi_generic.write(disk, 0, NEW, seconds=5)
    assert (answer.status, answer.host) == (BUSY, 0)
    assert 7 < time.monotonic() - begin < 20
    assert_never_lands(daemon, disk, 0)


@longer
def test_what_the_initiator_gives_up_is_dropped(daemon: ServeProcess, disk: Path) -> None:
    """ABORT TASK reaches the parked command at once: no escalation to a reset."""
    answer = scsi_generic.write(disk, 0, NEW, seconds=7)
    assert answer.host == GAVE_UP
    assert_never_lands(daemon, disk, 0)
    assert state(disk) == "running"


@longer
@pytest.mark.parametrize("fabric", ["iscsi"])
def test_a_reset_of_the_unit_drops_everything(daemon: ServeProcess, disk: Path) -> None:
    """Not over tcm_loop: it answers GOOD for what a reset has aborted."""
    waiting = [scsi_generic.Waiting(disk, block, NEW, seconds=7) for block in (0, 1)]
    wait_until(lambda: parked(daemon) == 2, "two parked writes")
    within(3, "LOGICAL UNIT RESET", lambda: scsi_generic.reset_unit(disk))
    assert parked(daemon) == 0
    for each in waiting:
        assert each.wait(20).status != 0 or each.wait(0).host != 0
    attention = scsi_generic.execute(disk, bytes(6))
    assert attention.sense[12:14] == b"\x29\x03", "the kernel tells of the reset, once"
    assert_never_lands(daemon, disk, 0)
    assert scsi_generic.read(disk, 1) == OLD


def test_what_needs_no_storage_is_answered_in_standby(daemon: ServeProcess, disk: Path) -> None:
    """A path checker's commands, and no byte of anybody's data in what they return."""
    secret = b"secret  " * 512
    leave(daemon)
    assert scsi_generic.write(disk, 1, secret).status == 0
    assert scsi_generic.read(disk, 1) == secret
    enter(daemon)
    for cdb in (
        bytes([0x12, 0, 0, 0x10, 0, 0]),  # INQUIRY
        bytes([0x12, 1, 0x83, 0x10, 0, 0]),
        bytes([0x9E, 0x10, *bytes(10), 0x10, 0, 0, 0]),  # READ CAPACITY (16)
        bytes([0x5A, 0, 0x3F, 0, 0, 0, 0, 0x10, 0, 0]),  # MODE SENSE (10)
        bytes([0x03, 0, 0, 0, 252, 0]),  # REQUEST SENSE
    ):
        answer = scsi_generic.execute(disk, cdb, expect=4096, seconds=3)
        assert (answer.status, answer.host) == (0, 0), cdb.hex()
        assert b"secret" not in answer.data, cdb.hex()
        assert 0 < 4096 - answer.residual < 1024, cdb.hex()
    assert scsi_generic.execute(disk, bytes(6), seconds=3).host == 0  # TEST UNIT READY


@pytest.fixture
def parked_write(
    daemon: ServeProcess, initiator: OpenIscsi
) -> Iterator[tuple[Backstore, Path, scsi_generic.Waiting]]:
    """Over iSCSI: a write that is parked, and its disk."""
    with backstore("disk", "disk", SIZE) as made, disk_of(made, "iscsi", initiator) as disk:
        assert scsi_generic.write(disk, 0, OLD).status == 0
        enter(daemon)
        waiting = scsi_generic.Waiting(disk, 0, NEW, seconds=60)
        wait_until(lambda: parked(daemon) == 1, "a parked write")
        try:
            yield made, disk, waiting
        finally:
            leave(daemon)


def test_a_logout_ends_when_the_standby_ends(
    daemon: ServeProcess, parked_write: tuple[Backstore, Path, scsi_generic.Waiting]
) -> None:
    """Linux flushes a disk before it logs out, and repeats what is answered BUSY."""
    made, _, waiting = parked_write
    command = ["iscsiadm", "-m", "node", "-T", made.iqn, "--logout"]
    with subprocess.Popen(command) as logout:
        time.sleep(6)  # more than park_max
        leave(daemon)
        assert logout.wait(20) == 0
    assert waiting.wait(5).status == 0
    assert_nothing_is_stuck()


def test_a_target_is_disabled_and_enabled_in_standby(
    daemon: ServeProcess, parked_write: tuple[Backstore, Path, scsi_generic.Waiting]
) -> None:
    """The kernel waits for what is parked, of which it tells the handler nothing: for `park_max` at
    most.  The initiator logs in again by itself, in the middle of the standby."""
    made, disk, waiting = parked_write
    within(15, "disabling", lambda: put(made.iscsi_port / "enable", 0))
    assert_nothing_is_stuck()
    put(made.iscsi_port / "enable", 1)
    (session,) = Path("/sys/class/iscsi_session").glob("session*")
    wait_until(lambda: (session / "state").read_text().strip() == "LOGGED_IN", "a new login")
    leave(daemon)
    answer = waiting.wait(20)
    expected = NEW if (answer.status, answer.host) == (0, 0) else OLD
    assert scsi_generic.read(disk, 0) == expected


def test_a_target_is_deleted_in_standby(
    daemon: ServeProcess,
    parked_write: tuple[Backstore, Path, scsi_generic.Waiting],
    initiator: OpenIscsi,
) -> None:
    made, _, waiting = parked_write
    within(30, "deleting the target", made.unlink)
    assert_nothing_is_stuck()
    sh("iscsiadm", "-m", "node", "-T", made.iqn, "--logout", check=False)
    answer = waiting.wait(30)
    assert (answer.status, answer.host) != (0, 0)
    leave(daemon)
    with disk_of(made, "iscsi", initiator) as disk:
        assert scsi_generic.read(disk, 0) == OLD
