"""The view, used as people use sysfs; and no odd access breaks it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.functional.fuse_view.conftest import SIZE, sh
from tests.support import images
from tests.support.serve import ServeProcess

pytestmark = [pytest.mark.functional, pytest.mark.fuse, pytest.mark.timeout(120)]


def test_ls_cat_stat_find_and_grep(
    tmp_path: Path, view: Callable[..., ServeProcess], directory: Path
) -> None:
    server = view(
        images.write_delta(tmp_path / "one.hds", SIZE, {}, cluster_size=65536),
        images.qemu_image(tmp_path, "two.raw", images.make_content(tmp_path / "c", SIZE, seed=1)),
    )
    assert sh("ls block", cwd=directory).split() == ["one", "two"]
    assert sh("readlink block/one", cwd=directory) == "../devices/virtual/block/one\n"
    assert sh("cat block/one/queue/standby", cwd=directory) == "off\n"
    assert sh("cat devices/virtual/block/two/queue/standby", cwd=directory) == "off\n"
    assert sh("cat block/one/size block/one/ro", cwd=directory) == f"{SIZE // 512}\n0\n"
    assert sh("stat -c '%A %s %F' block/one/size", cwd=directory) == (
        "-r--r--r-- 4096 regular file\n"
    )
    assert sh("stat -c '%A %s' disk/one", cwd=directory) == f"-rw------- {SIZE}\n"
    found = sh("find . -type f", cwd=directory).split()
    assert len(found) >= 80
    assert sh("find . -L -name nothing", cwd=directory, check=False)
    told = sh("grep -r . devices", cwd=directory).splitlines()
    assert f"devices/virtual/block/one/pdelta/0/image:{tmp_path}/one.hds" in told
    assert sh("ls -laR . | grep -c '?'", cwd=directory, check=False) == "0\n"
    first = sh("find . -printf '%p %i\\n' | sort", cwd=directory)
    assert first == sh("find . -printf '%p %i\\n' | sort", cwd=directory)
    assert sh("df .", cwd=directory)
    assert server.stop() == 0
    assert not os.path.ismount(directory)
    assert list(directory.iterdir()) == []


def test_standby_cannot_be_written_and_says_so_as_sysfs_does(disk: Path, directory: Path) -> None:
    said = sh("echo off > block/disk/queue/standby", cwd=directory, check=False)
    assert "Permission denied" in said


def test_what_may_be_tuned(disk: Path, directory: Path) -> None:
    park_max = directory / "block/disk/ptune/park_max"
    assert park_max.read_text() == "20\n"
    sh("echo 7.5 > block/disk/ptune/park_max", cwd=directory)
    assert park_max.read_text() == "7.5\n"
    assert "Invalid argument" in sh("echo never > " + str(park_max), cwd=directory, check=False)
    assert park_max.read_text() == "7.5\n"


def _odd_calls(path: str) -> list[Callable[[], object]]:
    new = os.path.dirname(path) + "/new"
    return [
        lambda: os.chmod(path, 0o777),
        lambda: os.chown(path, 12, 12),
        lambda: os.unlink(path),
        lambda: os.rmdir(path),
        lambda: os.rename(path, new),
        lambda: os.link(path, new),
        lambda: os.symlink("x", new),
        lambda: os.mkdir(new),
        lambda: os.mknod(new),
        lambda: os.close(os.open(new, os.O_CREAT | os.O_WRONLY)),
        lambda: os.truncate(path, 1 << 40),
        lambda: os.setxattr(path, "user.x", b"y"),
        lambda: os.listxattr(path),
        lambda: os.listdir(path + "/x"),
        lambda: os.utime(path),
        lambda: os.statvfs(path),
    ]


def _errno_of(call: Callable[[], object]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or 0
    return 0


def test_no_access_breaks_it(disk: Path, directory: Path) -> None:
    """Odd system calls on every file end with an ordinary error, or without an effect."""
    paths = sh("find . -mindepth 1", cwd=directory).split()
    seen: set[int] = set()
    for name in paths:
        path = os.path.join(directory, name)
        seen.update(_errno_of(call) for call in _odd_calls(path))
        if os.path.isfile(path):
            _read_oddly(path)
    broken = {errno.EIO, errno.ENOTCONN, errno.ECONNABORTED, errno.ESTALE}
    assert not seen & broken, {errno.errorcode[number] for number in seen & broken}
    assert {errno.EPERM, errno.ENOSYS} & seen
    assert sh("find . -mindepth 1", cwd=directory).split() == paths
    assert (directory / "block/disk/queue/standby").read_text() == "off\n"


def _read_oddly(path: str) -> None:
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        assert os.pread(file.fileno(), 10, size) == b""
        assert os.pread(file.fileno(), 10, 1 << 40) == b""
        whole = os.pread(file.fileno(), 4096, 0)
        assert os.pread(file.fileno(), 4096, 1) == whole[1:] or size > 4096
        assert select.select([file], [], [], 0)[0] == [file]
        with mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_COPY) as mapped:
            assert mapped[:1] == whole[:1]
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_many_at_once(disk: Path, directory: Path) -> None:
    """More requests than are given to pyfuse3 at a time, while the disk is busy."""
    failures: list[Exception] = []
    ended = threading.Event()

    def look() -> None:
        try:
            while not ended.is_set():
                for base, _, names in os.walk(directory / "devices"):
                    for name in names:
                        assert Path(base, name).read_text().endswith("\n")
        except Exception as error:
            failures.append(error)

    def work(number: int) -> None:
        data = bytes([number]) * 65536
        try:
            with disk.open("r+b", 0) as file:
                while not ended.is_set():
                    os.pwrite(file.fileno(), data, number * 65536)
                    assert os.pread(file.fileno(), 65536, number * 65536) == data
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=look) for _ in range(24)]
    threads += [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    ended.set()
    for thread in threads:
        thread.join(60)
    assert failures == []
