"""tcmu-runner beside ploopd, and what it leaves in the kernel: devices that wait for an answer."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel.guest import kernel_target
from tests.kernel.guest.kernel_target import TargetcliShell, backstores, targetcli
from tests.kernel.guest.run import sh, wait_until
from tests.support import images
from tests.support.images import MIB
from tests.support.serve import ServeProcess

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(120)]

PLOOP = "/backstores/user:ploop"
IQN = "iqn.2026-01.org.example:disks"
WWNS = ("naa.5001405000000001", "naa.5001405000000002")
NEVER_WAIT = "control=nl_reply_supported=-1"


@pytest.fixture(scope="module", autouse=True)
def promise(lio: None) -> Iterator[None]:
    """What tcmu-runner promises the kernel is forgotten with the module only."""
    yield
    sh("rmmod", "target_core_user")
    sh("modprobe", "target_core_user")


@pytest.fixture
def web(kernel: None, bus: None, scratch: Path) -> Path:
    if shutil.which("tcmu-runner") is None:
        pytest.skip("tcmu-runner is not installed: apt-get install tcmu-runner")
    return images.write_delta(scratch / "web.hds", 64 * MIB, {})


def is_on_the_bus() -> bool:
    bus = ("-d", "org.freedesktop.DBus", "-o", "/org/freedesktop/DBus")
    method = ("-m", "org.freedesktop.DBus.NameHasOwner", "org.kernel.TCMUService1")
    return "true" in sh("gdbus", "call", "--system", *bus, *method)


@contextmanager
def tcmu_runner(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    log = directory / "tcmu-runner.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["tcmu-runner", "--tcmu-log-dir", str(directory)], stdout=file, stderr=file
        )
    try:
        wait_until(is_on_the_bus, "tcmu-runner")
        yield process
    finally:
        process.terminate()
        process.wait(20)


def create(name: str, size: str, *more: str, check: bool = True) -> str:
    words = (f"name={name}", f"size={size}", "cfgstring=web", *more)
    return targetcli(PLOOP, "create", *words, check=check)


def test_beside_tcmu_runner(web: Path, scratch: Path) -> None:
    """ploopd registers with it, and what waits for nobody's answer is not taken away by it."""
    with tcmu_runner(scratch), kernel_target.serve(web, directory=scratch) as server:
        wait_until(lambda: "dbus-registered ok=True" in server.stderr, "the registration")
        assert server.logged("dbus-second"), server.stderr
        listed = targetcli("ls", "/backstores")
        assert "user:ploop" in listed
        assert "user:qcow" in listed
        assert "there are: web" in targetcli(
            PLOOP, "create", "name=x", "size=1M", "cfgstring=mail", check=False
        )
        url = server.ctl("lio", "export", "web", "--iqn", IQN).stdout
        assert url == f"iscsi://127.0.0.1:3260/{IQN}/0\n"
        server.ctl("lio", "unexport", "web")
        assert "Created" in create("second", "64M", NEVER_WAIT)
        wait_until(lambda: "tcmu-attached uio=second" in server.stderr, "second being served")
        assert kernel_target.loop_disk("second").exists()
        targetcli(PLOOP, "delete", "second")
        assert backstores() == []
        assert server.stop() == 0, server.stderr


def opened(pid: int) -> set[str]:
    """The kinds of the TCMU devices that a process has open."""
    links = [each.readlink() for each in Path(f"/proc/{pid}/fd").iterdir() if each.is_symlink()]
    names = {each.name for each in links if each.match("/dev/uio*")}
    return {Path(f"/sys/class/uio/{name}/name").read_text().split("/")[3] for name in names}


def waits(backstore: str) -> str:
    (path,) = kernel_target.CONFIGFS.glob(f"core/user_*/{backstore}/attrib/nl_reply_supported")
    return path.read_text().strip()


def write_both(disks: list[Path]) -> list[bytes]:
    """Something new on each disk."""
    content = [bytes([byte]) * 4096 for byte in os.urandom(len(disks))]
    for disk, block in zip(disks, content, strict=True):
        with disk.open("wb") as file:
            file.write(block)
        sh("blockdev", "--flushbufs", disk)
    return content


def read_both(disks: list[Path]) -> list[bytes]:
    return [disk.open("rb").read(4096) for disk in disks]


def two_disks() -> list[Path]:
    """tcm_loop's, by size: ploopd's, tcmu-runner's."""
    wait_until(lambda: len(kernel_target.loop_disks()) == 2, "both disks")
    sizes = Path("/sys/block")
    return sorted(
        kernel_target.loop_disks(),
        key=lambda disk: int((sizes / disk.name / "size").read_text()),
    )


def restore_both(server: ServeProcess) -> None:
    """Where ploopd is too late, which a busy machine with one CPU may cause, tcmu-runner's is there
    all the same, and it is only to be repeated."""
    for _ in range(5):
        sh("/usr/bin/targetctl", "clear")
        assert backstores() == []
        said = sh("/usr/bin/targetctl", "restore")
        if "Could not create StorageObject web" not in said:
            assert backstores() == ["mail", "web"]
            assert "web" not in said  # tcmu-runner's takes no attributes
            return
        assert backstores() == ["mail"]
    pytest.fail(server.stderr)


def test_clear_and_restore_beside_tcmu_runner(web: Path, scratch: Path) -> None:
    """Each has its own, whoever of the two the kernel asks first; then ploopd comes late."""
    mail = scratch / "mail.qcow2"
    sh("qemu-img", "create", "-f", "qcow2", mail, "96M")
    with tcmu_runner(scratch) as runner, kernel_target.serve(web, directory=scratch) as server:
        wait_until(lambda: "dbus-registered ok=True" in server.stderr, "the registration")
        with TargetcliShell() as shell:
            shell("/backstores/user:qcow", "create", "mail", "96M", str(mail))
            wait_until(lambda: "Created" in shell(PLOOP, "create", "web", "64M", "web"), "web")
            for backstore, wwn in (("ploop/web", WWNS[0]), ("qcow/mail", WWNS[1])):
                shell("/loopback", "create", wwn)
                shell(f"/loopback/{wwn}/luns", "create", f"/backstores/user:{backstore}")
            assert "saved" in shell("saveconfig")
        assert (waits("web"), waits("mail")) == ("-1", "1")
        content = write_both(two_disks())
        for _ in range(3):
            restore_both(server)
            disks = two_disks()
            assert read_both(disks) == content
            content = write_both(disks)
            assert (opened(runner.pid), opened(server.pid)) == ({"qcow"}, {"ploop"})
        sh("/usr/bin/targetctl", "clear")
        assert server.stop() == 0, server.stderr
        # Without ploopd only tcmu-runner's comes back, and nothing hangs.
        assert "Could not create StorageObject web" in sh("/usr/bin/targetctl", "restore")
        assert backstores() == ["mail"]
        server.start()
        wait_until(lambda: server.stderr.count("dbus-registered") == 2, "the registration")
        restore_both(server)
        assert read_both(two_disks()) == content
        sh("/usr/bin/targetctl", "clear")
        assert server.stop() == 0, server.stderr
    kernel_target.assert_nothing_is_stuck()


def test_after_tcmu_runner_the_kernel_waits_for_answers(web: Path, scratch: Path) -> None:
    """It has promised the kernel answers, for good; ploopd gives them."""
    with tcmu_runner(scratch):
        pass
    with kernel_target.serve(web, directory=scratch) as server:
        wait_until(lambda: "dbus-name" in server.stderr, "the name on the bus")
        assert "Created" in create("web", "64M")
        wait_until(lambda: "tcmu-attached uio=web" in server.stderr, "web being served")
        (path,) = kernel_target.CONFIGFS.glob("core/user_*/web")
        assert (path / "attrib/nl_reply_supported").read_text().strip() == "1"
        wait_until(
            lambda: (path / "attrib/emulate_write_cache").read_text() == "1\n", "the write cache"
        )
        targetcli(f"{PLOOP}/web", "set", "attribute", f"dev_size={64 * MIB}")
        answer = targetcli(f"{PLOOP}/web", "set", "attribute", "dev_size=4096", check=False)
        assert "Invalid argument" in answer or "annot" in answer, answer
        refused = create("small", "32M", check=False)
        assert "creation failed" in refused, refused
        assert backstores() == ["web"]
        assert "Deleted" in targetcli(PLOOP, "delete", "web")
        create("web", "64M")
        targetcli("saveconfig")
        for number in range(4):  # the next one has the name and the uio of the one that goes
            sh("/usr/bin/targetctl", "clear")
            assert sh("/usr/bin/targetctl", "restore") == "", server.stderr
            wait_until(
                lambda count=3 + number: server.stderr.count("tcmu-attached uio=web") == count,
                "web being served again",
            )
        sh("/usr/bin/targetctl", "clear")
        assert server.stop() == 0, server.stderr
        restore = subprocess.Popen(["/usr/bin/targetctl", "restore"])
        wait_until(backstores, "the backstore being made")  # and now the kernel waits for a reply
        server.start()
        assert restore.wait(20) == 0
        wait_until(lambda: "tcmu-netlink-reset" in server.stderr, "those who wait being let go")
        assert kernel_target.loop_disk("web").exists()
        kernel_target.clear()
        assert server.stop() == 0, server.stderr
    kernel_target.assert_nothing_is_stuck()
