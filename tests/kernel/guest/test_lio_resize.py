"""A disk behind the kernel's target grows: by its backstore's size, and by ploopctl."""

from __future__ import annotations

from pathlib import Path

import pytest

from image_format import parse_descriptor
from ploopd.storage.check import check_all
from tests.kernel.guest.kernel_target import serve
from tests.kernel.guest.run import sh, wait_until
from tests.kernel.guest.tcmu_disk import Backstore, put
from tests.support import images
from tests.support.images import MIB

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(60)]

CLUSTER = 64 << 10
SIZE = 512 * MIB
LARGER = 2048 * MIB
"""Its BAT takes three clusters instead of one."""
FIRST, LAST = b"\x5a" * CLUSTER, b"\xa5" * 4096


def chain(directory: Path) -> Path:
    """The top has the two clusters that are in the way."""
    clusters = {0: FIRST, 1: FIRST}
    images.write_delta(directory / "base.hds", SIZE, {2: FIRST}, cluster_size=CLUSTER)
    images.write_delta(
        directory / "top.hds", SIZE, clusters, cluster_size=CLUSTER, order=tuple(clusters)
    )
    rows = [
        (images.guid(1), "Compressed", "base.hds"),
        (images.TOP_GUID, "Compressed", "top.hds"),
    ]
    return images.write_descriptor(directory, SIZE, rows, cluster_size=CLUSTER)


def size_after_rescan(disk: Path) -> int:
    """What the initiator sees, who has to be told to look."""
    put(Path("/sys/block", disk.name, "device/rescan"), 1)
    return int(sh("blockdev", "--getsize64", disk))


def write_last(disk: Path) -> None:
    size = int(sh("blockdev", "--getsize64", disk))
    with disk.open("r+b", buffering=0) as file:
        file.seek(size - len(LAST))
        assert file.read(len(LAST)) == bytes(len(LAST))
        file.seek(size - len(LAST))
        file.write(LAST)


def told_size(made: Backstore) -> int:
    return int(made.attribute("dev_size"))


def test_a_disk_grows_with_its_backstore_and_the_other_way_round(
    kernel: None, scratch: Path
) -> None:
    descriptor = chain(scratch)
    with serve(descriptor, directory=scratch) as server:
        # create … size=2G
        made = Backstore("disk", str(descriptor), LARGER).create().wait_served()
        disk = made.loop_disk()
        assert int(sh("blockdev", "--getsize64", disk)) == LARGER
        write_last(disk)
        put(made.path / "attrib/dev_size", LARGER + 32 * MIB)  # set attribute dev_size=
        wait_until(lambda: size_after_rescan(disk) == LARGER + 32 * MIB, "the larger disk")
        write_last(disk)
        (device,) = server.ctl_json("device", "list")
        server.ctl("device", "resize", device["name"], "--size", "+32M")
        wait_until(lambda: told_size(made) == LARGER + 64 * MIB, "dev_size")
        assert size_after_rescan(disk) == LARGER + 64 * MIB
        write_last(disk)
        put(made.path / "attrib/dev_size", SIZE)  # nobody waits for the answer
        wait_until(lambda: "can only become larger" in server.stderr, "the refusal")
        wait_until(lambda: told_size(made) == LARGER + 64 * MIB, "what is true")
        assert size_after_rescan(disk) == LARGER + 64 * MIB
        with disk.open("rb", buffering=0) as file:
            assert file.read(3 * CLUSTER) == 3 * FIRST
        made.delete()
        assert server.stop() == 0, server.stderr
    said = parse_descriptor(descriptor.read_bytes())
    assert said.disk_size_sectors == (LARGER + 64 * MIB) // 512
    for report in check_all(descriptor):
        assert (report.corruptions, report.leaks) == (0, 0), report.details
