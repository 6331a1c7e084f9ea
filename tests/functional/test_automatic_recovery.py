"""Automatic recovery as an initiator sees it: nobody types anything, and there is only latency."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.functional.test_standby_e2e import SIZE, run_load_through, thin_image, wait_for_standby
from tests.support import images, oracles
from tests.support.faultfs import FaultFs
from tests.support.initiator import Initiator
from tests.support.load import BLOCK, Journal, Load
from tests.support.serve import ServeProcess

pytestmark = [pytest.mark.functional, pytest.mark.fuse, pytest.mark.timeout(120)]


def wait_for_event(server: ServeProcess, device: str, wanted: str, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while wanted not in (seen := events(server, device)):
        assert time.monotonic() < deadline, f"no {wanted} in {seen}"
        time.sleep(0.05)


def events(server: ServeProcess, device: str) -> list[str]:
    return [row["event"] for row in server.ctl_json("events", "--device", device)]


def finish(server: ServeProcess, image: Path, journal: Journal, tmp_path: Path) -> None:
    """Stop, and look at the image with QEMU's eyes."""
    assert server.stop() == 0, server.stderr[-3000:]
    assert "Traceback" not in server.stderr
    seen = oracles.read_through_qemu([("parallels", image)], tmp_path / "final.raw")
    assert journal.verify_file(seen, size=SIZE) > 0
    assert oracles.bat_problems(image) == []
    assert oracles.in_use_word(image) == 0


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.ENOTCONN, errno.EBUSY], ids=errno.errorcode.__getitem__
)
def test_the_storage_comes_back_and_so_does_the_disk(
    number: int, storage: FaultFs, tmp_path: Path
) -> None:
    """Errors that stick to open files, then a storage that is dead altogether, twice."""
    disk = thin_image(storage.source / "disk.hds")
    served = storage.mountpoint / "disk.hds"
    with ServeProcess(served, directory=tmp_path, options=("--recovery", "reopen")) as server:
        (device,) = server.device_names()

        def play() -> None:
            for round_number in (1, 2):
                storage.fail("disk.hds", "write", "fsync", errno=number, stick=True)
                wait_for_standby(server, device, "on", 10)
                storage.dead(number)
                time.sleep(0.8)
                assert server.standby(device) == "on"
                storage.clear()
                wait_for_standby(server, device, "off", 10)
                assert events(server, device).count("recovered") == round_number

        with Initiator(server.url) as initiator:
            initiator.settle()
            journal = Journal(number)
            load = Load(initiator, journal, range(SIZE // BLOCK))
            run_load_through(load, play)
            initiator.logout()
        assert load.longest > 0.5, "nothing was ever parked"
        finish(server, disk, journal, tmp_path)
        lines = server.stderr.splitlines()
        assert sum("event=recovery-attempt-failed" in line for line in lines) <= 2 * 2
        assert not any("event=replace-step" in line for line in lines)


def test_a_file_system_that_is_mounted_anew(storage: FaultFs, tmp_path: Path) -> None:
    """Its process dies: ENOTCONN from the kernel, later another device number for the same file."""
    disk = thin_image(storage.source / "disk.hds")
    served = storage.mountpoint / "disk.hds"
    with ServeProcess(served, directory=tmp_path, options=("--recovery", "reopen")) as server:
        (device,) = server.device_names()

        def play() -> None:
            storage.kill()
            wait_for_standby(server, device, "on", 10)
            time.sleep(1.5)
            storage.remount()
            wait_for_standby(server, device, "off", 15)

        with Initiator(server.url) as initiator:
            initiator.settle()
            journal = Journal(11)
            run_load_through(Load(initiator, journal, range(SIZE // BLOCK)), play)
            initiator.logout()
        finish(server, disk, journal, tmp_path)


def test_the_replica_takes_over_and_the_wrong_ones_do_not(storage: FaultFs, tmp_path: Path) -> None:
    """One storage dies for good.  Of four candidates one is another disk, one an old copy, one has
    no name; the right one appears in the middle of the standby."""
    source = storage.source
    thin_image(source / "disk.hds")
    names = ("other", "old", "nameless", "replica")
    candidates = [storage.mountpoint / f"{name}.hds" for name in names]
    options = ["--recovery", "reopen"]
    for candidate in candidates:
        options += ["--candidate", str(candidate)]
    images.write_delta(source / "other.hds", SIZE, {}, cluster_size=65536)
    (source / "other.hds.uuid").write_text("6f2f87f4-9e3a-4d4b-8a5e-0e0f3a6c1d11\n")
    shutil.copyfile(source / "disk.hds", source / "old.hds")
    served = storage.mountpoint / "disk.hds"
    with ServeProcess(served, directory=tmp_path, options=tuple(options)) as server:
        (device,) = server.device_names()
        shutil.copyfile(source / "disk.hds.uuid", source / "old.hds.uuid")

        def play() -> None:
            storage.fail("disk.hds", "*", errno=errno.EIO)
            wait_for_standby(server, device, "on", 10)
            shutil.copyfile(source / "disk.hds", source / "nameless.hds")
            wait_for_event(server, device, "candidate-refused")
            time.sleep(2.0)
            assert server.standby(device) == "on"
            shutil.copyfile(source / "disk.hds", tmp_path / "replica")
            shutil.copyfile(source / "disk.hds.uuid", source / "replica.hds.uuid")
            (tmp_path / "replica").rename(source / "replica.hds")
            wait_for_standby(server, device, "off", 20)

        with Initiator(server.url) as initiator:
            initiator.settle()
            journal = Journal(12)
            run_load_through(Load(initiator, journal, range(SIZE // BLOCK)), play)
            initiator.logout()
        found = server.ctl_json("events", "--device", device)
        refused = {
            Path(row["details"]["image"]).name: row["details"]["error"]
            for row in found
            if row["event"] == "candidate-refused"
        }
        assert "is another disk" in refused["other.hds"]
        assert "somebody has closed it" in refused["old.hds"]
        assert "nothing says that it is this disk" in refused["nameless.hds"]
        assert [row["event"] for row in found].count("candidate-refused") == 3
        assert server.ctl_json("device", "show", device)["image"].endswith("replica.hds")
        finish(server, source / "replica.hds", journal, tmp_path)


HOOK = """\
#!/bin/sh
# Brings the disk back from a copy at the third attempt.
env | grep ^PLOOPD_ >>DIRECTORY/told
echo "attempt $PLOOPD_ATTEMPT" >&2
[ "$PLOOPD_ATTEMPT" -ge 3 ] || exit 9
cp SOURCE/disk.hds SOURCE/copy.hds || exit 1
exec PYTHON -m ploopd.cli.ploopctl device replace "$PLOOPD_DEVICE" --image "$1" --force
"""


def test_a_program_brings_it_back(storage: FaultFs, tmp_path: Path) -> None:
    thin_image(storage.source / "disk.hds")
    hook = tmp_path / "hook"
    text = HOOK.replace("DIRECTORY", str(tmp_path)).replace("SOURCE", str(storage.source))
    python = f"env PYTHONPATH={Path.cwd()} {sys.executable}"
    hook.write_text(text.replace("PYTHON", python))
    hook.chmod(0o755)
    copy = storage.mountpoint / "copy.hds"
    options = ("--recovery", "command", "--recovery-command", f"{hook} {copy}")
    served = storage.mountpoint / "disk.hds"
    with ServeProcess(served, directory=tmp_path, options=options) as server:
        (device,) = server.device_names()

        def play() -> None:
            storage.fail("disk.hds", "write", errno=errno.ENOTCONN)
            wait_for_standby(server, device, "on", 10)
            wait_for_standby(server, device, "off", 30)
            wait_for_event(server, device, "recovery-command")

        with Initiator(server.url) as initiator:
            initiator.settle()
            journal = Journal(13)
            run_load_through(Load(initiator, journal, range(SIZE // BLOCK)), play)
            initiator.logout()
        ended = [
            row["details"]
            for row in server.ctl_json("events", "--device", device)
            if row["event"] == "recovery-command"
        ]
        assert [row["status"] for row in ended] == [9, 9, 0]
        assert ended[0]["stderr"] == "attempt 1"
        assert "release" in ended[2]["stderr"]
        told = (tmp_path / "told").read_text()
        for line in (
            "PLOOPD_EVENT=standby-entered",
            f"PLOOPD_DEVICE={device}",
            f"PLOOPD_IMAGE={served}",
            "PLOOPD_ERRNO=ENOTCONN",
            "PLOOPD_STATE=on",
            f"PLOOPD_CONTROL={server.control}",
        ):
            assert line in told
        finish(server, storage.source / "copy.hds", journal, tmp_path)


def test_what_an_operator_puts_into_standby_stays_there(storage: FaultFs, tmp_path: Path) -> None:
    thin_image(storage.source / "disk.hds")
    served = storage.mountpoint / "disk.hds"
    with ServeProcess(served, directory=tmp_path, options=("--recovery", "reopen")) as server:
        (device,) = server.device_names()
        server.ctl("device", "standby", device, "enter")
        time.sleep(2.5)
        assert server.standby(device) == "on"
        assert events(server, device) == ["device-added", "standby-entered", "held"]
        server.ctl("device", "standby", device, "leave")
        assert server.standby(device) == "off"


def test_events_can_be_followed_while_they_happen(storage: FaultFs, tmp_path: Path) -> None:
    thin_image(storage.source / "disk.hds")
    served = storage.mountpoint / "disk.hds"
    with ServeProcess(served, directory=tmp_path, options=("--recovery", "reopen")) as server:
        (device,) = server.device_names()
        command = [sys.executable, "-m", "ploopd.cli.ploopctl", "--control", str(server.control)]
        follow = [*command, "events", "--follow", "--output", "json", "--device", device]
        with subprocess.Popen(follow, stdout=subprocess.PIPE, text=True) as following:
            try:
                assert following.stdout is not None
                with Initiator(server.url) as initiator:
                    initiator.settle()
                    storage.fail("disk.hds", "write", errno=errno.EIO, times=1)
                    initiator.good(initiator.write(0, bytes([1]) * 4096), 20)
                    initiator.logout()
                seen = []
                for line in following.stdout:
                    event = json.loads(line)
                    seen.append(event["event"])
                    assert abs(event["time"] - time.time()) < 60
                    if event["event"] == "recovered":
                        break
            finally:
                following.kill()
        assert seen[:2] == ["device-added", "standby-entered"]
        for wanted in ("parked", "replace-started", "replace-step", "recovered"):
            assert wanted in seen


@pytest.mark.parametrize("mode", ["reopen", "command"])
def test_a_daemon_ends_while_it_tries(mode: str, storage: FaultFs, tmp_path: Path) -> None:
    """In standby with a request that waits: exit code 8, soon, and the program has gone, too."""
    thin_image(storage.source / "disk.hds")
    pid = tmp_path / "pid"
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\necho $$ >{pid}\nsleep 60\n")
    hook.chmod(0o755)
    options: tuple[str, ...] = ("--recovery", mode)
    if mode == "command":
        options += ("--recovery-command", str(hook))
    served = storage.mountpoint / "disk.hds"
    with ServeProcess(served, directory=tmp_path, options=options) as server:
        (device,) = server.device_names()
        with Initiator(server.url) as initiator:
            initiator.settle()
            storage.fail("disk.hds", "*", errno=errno.EIO)
            initiator.write(0, bytes([1]) * 4096)
            assert initiator.poll(0.3) == []
            wait_for_standby(server, device, "on", 10)
            deadline = time.monotonic() + 10
            while mode == "command" and not (pid.exists() and pid.read_text().strip()):
                assert time.monotonic() < deadline, "the program does not run"
                time.sleep(0.05)
            began = time.monotonic()
            assert server.stop(timeout=40) == 8, server.stderr[-2000:]
            assert time.monotonic() - began < 30
        assert "Traceback" not in server.stderr
    if mode == "command":
        assert not Path(f"/proc/{pid.read_text().strip()}").exists()
