"""Locks against ourselves, against QEMU's own programs, and as libploop asks for them."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ploopd.errors import LockedError
from ploopd.fileio.locks import lock_image, unlock_image

needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-io") is None, reason="needs qemu-io (qemu-utils)"
)
CLAIMS = {
    "writer": {"writer": True},
    "reader": {"writer": False},
    "base": {"writer": False, "base": True},
}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.hdd"
    if shutil.which("qemu-img") is None:
        path.write_bytes(bytes(1 << 20))
    else:
        command = ["qemu-img", "create", "-q", "-f", "parallels", str(path), "16M"]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path


@contextmanager
def locked(path: Path, claim: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR if claim == "writer" else os.O_RDONLY)
    try:
        lock_image(fd, path=str(path), **CLAIMS[claim])
        yield fd
    finally:
        os.close(fd)


@contextmanager
def qemu_io(path: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A qemu-io that has the image open."""
    process = subprocess.Popen(
        ["qemu-io", *options, "-f", "parallels", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write("length\n")
        process.stdin.flush()
        process.stdout.readline()
        assert process.poll() is None
        yield process
    finally:
        process.communicate("quit\n", timeout=10)


def qemu_opens(path: Path, *options: str) -> bool:
    """Does QEMU get the image?"""
    result = subprocess.run(
        ["qemu-io", *options, "-c", "length", "-f", "parallels", str(path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    if result.returncode != 0:
        assert "lock" in result.stderr
    return result.returncode == 0


@pytest.mark.parametrize("second", CLAIMS)
@pytest.mark.parametrize("first", CLAIMS)
def test_only_readers_share(image: Path, first: str, second: str) -> None:
    # A base is libploop's exclusive lock as well: it also excludes readers that come later.
    allowed = (first, second) in {("reader", "reader"), ("reader", "base")}
    with locked(image, first):
        if allowed:
            with locked(image, second):
                return
        with pytest.raises(LockedError, match="in use by this process"), locked(image, second):
            pass
    with locked(image, second):  # free when the first has closed
        pass


def test_a_refusal_leaves_no_lock_behind(image: Path) -> None:
    with locked(image, "reader"):
        fd = os.open(image, os.O_RDWR)
        with pytest.raises(LockedError):
            lock_image(fd, path=str(image), writer=True)
        with locked(image, "reader"):
            pass
        os.close(fd)


def test_closing_another_descriptor_keeps_the_lock(image: Path) -> None:
    with locked(image, "writer"):
        os.close(os.open(image, os.O_RDWR))
        with pytest.raises(LockedError), locked(image, "reader"):
            pass


def test_unlocking(image: Path) -> None:
    with locked(image, "writer") as fd:
        unlock_image(fd)
        with locked(image, "writer"):
            pass


def test_flock_of_a_shell_is_seen_and_named(image: Path) -> None:
    if shutil.which("flock") is None:
        pytest.skip("needs flock (util-linux)")
    command = ["flock", "--exclusive", str(image), "sh", "-c", "echo; read line"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(LockedError, match=r"process \d+ \(flock\)"), locked(image, "writer"):
            pass
        process.communicate("\n")


def libploop_finds_it_busy(path: Path) -> bool:
    """libploop's test: could bytes 200–204 be write-locked (POSIX F_GETLK)?"""
    code = (
        "import fcntl, os, struct, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "ask = struct.pack('hhqqi4x', fcntl.F_WRLCK, os.SEEK_SET, 200, 5, 0)\n"
        "kind = struct.unpack('hhqqi4x', fcntl.fcntl(fd, fcntl.F_GETLK, ask))[0]\n"
        "sys.exit(kind != fcntl.F_UNLCK)\n"
    )

    return subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 1


@pytest.mark.parametrize("claim", CLAIMS)
def test_libploop_sees_our_lock(image: Path, claim: str) -> None:
    assert not libploop_finds_it_busy(image)
    with locked(image, claim):
        assert libploop_finds_it_busy(image)


@pytest.mark.parametrize("claim", CLAIMS)
def test_we_see_libploops_lock(image: Path, claim: str) -> None:
    fd = os.open(image, os.O_RDWR)
    request = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 200, 5, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    with pytest.raises(LockedError, match="not shared"), locked(image, claim):
        pass
    os.close(fd)


@needs_qemu
def test_qemu_is_kept_out_of_what_we_write(image: Path) -> None:
    with locked(image, "writer"):
        assert not qemu_opens(image)
        assert not qemu_opens(image, "-r")
    assert qemu_opens(image)


@needs_qemu
def test_qemu_may_read_what_we_read(image: Path) -> None:
    with locked(image, "reader"):
        assert qemu_opens(image, "-r")
        assert not qemu_opens(image)


@needs_qemu
def test_qemu_is_kept_out_of_a_base(image: Path) -> None:
    with locked(image, "base"):
        assert not qemu_opens(image)


@needs_qemu
def test_a_writing_qemu_keeps_everybody_out_and_is_named(image: Path) -> None:
    with qemu_io(image) as process:
        for claim in CLAIMS:
            with pytest.raises(LockedError) as caught, locked(image, claim):
                pass
            assert f"process {process.pid} (qemu-io)" in str(caught.value)
            assert str(image) in str(caught.value)
    with locked(image, "writer"):
        pass


@needs_qemu
def test_a_reading_qemu_keeps_writers_out(image: Path) -> None:
    with qemu_io(image, "-r"):
        with pytest.raises(LockedError, match="qemu-io"), locked(image, "writer"):
            pass
        with locked(image, "reader"):
            pass
        with locked(image, "base"):
            pass


def test_whoever_is_named_no_file_of_others_is_asked(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of other processes may lie on a storage that never answers a stat."""
    stat = os.stat

    def watched(path: str | Path, **options: bool) -> os.stat_result:
        assert not str(path).startswith("/proc/"), f"{path} was asked"
        return stat(path, **options)

    with locked(image, "writer"):
        monkeypatch.setattr(os, "stat", watched)
        with pytest.raises(LockedError, match="in use by this process"), locked(image, "writer"):
            pass
