"""The daemon under the kernel's target dies, ends and comes back; the initiator sees no error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.guest.conftest import OpenIscsi
from tests.kernel.guest.kernel_target import serve
from tests.kernel.guest.tcmu_disk import Load, backstore, disk_of, kernel_log, set_timers, state
from tests.support import images, oracles
from tests.support.images import MIB
from tests.support.serve import ServeProcess

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(100)]

SIZE = 128 * MIB


@pytest.fixture
def image(scratch: Path) -> Path:
    return images.write_delta(scratch / "disk.hds", SIZE, {})


@pytest.fixture
def daemon(kernel: None, image: Path, scratch: Path) -> Iterator[ServeProcess]:
    with serve(image, directory=scratch) as process:
        yield process


def assert_sound(daemon: ServeProcess, image: Path) -> None:
    """After a clean end nothing is missing in the image."""
    assert daemon.stop() == 0, daemon.stderr
    assert oracles.bat_problems(image) == []
    assert oracles.in_use_word(image) == 0


@pytest.mark.parametrize("fabric", ["loop", "iscsi"])
def test_a_killed_daemon_is_replaced(
    fabric: str, daemon: ServeProcess, image: Path, initiator: OpenIscsi, scratch: Path
) -> None:
    with backstore("disk", "disk", SIZE) as made, disk_of(made, fabric, initiator) as disk:
        load = Load(disk, scratch, "--rate=16m")
        for _ in range(2 if fabric == "loop" else 1):
            daemon.kill()
            time.sleep(0.5)
            daemon.start()
            load.assert_goes_on()
        load.wait()
        assert daemon.stderr.count("event=tcmu-reset") >= 1, "the kill hit nothing"
        assert state(disk) == "running"
    assert_sound(daemon, image)


@pytest.mark.parametrize("fabric", ["loop", "iscsi"])
def test_an_ended_daemon_is_replaced_without_busy(
    fabric: str, daemon: ServeProcess, image: Path, initiator: OpenIscsi, scratch: Path
) -> None:
    with backstore("disk", "disk", SIZE) as made, disk_of(made, fabric, initiator) as disk:
        load = Load(disk, scratch, "--rate=16m")
        log = len(kernel_log())
        for _ in range(2 if fabric == "loop" else 1):
            assert daemon.stop() == 0, daemon.stderr
            load.assert_stands_still(0.5)
            daemon.start()
            load.assert_goes_on()
        load.wait()
        assert "tcmu-reset" not in daemon.stderr
        assert "not-drained" not in daemon.stderr
        assert kernel_log()[log:] == "", "the kernel had to say something"
    assert_sound(daemon, image)


def test_absent_for_longer_than_the_initiator_waits(
    daemon: ServeProcess, image: Path, initiator: OpenIscsi, scratch: Path
) -> None:
    """Over iSCSI, with timers of a tenth of the usual ones."""
    with backstore("disk", "disk", SIZE) as made, disk_of(made, "iscsi", initiator) as disk:
        set_timers(disk, command=3, error_handling=1)
        load = Load(disk, scratch, "--rate=16m")
        daemon.kill()
        time.sleep(6)
        daemon.start()
        load.wait()
        assert state(disk) == "running"
    assert_sound(daemon, image)
