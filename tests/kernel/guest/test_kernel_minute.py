"""A minute in the life of a disk under the kernel's target, with all that may happen to it.

Debian's targetcli, targetctl and open-iscsi, ext4 and XFS, and fio that verifies all the time,
while the daemon is killed and restarted, the storage of the top delta dies and a copy takes its
place, and the kernel's configuration is cleared and restored.
"""

from __future__ import annotations

import itertools
import random
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kernel.guest import kernel_target
from tests.kernel.guest.conftest import INITIATOR_NAME, OpenIscsi
from tests.kernel.guest.files import assert_tree, fill
from tests.kernel.guest.kernel_target import TargetcliShell, backstores, targetcli, targets
from tests.kernel.guest.run import disk_digest, sh, wait_until
from tests.kernel.guest.tcmu_disk import VERIFYING, Fio, kernel_log, state
from tests.support import images, oracles
from tests.support.faultfs import FaultFs
from tests.support.images import MIB
from tests.support.serve import ServedUrl, ServeProcess

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(200)]

SIZE = 480 * MIB
CLUSTER = 65536
SECONDS = 60
IQN = "iqn.2026-01.org.example:minute"
URL = ServedUrl(host="127.0.0.1", port=3260, iqn=IQN, lun=0)
BACKSTORE = "/backstores/user:ploop"
FILE_SYSTEMS = (
    ("ext4", ("mkfs.ext4", "-q"), ("e2fsck", "-f", "-n")),
    ("xfs", ("mkfs.xfs", "-q", "-K"), ("xfs_repair", "-n")),
)
"""Name, maker and judge.  XFS is made without discard: the snapshots show through what is free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Three deltas: two on a disk, and the top on a storage that can die."""

    directory: Path
    storage: FaultFs

    @property
    def descriptor(self) -> Path:
        return self.directory / "DiskDescriptor.xml"

    @property
    def snapshots(self) -> list[Path]:
        return [self.directory / "base.hds", self.directory / "middle.hds"]

    @property
    def copy(self) -> Path:
        """Where the top will be after its storage has died."""
        return self.directory / "copy.hds"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSystem:
    """A partition's file system, and what is in it."""

    partition: Path
    mountpoint: Path
    check: tuple[str, ...]

    @property
    def data(self) -> Path:
        """fio's file."""
        return self.mountpoint / "data"

    def mount(self) -> None:
        sh("mount", self.partition, self.mountpoint)

    def unmount(self) -> None:
        sh("umount", self.mountpoint)


@pytest.fixture
def chain(lio: None, scratch: Path) -> Iterator[Chain]:
    sh("modprobe", "fuse")
    missing = oracles.missing_for_fuse()
    if missing is not None:
        pytest.skip(missing)
    directory, source = scratch / "root.hdd", scratch / "source"
    directory.mkdir()
    source.mkdir()
    generator = random.Random(5)
    for number, name in enumerate(("base.hds", "middle.hds")):
        clusters = {
            index: generator.randbytes(CLUSTER)
            for index in generator.sample(range(SIZE // CLUSTER), 700 >> number)
        }
        images.write_delta(directory / name, SIZE, clusters, cluster_size=CLUSTER)
    images.write_delta(source / "top.hds", SIZE, {}, cluster_size=CLUSTER)
    rows = [
        (images.guid(1), "Compressed", "base.hds"),
        (images.guid(2), "Compressed", "middle.hds"),
        (images.TOP_GUID, "Compressed", "storage/top.hds"),
    ]
    images.write_descriptor(directory, SIZE, rows, cluster_size=CLUSTER)
    with FaultFs(source, directory / "storage") as storage:
        yield Chain(directory=directory, storage=storage)


@pytest.fixture
def daemon(kernel: None, bus: None, chain: Chain, scratch: Path) -> Iterator[ServeProcess]:
    """It serves another disk; the chain is opened when a backstore names it."""
    other = images.write_delta(scratch / "other.hds", 8 * MIB, {})
    with kernel_target.serve(other, directory=scratch) as process:
        on_the_bus(process, 1)
        yield process


@pytest.fixture
def file_systems(
    daemon: ServeProcess, chain: Chain, initiator: OpenIscsi, scratch: Path
) -> Iterator[list[FileSystem]]:
    """Through targetcli and iscsiadm to two partitions with file systems, mounted."""
    with TargetcliShell() as shell:
        created = shell(
            BACKSTORE, "create", "name=disk", f"size={SIZE}", f"cfgstring={chain.descriptor}"
        )
        assert "Created user-backed storage object disk" in created
        shell("/iscsi", "create", IQN)
        shell(f"/iscsi/{IQN}/tpg1/luns", "create", f"{BACKSTORE}/disk")
        shell(f"/iscsi/{IQN}/tpg1/acls", "create", INITIATOR_NAME)
        assert "saved" in shell("saveconfig").lower()
    initiator.discover(URL)
    initiator.update(URL, "node.session.timeo.replacement_timeout", "120")
    made: list[FileSystem] = []
    try:
        disk = initiator.login(URL)
        write_partitions(disk)
        for number, (name, make, check) in enumerate(FILE_SYSTEMS, 1):
            partition, mountpoint = Path(f"{disk}{number}"), scratch / name
            wait_until(partition.exists, f"{partition}")
            mountpoint.mkdir()
            sh(*make, partition)
            each = FileSystem(partition=partition, mountpoint=mountpoint, check=check)
            each.mount()
            made.append(each)
        yield made
    finally:
        for each in made:
            if each.mountpoint.is_mount():
                sh("umount", "-l", each.mountpoint, check=False)
        initiator.forget(URL)


def write_partitions(disk: Path) -> None:
    """A master boot record with two partitions, and let the kernel read it."""
    sector = bytearray(512)
    sector[510:] = b"\x55\xaa"
    places = itertools.pairwise([MIB, 144 * MIB, SIZE])
    for number, (begin, end) in enumerate(places):
        entry = struct.pack("<4xB3xII", 0x83, begin // 512, (end - begin) // 512)
        sector[446 + 16 * number : 462 + 16 * number] = entry
    disk.write_bytes(sector)
    sh("blockdev", "--rereadpt", disk)


def on_the_bus(daemon: ServeProcess, times: int) -> None:
    """Until the process that was started as the `times`-th one has the name, too."""
    wait_until(lambda: daemon.stderr.count("event=dbus-name") >= times, "the name on the bus")


def jobs(one: FileSystem, other: FileSystem) -> list[str]:
    """Two jobs for a minute, of many passes.  The first one verifies when it has written
    everything, the second one all the time.

    Not `--time_based`, with which fio does not look whether a block is the one that it wrote last.
    """
    words = [*VERIFYING, "--size=24m", f"--runtime={SECONDS}", "--loops=1000", "--rate=8m,4m"]
    words += ["--name=passes", f"--filename={one.data}"]
    words += ["--name=backlog", f"--filename={other.data}", "--verify_backlog=256", "--fsync=64"]
    return words


def verify_again(each: FileSystem) -> None:
    """Everything that fio has written."""
    words = [*VERIFYING, "--name=again", "--rw=read", f"--filename={each.data}", "--size=24m"]
    sh("fio", *words)


class Minute:
    """What happens, and when."""

    def __init__(self, load: Fio) -> None:
        self._load = load
        self._begin = time.monotonic()
        self.took: list[str] = []

    @property
    def elapsed(self) -> float:
        """Seconds."""
        return time.monotonic() - self._begin

    def at(self, second: float, what: str, happen: Callable[[], None]) -> None:
        """`happen` at that second, or later; the load was on before, and is on after it."""
        time.sleep(max(0, second - self.elapsed))
        assert self._load.running, self._load.log.read_text()
        begin = self.elapsed
        happen()
        self._load.assert_goes_on()
        self.took.append(f"{begin:.1f} s: {what}, {self.elapsed - begin:.1f} s")


def kill(daemon: ServeProcess) -> None:
    daemon.kill()
    time.sleep(0.5)
    daemon.start()
    on_the_bus(daemon, 2)
    wait_until(lambda: "event=tcmu-reset" in daemon.stderr, "the ring being reset")


def restart(daemon: ServeProcess) -> None:
    assert daemon.stop() == 0, daemon.stderr
    daemon.start()
    on_the_bus(daemon, 3)


def lose_the_storage(daemon: ServeProcess, chain: Chain, load: Fio) -> None:
    """Its server dies; what it had is copied to where it can be reached."""
    _, name = daemon.device_names()
    chain.storage.kill()
    daemon.ctl("device", "standby", name, "wait", "--state", "on")
    load.assert_stands_still()
    shutil.copy(chain.storage.source / "top.hds", chain.copy)
    daemon.ctl("device", "replace", name, "--image", str(chain.copy), "--force")
    assert daemon.standby(name) == "off"


def clear_and_restore(daemon: ServeProcess) -> None:
    sh("/usr/bin/targetctl", "clear")
    assert (backstores(), targets()) == ([], [])
    wait_until(lambda: daemon.device_names() == ["other"], "the image being closed")
    sh("/usr/bin/targetctl", "restore")
    assert (backstores(), targets()) == (["disk"], [IQN])


def test_a_minute_with_everything(
    daemon: ServeProcess,
    chain: Chain,
    file_systems: list[FileSystem],
    initiator: OpenIscsi,
    scratch: Path,
) -> None:
    disk = Path(str(file_systems[0].partition)[:-1])
    snapshots = [oracles.digest(path) for path in chain.snapshots]
    trees = [fill(each.mountpoint, number, 32 * MIB) for number, each in enumerate(file_systems)]
    log = len(kernel_log())

    load = Fio(disk, scratch, *jobs(*file_systems))
    minute = Minute(load)
    minute.at(8, "kill -9", lambda: kill(daemon))
    minute.at(20, "SIGTERM", lambda: restart(daemon))
    minute.at(32, "standby", lambda: lose_the_storage(daemon, chain, load))
    minute.at(45, "clear", lambda: clear_and_restore(daemon))
    load.wait()
    assert minute.elapsed > SECONDS - 1  # fio began a moment before the clock was read
    print("\n".join(minute.took), load.log.read_text(), sep="\n")
    assert state(disk) == "running"
    assert "I/O error" not in kernel_log()[log:]

    for each, tree in zip(file_systems, trees, strict=True):
        each.unmount()
        each.mount()
        assert_tree(each.mountpoint, tree)
        verify_again(each)
        each.unmount()
        sh(*each.check, each.partition)
    seen = disk_digest(disk)
    initiator.logout(URL)
    targetcli("/iscsi", "delete", IQN)
    targetcli(BACKSTORE, "delete", "disk")
    assert daemon.stop() == 0, daemon.stderr

    assert [oracles.digest(path) for path in chain.snapshots] == snapshots
    for path in (*chain.snapshots, chain.copy):
        assert oracles.bat_problems(path) == []
        assert oracles.in_use_word(path) == 0
    layers: list[oracles.Layer] = [("parallels", path) for path in (*chain.snapshots, chain.copy)]
    assert oracles.digest(oracles.read_through_qemu(layers, scratch / "flat")) == seen
