"""tcmu-runner beside ploopd, and what it leaves in the kernel: devices that wait for an answer."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel.guest import kernel_target
from tests.kernel.guest.kernel_target import backstores, targetcli
from tests.kernel.guest.run import sh, wait_until
from tests.support import images
from tests.support.images import MIB

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(120)]

PLOOP = "/backstores/user:ploop"
IQN = "iqn.2026-01.org.example:disks"
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


@contextmanager
def tcmu_runner(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    log = directory / "tcmu-runner.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["tcmu-runner", "--tcmu-log-dir", str(directory)], stdout=file, stderr=file
        )
    try:
        wait_until(lambda: "user:qcow" in targetcli("ls", "/backstores"), "tcmu-runner")
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
        assert "dbus-second" in server.stderr
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
        targetcli(PLOOP, "delete", "web")
        assert backstores() == []
        assert server.stop() == 0, server.stderr
    kernel_target.assert_nothing_is_stuck()
