"""`ploopctl device replace`, `reload` and `clear-latch` on a running daemon, and everything wrong
that can be asked of them: one clear message, the image untouched, the device as it was."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from ploopd.control import messages
from ploopd.control.client import ControlClient
from tests.support import images, oracles
from tests.support.faultfs import FaultFs
from tests.support.images import MIB
from tests.support.initiator import Initiator
from tests.support.serve import ServeProcess

pytestmark = [pytest.mark.functional, pytest.mark.timeout(120)]

SIZE = 16 * MIB
CLUSTER = 64 << 10
IN_USE = (0x746F6E59).to_bytes(4, "little")


def delta(path: Path, *, size: int = SIZE, cluster_size: int = CLUSTER, version: int = 2) -> Path:
    return images.write_delta(path, size, {}, cluster_size=cluster_size, version=version)


def make_chain(directory: Path, first: int = 1) -> Path:
    """A base with some data and an empty top; `first` chooses the base's GUID."""
    directory.mkdir(parents=True, exist_ok=True)
    clusters = {index: bytes([index + 1]) * CLUSTER for index in range(20)}
    images.write_delta(directory / "base.hds", SIZE, clusters, cluster_size=CLUSTER)
    delta(directory / "top.hds")
    rows = [
        (images.guid(first), "Compressed", "base.hds"),
        (images.TOP_GUID, "Compressed", "top.hds"),
    ]
    return images.write_descriptor(directory, SIZE, rows, cluster_size=CLUSTER)


def dirty(path: Path) -> Path:
    delta(path)
    with path.open("r+b") as file:
        file.seek(44)
        file.write(IN_USE)
    return path


def link_to(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def garbage(path: Path) -> Path:
    path.write_bytes(b"neither header nor table " * 10000)
    return path


def broken(path: Path) -> Path:
    """Two entries of its BAT name one cluster."""
    clusters = dict.fromkeys(range(4), b"d" * CLUSTER)
    images.write_delta(path, SIZE, clusters, cluster_size=CLUSTER)
    data = bytearray(path.read_bytes())
    data[64:68] = data[68:72]
    path.write_bytes(data)
    return path


def outside(path: Path) -> Path:
    return delta(path.parent.parent / path.name)


WRONG: dict[str, tuple[Callable[[Path], Path], int, str]] = {
    "missing": (lambda path: path, 4, "no such file or directory"),
    "smaller disk": (lambda path: delta(path, size=SIZE // 2), 2, "its disk size must be 16777216"),
    "larger disk": (lambda path: delta(path, size=SIZE * 2), 2, "its disk size must be 16777216"),
    "cluster size": (
        lambda path: delta(path, cluster_size=2 * CLUSTER),
        2,
        "its cluster size must be 65536",
    ),
    "version": (lambda path: delta(path, version=1), 2, "its format version must be 2"),
    "dirty": (dirty, 14, "was not closed cleanly, or is in use on another host"),
    "directory": (lambda path: path.parent, 16, "is not a regular file"),
    "FIFO": (fifo, 16, "is not a regular file"),
    "device node": (lambda _: Path("/dev/null"), 16, "is not a regular file"),
    "garbage": (garbage, 11, "garbage.hds"),
    "broken map": (broken, 12, "names a cluster that another entry has"),
    "out of the directory": (outside, 13, "--keep-descriptor"),
    "link out of the directory": (
        lambda path: link_to(path, delta(path.parent.parent / "linked.hds")),
        13,
        "leads out of its directory through a symbolic link",
    ),
    "lower delta": (lambda path: path.with_name("base.hds"), 2, "is the delta of level 1"),
    "other chain": (
        lambda path: make_chain(path.parent.parent / "foreign", 7).with_name("top.hds"),
        2,
        "of another chain",
    ),
}


def fingerprint(*directories: Path) -> dict[str, str]:
    """Content, size and names of everything below the directories."""
    found = {}
    for directory in directories:
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def state(server: ServeProcess) -> str:
    """What `ploopctl device standby disk show` prints, without another process."""
    with ControlClient(server.control) as client:
        return client.call(
            messages.STANDBY_SHOW,
            messages.StandbyState,
            messages.DeviceName(name="disk"),
            waiting="the state",
        ).standby


def refused(server: ServeProcess, image: Path, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = ("device", "replace", "disk", "--image", str(image), *options)
    result = server.ctl(*arguments, check=False)
    assert result.returncode, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("ploopctl:")]
    assert len(errors) == 1, result.stderr
    return result


@pytest.mark.parametrize("standby", ["off", "on"])
def test_every_wrong_image_is_refused_with_one_message(standby: str, tmp_path: Path) -> None:
    root = tmp_path / "images"
    descriptor = make_chain(root / "disk")
    with ServeProcess(descriptor, directory=tmp_path) as server:
        if standby == "on":
            server.ctl("device", "standby", "disk", "enter")
        for kind, (make, code, words) in WRONG.items():
            image = make(root / "disk" / f"{kind.replace(' ', '-')}.hds")
            before = fingerprint(root)
            result = refused(server, image)
            assert result.returncode == code, f"{kind}: {result.stderr}"
            assert words in result.stderr, f"{kind}: {result.stderr}"
            assert state(server) == standby, kind
            assert fingerprint(root) == before, kind
        result = refused(server, root / "disk/dirty.hds", "--dry-run")
        assert result.returncode == 14
        details = server.ctl_json("device", "show", "disk")
        assert [each["path"] for each in details["layers"]] == [
            str(root / "disk/top.hds"),
            str(root / "disk/base.hds"),
        ]
        identity = details["identity"]
        report = server.ctl_json(
            "device", "replace", "disk", "--image", str(root / "disk/dirty.hds"), "--force"
        )
        assert (report["image"], report["identity"]) == (str(root / "disk/dirty.hds"), identity)
        assert server.standby("disk") == "off"
        with Initiator(server.url) as initiator:
            initiator.settle()
            assert initiator.good(initiator.read(0, 8)) == b"\x01" * 4096
            initiator.logout()
        assert server.stop() == 0
        assert "Traceback" not in server.stderr
    assert b"<File>dirty.hds</File>" in descriptor.read_bytes()


@pytest.mark.parametrize("holder", ["another device", "another ploopd", "QEMU"])
def test_an_image_that_somebody_else_writes_is_refused(holder: str, tmp_path: Path) -> None:
    disk, other = delta(tmp_path / "disk.hds"), delta(tmp_path / "other.hds")
    served = [disk, other] if holder == "another device" else [disk]
    with ServeProcess(*served, directory=tmp_path) as server, Holding(holder, other, tmp_path):
        before = fingerprint(tmp_path)
        for wanted in ("off", "on"):
            if wanted == "on":
                server.ctl("device", "standby", "disk", "enter")
            result = refused(server, other, "--force")
            assert result.returncode == 6
            assert "is in use" in result.stderr
            assert state(server) == wanted
        after = fingerprint(tmp_path)
        assert {name: after[name] for name in after if name.endswith(".hds")} == {
            name: before[name] for name in before if name.endswith(".hds")
        }
        server.ctl("device", "replace", "disk", "--image", str(disk))
        assert server.standby("disk") == "off"


class Holding:
    """Somebody has the image open for writing."""

    def __init__(self, holder: str, image: Path, directory: Path) -> None:
        self._holder, self._image, self._directory = holder, image, directory
        self._server: ServeProcess | None = None
        self._qemu: subprocess.Popen[str] | None = None

    def __enter__(self) -> None:
        if self._holder == "another ploopd":
            place = self._directory / "second"
            place.mkdir()
            self._server = ServeProcess(self._image, directory=place).start()
        elif self._holder == "QEMU":
            command = ["qemu-io", "-f", "parallels", str(self._image)]
            self._qemu = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            assert self._qemu.stdin is not None
            self._qemu.stdin.write("write 0 4k\n")
            self._qemu.stdin.flush()
            deadline = time.monotonic() + 10
            while oracles.in_use_word(self._image) == 0:
                assert time.monotonic() < deadline, "qemu-io does not write"
                time.sleep(0.01)
            time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.__exit__(None, None, None)
        if self._qemu is not None:
            self._qemu.communicate("quit\n", timeout=10)


@pytest.mark.fuse
def test_an_image_on_the_same_dead_storage(storage: FaultFs, tmp_path: Path) -> None:
    delta(storage.source / "disk.hds")
    delta(storage.source / "copy.hds")
    with ServeProcess(storage.mountpoint / "disk.hds", directory=tmp_path) as server:
        with Initiator(server.url) as initiator:
            initiator.settle()
            storage.fail("disk.hds", "write", "fsync", "read", errno=errno.EIO)
            storage.fail("copy.hds", "write", "fsync", "read", errno=errno.EIO)
            tag = initiator.write(0, bytes([5]) * 4096)
            assert initiator.poll(0.3) == []
            wait_for(server, "on")
            for name in ("copy.hds", "disk.hds"):
                result = refused(server, storage.mountpoint / name)
                assert result.returncode == 1
                assert "EIO" in result.stderr
                assert server.standby("disk") == "on"
            storage.clear()
            server.ctl("device", "replace", "disk", "--image", str(storage.mountpoint / "disk.hds"))
            initiator.good(tag)
            assert initiator.good(initiator.read(0, 8)) == bytes([5]) * 4096
            initiator.logout()
        assert server.stop() == 0


def wait_for(server: ServeProcess, state: str) -> None:
    server.ctl("device", "standby", "disk", "wait", "--state", state, "--timeout", "10")


@pytest.mark.fuse
def test_the_second_of_two_is_refused_while_the_first_drains(
    storage: FaultFs, tmp_path: Path
) -> None:
    delta(storage.source / "disk.hds")
    copy = delta(tmp_path / "copy.hds")
    with ServeProcess(storage.mountpoint / "disk.hds", directory=tmp_path) as server:
        with Initiator(server.url) as initiator:
            initiator.settle()
            storage.hang("disk.hds", "write", "fsync", "read")
            tag = initiator.write(0, bytes([6]) * 4096)
            assert initiator.poll(0.3) == []
            command = [sys.executable, "-m", "ploopd.cli.ploopctl", "--control"]
            command += [str(server.control), "device", "replace", "disk", "--image", str(copy)]
            first = subprocess.Popen(command, text=True, stderr=subprocess.PIPE)
            assert first.stderr is not None
            while "stop admission" not in first.stderr.readline():
                assert first.poll() is None
            for arguments in (("replace", "disk", "--image", str(copy)), ("reload", "disk")):
                result = server.ctl("device", *arguments, check=False)
                assert result.returncode == 6
                assert "is being replaced already" in result.stderr
            _, said = first.communicate(timeout=30)
            assert first.returncode == 0, said
            assert "the hung ones were disowned" in said
            initiator.good(tag)
            assert initiator.good(initiator.read(0, 8)) == bytes([6]) * 4096
            initiator.logout()
        storage.clear()
        assert server.stop() == 0


# -- what the operating system refuses -----------------------------------------------------


def mounted(place: Path, *arguments: str) -> Path:
    place.mkdir()
    command = ["mount", *arguments, str(place)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"mount: {result.stderr}")
    return place


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a file system")
def test_a_full_disk_at_the_descriptor(tmp_path: Path) -> None:
    small = mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=8m", "tmpfs")
    try:
        descriptor = make_chain(small / "disk")
        shutil.copyfile(small / "disk/top.hds", small / "disk/new.hds")
        with ServeProcess(descriptor, directory=tmp_path) as server:
            fill(small / "filler")
            before = fingerprint(small / "disk")
            result = refused(server, small / "disk/new.hds")
            assert result.returncode == 10
            assert "DiskDescriptor.xml" in result.stderr
            assert "No space left" in result.stderr
            assert server.standby("disk") == "off"
            assert fingerprint(small / "disk") == before
            (small / "filler").unlink()
            server.ctl("device", "replace", "disk", "--image", str(small / "disk/new.hds"))
            assert server.stop() == 0
        assert b"<File>new.hds</File>" in descriptor.read_bytes()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)


def fill(path: Path) -> None:
    """Take every block that is left."""
    with path.open("wb", buffering=0) as file:
        for size in (65536, 4096, 512):
            with pytest.raises(OSError, match="No space left"):
                _write_for_ever(file, b"x" * size)


def _write_for_ever(file: BinaryIO, data: bytes) -> None:
    while True:
        file.write(data)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a file system")
def test_an_image_on_a_read_only_file_system(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    delta(source / "new.hds")
    place = mounted(tmp_path / "mounted", "--bind", str(source))
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
        disk = delta(tmp_path / "disk.hds")
        with ServeProcess(disk, directory=tmp_path) as server:
            result = refused(server, place / "new.hds")
            assert result.returncode == 9
            assert "is on a read-only file system" in result.stderr
            assert server.standby("disk") == "off"
            assert server.stop() == 0
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_an_image_or_a_directory_without_permission(tmp_path: Path) -> None:
    if oracles.have("setpriv"):
        pytest.skip("setpriv is not installed")
    place = Path("/tmp") / f"ploopd-test-{os.getpid()}"
    place.mkdir()
    try:
        descriptor = make_chain(place / "disk")
        new = delta(place / "disk/new.hds")
        for path in (place, *place.rglob("*")):
            os.chown(path, 65534, 65534)
        os.chown(new, 0, 0)
        new.chmod(0o600)
        nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")
        with served_by(nobody, descriptor, place) as server:
            result = refused(server, new)
            assert (result.returncode, "permission denied" in result.stderr) == (5, True)
            os.chown(new, 65534, 65534)
            os.chown(place / "disk", 0, 0)
            result = refused(server, new)
            assert result.returncode == 5
            assert "cannot be written beside it" in result.stderr
            assert server.standby("disk") == "off"
            os.chown(place / "disk", 65534, 65534)
            server.ctl("device", "replace", "disk", "--image", str(new))
            assert server.stop() == 0
    finally:
        shutil.rmtree(place)


def served_by(user: tuple[str, ...], image: Path, place: Path) -> ServeProcess:
    server = ServeProcess(image, directory=place, prefix=user)
    os.chown(server.control.parent, 65534, 65534)
    return server


# -- what works ----------------------------------------------------------------------------


def test_a_dry_run_a_replace_and_a_reload_from_the_command_line(tmp_path: Path) -> None:
    descriptor = make_chain(tmp_path / "disk")
    new = tmp_path / "disk/new.hds"
    shutil.copyfile(tmp_path / "disk/base.hds", new)
    with ServeProcess(descriptor, directory=tmp_path) as server:
        arguments = ("device", "replace", "disk", "--image", str(new), "--level", "1")
        before = fingerprint(tmp_path / "disk")
        tried = server.ctl(*arguments, "--dry-run", "--output", "json")
        assert json.loads(tried.stdout)["dry_run"] is True
        assert "record: would do: DiskDescriptor.xml names new.hds" in tried.stderr
        assert tried.stderr.endswith("nothing was changed\n")
        assert fingerprint(tmp_path / "disk") == before
        done = server.ctl(*arguments, "--output", "json")
        report = json.loads(done.stdout)
        assert (report["level"], report["guid"]) == (1, images.guid(1))
        assert (report["image"], report["previous"]) == (str(new), str(tmp_path / "disk/base.hds"))
        names = [step["step"] for step in report["steps"]]
        assert names[0] == "check"
        assert names[-3:] == ["record", "swap", "release"]
        for name in names:
            assert f"s  {name}" in done.stderr
        reloaded = server.ctl_json("device", "reload", "disk")
        assert reloaded["level"] is None
        assert reloaded["identity"] == report["identity"]
        both = server.ctl(*arguments, "--guid", images.guid(1), check=False)
        assert (both.returncode, "not both" in both.stderr) == (2, True)
        assert server.stop() == 0


@pytest.mark.fuse
def test_a_latch_is_shown_and_cleared(storage: FaultFs, tmp_path: Path) -> None:
    delta(storage.source / "disk.hds")
    image = storage.mountpoint / "disk.hds"
    with ServeProcess(image, directory=tmp_path, options=("--standby", "off")) as server:
        result = server.ctl("device", "clear-latch", "disk", check=False)
        assert (result.returncode, "is not latched" in result.stderr) == (6, True)
        with Initiator(server.url) as initiator:
            initiator.settle()
            initiator.good(initiator.write(0, bytes([1]) * 4096))
            storage.fail("disk.hds", "write", errno=errno.EIO)
            assert initiator.wait(initiator.write(0, bytes([2]) * 4096)).status != 0
            storage.clear()
            answer = initiator.wait(initiator.write(0, bytes([3]) * 4096))
            assert answer.sense_text.startswith("sense 07/27/")
            latched = server.ctl_json("device", "show", "disk")["latched"]
            assert "Input/output error" in latched
            assert "latched:" in server.ctl("device", "show", "disk").stdout
            cleared = server.ctl("device", "clear-latch", "disk")
            assert "was latched by" in cleared.stderr
            assert server.ctl_json("device", "show", "disk")["latched"] is None
            initiator.good(initiator.write(0, bytes([4]) * 4096))
            assert initiator.good(initiator.read(0, 8)) == bytes([4]) * 4096
            initiator.logout()
        assert server.stop() == 0
