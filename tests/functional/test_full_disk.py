"""A file system that runs full under a thin image: writes end with 07/27/07, nothing is damaged,
and they go on when there is room again.

Needs root, to mount a small file system of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import oracles
from tests.support.images import MIB
from tests.support.initiator import CHECK_CONDITION, GOOD, Answer, Initiator
from tests.support.serve import ServeProcess

pytestmark = [
    pytest.mark.functional,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a file system"),
]

BLOCKS = MIB // 512


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)


@pytest.fixture(params=["tmpfs", "ext4"])
def small_file_system(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A mounted file system of 48 MiB."""
    mountpoint = tmp_path / "small"
    mountpoint.mkdir()
    try:
        if request.param == "tmpfs":
            run("mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", mountpoint)
        else:
            if shutil.which("mkfs.ext4") is None or not Path("/dev/loop-control").exists():
                pytest.skip("needs mkfs.ext4 and loop devices")
            image = tmp_path / "ext4"
            with image.open("wb") as file:
                file.truncate(48 * MIB)
            run("mkfs.ext4", "-q", "-F", "-m", "0", image)
            run("mount", "-o", "loop", image, mountpoint)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"mount: {error.stderr}")
    yield mountpoint
    subprocess.run(["umount", "-l", mountpoint], check=False, capture_output=True)


def pattern(index: int) -> bytes:
    return bytes([index % 251 + 1]) * MIB


def write(initiator: Initiator, index: int) -> Answer:
    """Write megabyte `index` of the disk."""
    return initiator.wait(initiator.write(index * BLOCKS, pattern(index)))


def test_no_space_is_reported_as_such_and_passes(small_file_system: Path, tmp_path: Path) -> None:
    if oracles.have("qemu-img", "qemu-io"):
        pytest.skip("not installed: apt-get install qemu-utils")
    ballast = small_file_system / "ballast"
    image = small_file_system / "thin.hds"
    ballast.write_bytes(bytes(24 * MIB))
    oracles.run("qemu-img", "create", "-q", "-f", "parallels", str(image), "256M")
    with ServeProcess(image, directory=tmp_path) as server:
        written = fill_and_go_on(server, ballast)
        assert server.stop() == 0, server.stderr
    assert oracles.bat_problems(image) == []
    assert oracles.qemu_check(image).get("corruptions", 0) == 0
    raw = tmp_path / "out.raw"
    oracles.run("qemu-img", "convert", "-f", "parallels", "-O", "raw", str(image), str(raw))
    with raw.open("rb") as file:
        for index in written:
            assert file.read(MIB) == pattern(index), f"megabyte {index} differs"


def fill_and_go_on(server: ServeProcess, ballast: Path) -> list[int]:
    """Write until there is no room, make room, write more; returns the megabytes written."""
    with Initiator(server.url) as initiator:
        initiator.settle()
        written: list[int] = []
        failure = None
        for index in range(64):
            answer = write(initiator, index)
            if answer.status != GOOD:
                failure = answer
                break
            written.append(index)
        assert failure is not None, "the file system never ran full"
        assert failure.status == CHECK_CONDITION
        assert failure.sense_text == "sense 07/27/07"
        assert len(written) >= 8
        # What was allocated can still be written and read, and the device has not gone to standby.
        assert write(initiator, 0).status == GOOD
        assert initiator.good(initiator.read(BLOCKS, BLOCKS)) == pattern(1)
        assert server.standby("thin") == "off"
        for index in range(len(written) + 1, len(written) + 4):
            assert write(initiator, index).sense_text == "sense 07/27/07"
        details = server.ctl_json("device", "show", "thin")
        assert "No space left" in details["full"]
        assert (details["state"], details["latched"]) == ("active", None)
        assert events(server) == ["space-exhausted"]
        ballast.unlink()
        for index in range(len(written), len(written) + 8):
            assert write(initiator, index).status == GOOD
            written.append(index)
        initiator.good(initiator.synchronize_cache())
        assert server.ctl_json("device", "show", "thin")["full"] is None
        assert events(server) == ["space-exhausted", "space-returned"]
    return written


def events(server: ServeProcess) -> list[str]:
    """What the log says of the room there is."""
    return re.findall(r"event=(space-\S+)", server.stderr)
