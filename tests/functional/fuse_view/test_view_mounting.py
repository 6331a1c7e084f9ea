"""Mounting the view and taking it away again."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.functional.conftest import Serve
from tests.functional.fuse_view.conftest import SIZE, sh
from tests.support import images
from tests.support.initiator import Initiator
from tests.support.serve import ServeError, ServeProcess

pytestmark = [pytest.mark.functional, pytest.mark.fuse, pytest.mark.timeout(120)]


def test_what_a_killed_daemon_left_mounted_is_cleaned_up(
    tmp_path: Path, view: Callable[..., ServeProcess], directory: Path
) -> None:
    image = images.write_delta(tmp_path / "disk.hds", SIZE, {}, cluster_size=65536)
    server = view(image)
    held = os.open(directory / "disk/disk", os.O_RDONLY)
    server.kill()
    with pytest.raises(OSError) as stale:
        os.listdir(directory)
    assert stale.value.errno == errno.ENOTCONN
    again = view(image)
    assert (directory / "block/disk/queue/standby").read_text() == "off\n"
    with contextlib.suppress(OSError):  # its file system is gone
        os.close(held)
    assert again.stop() == 0


def test_it_stops_although_somebody_uses_it(running: ServeProcess, directory: Path) -> None:
    held = os.open(directory / "disk/disk", os.O_RDWR)
    inside = subprocess.Popen(["sleep", "60"], cwd=directory / "block/disk/queue")
    try:
        os.pwrite(held, b"written", 0)
        began = time.monotonic()
        assert running.stop() == 0
        assert time.monotonic() - began < 10
        assert not os.path.ismount(directory)
        with pytest.raises(OSError):
            os.pread(held, 10, 0)
    finally:
        os.close(held)
        inside.kill()
        inside.wait()
    assert "view-still-used" in running.stderr


def test_unmounted_from_outside_the_disks_are_still_served(
    running: ServeProcess, directory: Path
) -> None:
    sh(f"fusermount3 -u {directory}", cwd=directory.parent)
    with Initiator(running.url) as initiator:
        initiator.settle()
        initiator.good(initiator.write(0, b"x" * 512))
    assert running.stop() == 0
    assert "view-ended" in running.stderr


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing", "does not exist"),
        ("file", "is not a directory"),
        ("full", "is not empty"),
    ],
)
def test_a_directory_that_cannot_be_used(
    tmp_path: Path, serve: Serve, name: str, says: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    (tmp_path / "file").touch()
    image = images.write_delta(tmp_path / "disk.hds", SIZE, {})
    before = image.read_bytes()
    with pytest.raises(ServeError) as refused:
        serve(image, options=("--sysfs", str(tmp_path / name)))
    problems = [line for line in refused.value.stderr.splitlines() if "INFO" not in line]
    assert len(problems) == 1
    assert f"{tmp_path / name}: {says}" in problems[0]
    assert "sysfs = " in problems[0]
    assert image.read_bytes() == before, "a start that is refused changes nothing"


def test_a_directory_that_another_daemon_uses(
    tmp_path: Path, running: ServeProcess, serve: Serve, directory: Path
) -> None:
    other = images.write_delta(tmp_path / "other.hds", SIZE, {})
    with pytest.raises(ServeError, match="mounted there already"):
        serve(other, options=("--sysfs", str(directory)))
    assert (directory / "block/disk/queue/standby").read_text() == "off\n"


def test_without_pyfuse3_it_says_what_to_install(
    tmp_path: Path, serve: Serve, directory: Path
) -> None:
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    (lacking / "pyfuse3.py").write_text("raise ImportError('No module named pyfuse3')\n")
    image = images.write_delta(tmp_path / "disk.hds", SIZE, {})
    root = str(Path(__file__).resolve().parents[3])
    with pytest.raises(ServeError, match=r"pip install 'ploopd\[fuse\]'") as refused:
        serve(
            image,
            options=("--sysfs", str(directory)),
            env={"PYTHONPATH": f"{lacking}{os.pathsep}{root}"},
        )
    assert refused.value.returncode == 16
