"""kill -9 after the single steps of a resize: what opens next has the old size or the new one."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from image_format import PvdHeader
from tests.support import images, oracles
from tests.support.images import MIB
from tests.support.initiator import Initiator
from tests.support.serve import ServeProcess
from tests.support.system_calls import Stepper

pytestmark = [pytest.mark.functional, pytest.mark.timeout(600)]

SIZE = 16 * MIB
LARGE = 3072 * MIB
CLUSTER = 64 << 10
MOST_CALLS = 60
STRIDE = 7
"""Of how many calls one is chosen."""


@pytest.fixture(scope="module", autouse=True)
def strace() -> None:
    if oracles.have("strace"):
        pytest.skip("strace is not installed: apt-get install strace")


def make_chain(directory: Path) -> Path:
    """Clusters of the top are in the way; returns the content."""
    generator = random.Random(1)
    content = bytearray(SIZE)
    for name, numbers in (("base.hds", range(0, 64, 3)), ("top.hds", range(0, 64, 5))):
        clusters = {number: generator.randbytes(CLUSTER) for number in numbers}
        images.write_delta(
            directory / name, SIZE, clusters, cluster_size=CLUSTER, order=tuple(clusters)
        )
        for number, data in clusters.items():
            content[number * CLUSTER : (number + 1) * CLUSTER] = data
    rows = [(images.guid(1), "Compressed", "base.hds"), (images.TOP_GUID, "Compressed", "top.hds")]
    images.write_descriptor(directory, SIZE, rows, cluster_size=CLUSTER)
    raw = directory.parent / "content.raw"
    raw.write_bytes(content)
    return raw


def kill_one(directory: Path, number: int) -> tuple[bool, list[str]]:
    """Serve, resize, kill after call `number`; whether the resize had ended before, and the
    calls."""
    names = ("DiskDescriptor.xml", "DiskDescriptor.xml.resize", "top.hds", "base.hds")
    paths = [directory, *(directory / name for name in names)]
    log = directory.parent / "strace.log"
    log.unlink(missing_ok=True)
    descriptor = directory / "DiskDescriptor.xml"
    options = ("--io", "threads")
    with ServeProcess(descriptor, directory=directory.parent, options=options) as server:
        with Stepper(server.pid, paths, log) as stepper:
            command = [sys.executable, "-m", "ploopd.cli.ploopctl"]
            command += ["--control", str(server.control), "device", "resize", "disk"]
            command += ["--size", str(LARGE)]
            resize = subprocess.Popen(command, text=True, stderr=subprocess.PIPE)
            stepper.kill_after(number, resize)
            _, said = resize.communicate(timeout=30)
        server.kill()
    return "release" in said, stepper.calls


def judge(directory: Path, raw: Path) -> int:
    """What lies there is a disk, for QEMU and for the next daemon; returns its size."""
    copy = directory.parent / "dead.hds"
    assert oracles.bat_problems(directory / "top.hds") == []
    shutil.copyfile(directory / "top.hds", copy)
    size = PvdHeader.parse(copy.read_bytes()[:64]).size
    with copy.open("r+b") as file:  # qemu-img calls the in-use word itself a corruption
        file.seek(44)
        file.write(bytes(4))
    oracles.run("qemu-img", "check", "-f", "parallels", str(copy), accept=(0, 3))  # 3: leaks
    descriptor = directory / "DiskDescriptor.xml"
    with ServeProcess(descriptor, directory=directory.parent) as server:
        (told,) = server.ctl_json("device", "list")
        assert told["size"] == size
        with Initiator(server.url) as initiator:
            initiator.settle()
            for lba in range(0, SIZE // 512, 2048):
                expected = raw.read_bytes()[lba * 512 : (lba + 2048) * 512]
                assert initiator.good(initiator.read(lba, 2048)) == expected
            initiator.good(initiator.write(size // 512 - 8, b"\x5a" * 4096))
        server.ctl("device", "resize", "disk", "--size", str(LARGE + CLUSTER))
        assert server.stop() == 0, server.stderr[-3000:]
    oracles.qemu_check(directory / "top.hds")
    return size


def test_killed_after_its_steps_the_disk_has_the_old_or_the_new_size(tmp_path: Path) -> None:
    found: dict[int, int] = {}
    calls: list[str] = []
    for number in range(1, MOST_CALLS, STRIDE):
        directory = tmp_path / str(number) / "disk"
        directory.mkdir(parents=True)
        raw = make_chain(directory)
        finished, calls = kill_one(directory, number)
        found[number] = judge(directory, raw)
        shutil.rmtree(directory.parent)
        if finished:
            break
    told = "\n".join(calls)
    assert set(found.values()) == {SIZE, LARGE}, told
    assert list(found.values()) == sorted(found.values()), told
    assert len(found) > 3, told
