"""Backstores of the kind user:ploop made by plain writes to configfs, and their disks.

Without rtslib, so that each step is one system call that has its own deadline.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tests.kernel.guest.conftest import OpenIscsi
from tests.kernel.guest.run import can_be_opened, sh, wait_until
from tests.support.serve import ServedUrl

TARGET = Path("/sys/kernel/config/target")
LOOP_WWN = "naa.5001405{:09x}"
PORT = 3260
VERIFYING = (
    "--rw=randwrite",
    "--bs=16k",
    "--ioengine=libaio",
    "--direct=1",
    "--iodepth=16",
    "--verify=crc32c",
    "--do_verify=1",
    "--verify_fatal=1",
)
"""fio's words for a load that writes everywhere and reads back what it wrote."""

T = TypeVar("T")


def within(seconds: float, what: str, call: Callable[[], T]) -> T:
    """`call()`, which may never return from the kernel: then this fails, and the thread stays."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"{what}: not done within {seconds} s"
    if errors:
        raise errors[0]
    return results[0]


def put(path: Path, value: object) -> None:
    """One write(2), as configfs wants it."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, str(value).encode())
    finally:
        os.close(descriptor)


@dataclass(eq=False)
class Backstore:
    """`core/user_0/NAME`, enabled; linked to nothing."""

    name: str
    config: str
    size: int
    subtype: str = "ploop"
    links: list[Callable[[], None]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return TARGET / "core/user_0" / self.name

    def create(self, control: str = "nl_reply_supported=-1,hw_max_sectors=1024") -> Backstore:
        self.path.parent.mkdir(exist_ok=True)
        self.path.mkdir()
        put(
            self.path / "control",
            f"dev_config={self.subtype}/{self.config},dev_size={self.size},{control}",
        )
        within(10, "enable", lambda: put(self.path / "enable", 1))
        return self

    def attribute(self, name: str) -> str:
        return (self.path / "attrib" / name).read_text().strip()

    def wait_served(self, seconds: float = 15) -> Backstore:
        """Until the daemon has it: it switches the kernel's own timer off."""
        wait_until(lambda: self.attribute("cmd_time_out") == "0", "the handler", seconds)
        # The attribute is set before the ring is taken over; nothing more of that is to be seen.
        return self

    def loop_disk(self, number: int = 1) -> Path:
        """Link it into tcm_loop: a disk of this machine without a network."""
        port = TARGET / "loopback" / LOOP_WWN.format(number) / "tpgt_1"
        port.parent.parent.mkdir(exist_ok=True)
        before = set(Path("/sys/block").iterdir())
        port.mkdir(parents=True)
        put(port / "nexus", LOOP_WWN.format(number + 0x1000))
        lun = port / "lun/lun_0"
        lun.mkdir()
        within(10, "linking", lambda: os.symlink(self.path, lun / "link"))

        def unlink() -> None:
            within(20, "unlinking", (lun / "link").unlink)
            within(20, "removing the LUN", lun.rmdir)
            within(20, "removing the target", port.rmdir)
            port.parent.rmdir()

        self.links.append(unlink)
        return wait_for_disk(before)

    @property
    def iqn(self) -> str:
        return f"iqn.2026-01.org.ploopd:{self.name}"

    @property
    def iscsi_port(self) -> Path:
        """The portal group of its iSCSI target."""
        return TARGET / "iscsi" / self.iqn / "tpgt_1"

    def iscsi_target(self) -> ServedUrl:
        """Link it into the kernel's iSCSI target, without authentication."""
        port = self.iscsi_port
        port.parent.parent.mkdir(exist_ok=True)
        port.mkdir(parents=True)
        lun = port / "lun/lun_0"
        lun.mkdir()
        within(10, "linking", lambda: os.symlink(self.path, lun / "link"))
        for name, value in (
            ("authentication", 0),
            ("generate_node_acls", 1),
            ("demo_mode_write_protect", 0),
            ("cache_dynamic_acls", 1),
            ("default_cmdsn_depth", 128),
        ):
            put(port / "attrib" / name, value)
        (port / f"np/127.0.0.1:{PORT}").mkdir()
        put(port / "enable", 1)

        def unlink() -> None:
            within(20, "disabling", lambda: put(port / "enable", 0))
            within(20, "removing the portal", (port / f"np/127.0.0.1:{PORT}").rmdir)
            within(20, "unlinking", (lun / "link").unlink)
            within(20, "removing the LUN", lun.rmdir)
            within(20, "removing the target", port.rmdir)
            port.parent.rmdir()

        self.links.append(unlink)
        return ServedUrl(host="127.0.0.1", port=PORT, iqn=self.iqn, lun=0)

    def unlink(self) -> None:
        """Take it out of every target, and those away."""
        while self.links:
            self.links.pop()()

    def delete(self) -> None:
        self.unlink()
        within(20, "deleting the backstore", self.path.rmdir)


def wait_for_disk(before: set[Path]) -> Path:
    found: list[str] = []

    def there() -> bool:
        new = set(Path("/sys/block").iterdir()) - before
        found[:] = [each.name for each in new if each.name.startswith("sd")]
        return bool(found) and can_be_opened(Path("/dev", found[0]))

    wait_until(there, "the disk")
    return Path("/dev", found[0])


@contextlib.contextmanager
def backstore(name: str, config: str, size: int) -> Iterator[Backstore]:
    """A backstore that is served; it and what it was linked to are gone afterwards."""
    made = Backstore(name, config, size).create()
    try:
        yield made.wait_served()
    finally:
        made.delete()


@contextlib.contextmanager
def disk_of(made: Backstore, fabric: str, initiator: OpenIscsi) -> Iterator[Path]:
    """Its disk over `fabric`, "loop" or "iscsi", logged out afterwards."""
    if fabric == "loop":
        yield made.loop_disk()
        return
    url = made.iscsi_target()
    initiator.discover(url)
    # The session waits for a target that is away, and its commands with it.
    initiator.update(url, "node.session.timeo.replacement_timeout", "120")
    try:
        yield initiator.login(url)
    finally:  # a session that stays would fail every test that follows
        initiator.forget(url)


def set_timers(disk: Path, *, command: int, error_handling: int = 5) -> None:
    """The SCSI layer's seconds until it aborts, and until it takes an abort for failed."""
    device = Path("/sys/block", disk.name, "device")
    (device / "timeout").write_text(f"{command}\n")
    (device / "eh_timeout").write_text(f"{error_handling}\n")


def state(disk: Path) -> str:
    """`running`, `offline`, … as the SCSI layer has it."""
    return Path("/sys/block", disk.name, "device/state").read_text().strip()


def kernel_log() -> str:
    return sh("dmesg")


class Fio:
    """A running fio that loads `disk`, or a file system on it; it sees every error there is."""

    def __init__(self, disk: Path, directory: Path, *words: str) -> None:
        self.log = directory / f"fio-{disk.name}.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                ["fio", *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._disk = disk
        self._begin = self._written()
        wait_until(lambda: self.progress() > 1 << 20, "fio's first writes", 30)

    def _written(self) -> int:
        return int(Path("/sys/block", self._disk.name, "stat").read_text().split()[6]) * 512

    def progress(self) -> int:
        """Bytes that have been written since it was started."""
        return self._written() - self._begin

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self, seconds: float = 60) -> None:
        """Until it has written and read back everything.  Any error is one of this test."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise AssertionError(
                f"fio has not ended after {seconds} s:\n{self.log.read_text()[-2000:]}\n"
                f"{kernel_log()[-3000:]}"
            ) from None
        assert code == 0, f"{self.log.read_text()[-3000:]}\n{kernel_log()[-3000:]}"

    def assert_goes_on(self, seconds: float = 20) -> None:
        before = self.progress()
        wait_until(lambda: self.progress() > before or not self.running, "fio going on", seconds)

    def assert_stands_still(self, seconds: float = 1) -> None:
        """What was answered before may still be counted for a moment."""
        time.sleep(0.3)
        before = self.progress()
        time.sleep(seconds)
        assert self.running
        assert self.progress() == before, "writes are answered"


class Load(Fio):
    """fio that writes to a disk and verifies once, at its end."""

    def __init__(self, disk: Path, directory: Path, *extra: str, size: str = "48m") -> None:
        words = ["--name=verify", f"--filename={disk}", f"--size={size}", *VERIFYING]
        super().__init__(disk, directory, *words, *extra)
