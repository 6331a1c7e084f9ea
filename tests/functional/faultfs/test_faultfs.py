"""The fault file system passes everything through, and fails as it is told.

Shown by programs that know nothing of it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.functional.faultfs.helpers import made, opened, refused, shell, wait_for
from tests.support import images, oracles
from tests.support.faultfs import FaultFs
from tests.support.images import MIB

pytestmark = [pytest.mark.functional, pytest.mark.fuse, pytest.mark.timeout(60)]


# --- passing through --------------------------------------------------------------------------


def test_a_day_in_the_life_of_a_directory(storage: FaultFs, tmp_path: Path) -> None:
    """coreutils do the same to the mount and to a plain directory, with the same result."""
    script = """
        set -e
        mkdir d; echo one > d/a; ln d/a hard; ln -s d/a soft; cat soft
        mv d/a b; echo two >> hard; cat b; truncate -s 3 b; cat hard; echo
        chmod 640 b; touch -d 2001-02-03T04:05:06Z b; stat -c '%a %s %h %Y %F' b hard
        stat -c '%a %h %F' soft d
        truncate -s 8M sparse; stat -c '%s %b' sparse; dd if=/dev/zero of=sparse bs=4k count=1 \
            seek=1000 conv=notrunc,fsync status=none; stat -c '%s %b' sparse
        mkdir e; mv b e/c; mv e f; ls f; find . | sort; mkfifo pipe; stat -c %F pipe; rm pipe
        mv -f f/c d/over; echo new > n; mv -f n d/over; cat d/over hard; rm hard soft; rmdir f
        rmdir d 2>/dev/null || echo not empty; rm -r d; ls -A; sync -f .
        flock sparse sh -c 'flock -n sparse true || echo locked'
        exec 3<>gone; rm gone; echo still here >&3; stat -L -c '%h %s' /dev/fd/3
    """
    expected = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    seen = shell(storage, script)
    assert seen.returncode == 0, seen.stderr
    assert seen.stdout == expected.stdout
    assert sorted(os.listdir(storage.source)) == ["sparse"]


def test_what_others_do_to_the_source_is_seen(storage: FaultFs) -> None:
    """Files come and go below; their inode numbers are used again."""
    for number in range(20):
        name = f"d{number}"
        (storage.source / name).mkdir()
        (storage.source / name / "file").write_text(name)
        assert (storage.mountpoint / name / "file").read_text() == name
        os.link(storage.source / name / "file", storage.source / name / "link")
        assert (storage.mountpoint / name / "link").stat().st_nlink == 2
        os.replace(storage.source / name / "link", storage.source / name / "moved")
        os.unlink(storage.source / name / "file")
        assert os.listdir(storage.mountpoint / name) == ["moved"]
        assert (storage.mountpoint / name / "moved").read_text() == name
        shutil.rmtree(storage.source / name)
    assert os.listdir(storage.mountpoint) == []


def test_what_the_source_has_is_what_fio_has_verified(storage: FaultFs) -> None:
    """Random writes of odd sizes at depth, verified by fio through the mount."""
    if oracles.have("fio"):
        pytest.skip("fio is not installed: apt-get install fio")
    job = "--name=job --filename=data --size=4m --rw=randwrite --bsrange=512-65536 --iodepth=16"
    verify = "--ioengine=libaio --verify=crc32c --verify_fatal=1 --fsync=64 --minimal"
    seen = shell(storage, f"fio {job} {verify}")
    assert seen.returncode == 0, seen.stdout + seen.stderr
    oracles.assert_same_content(storage.source / "data", storage.mountpoint / "data")


def test_locks_of_every_kind_exclude_within_the_mount(storage: FaultFs) -> None:
    one, other = opened(storage, "locked"), os.open(storage.mountpoint / "locked", os.O_RDWR)
    fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
    refused(errno.EAGAIN, lambda: fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB))
    whole = (0).to_bytes(2, "little") + bytes(30)  # struct flock: whole file from its start
    write_lock = fcntl.F_WRLCK.to_bytes(2, "little") + whole[2:]
    fcntl.fcntl(one, fcntl.F_OFD_SETLK, write_lock)
    refused(errno.EAGAIN, lambda: fcntl.fcntl(other, fcntl.F_OFD_SETLK, write_lock))
    image = storage.mountpoint / "disk.hds"
    images.write_delta(storage.source / "disk.hds", MIB, {}, cluster_size=65536)
    holder = ["qemu-io", "-f", "parallels", str(image)]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)  # its prompt: the image is open
        seen = shell(storage, f"qemu-io -f parallels -c 'read 0 512' {image}")
        assert 'Failed to get "write" lock' in seen.stdout + seen.stderr
        process.communicate(b"quit\n")
    os.close(one)
    os.close(other)


def test_fallocate_is_what_the_kernel_says(storage: FaultFs) -> None:
    """EOPNOTSUPP, and the file is as before; seeking for holes finds the end."""
    descriptor = opened(storage, "file")
    for options in ("--length 1m", "--punch-hole --offset 0 --length 4096", "--zero-range -l 4096"):
        # util-linux has a text of its own for EOPNOTSUPP of a punched hole
        seen = shell(storage, f"strace -e trace=fallocate fallocate {options} file")
        assert "= -1 EOPNOTSUPP" in seen.stderr, seen.stderr
    assert (storage.source / "file").read_bytes() == b"o" * 65536
    assert os.lseek(descriptor, 0, os.SEEK_HOLE) == 65536
    assert os.lseek(descriptor, 5, os.SEEK_DATA) == 5
    os.close(descriptor)


# --- failing ----------------------------------------------------------------------------------


def test_any_errno_once_every_nth_the_next_k_and_until_cleared(storage: FaultFs) -> None:
    descriptor = opened(storage, "file")

    def outcome() -> str:
        try:
            os.pwrite(descriptor, b"n", 0)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "-"

    def outcomes(**when: object) -> list[str]:
        storage.fail("file", "write", errno=errno.ESTALE, **when)
        found = [outcome() for _ in range(6)]
        storage.clear()
        return found

    bad, good = "ESTALE", "-"
    assert outcomes(count=1) == [bad, *[good] * 5]
    assert outcomes(times=2, skip=1) == [good, bad, bad, *[good] * 3]
    assert outcomes(every=3) == [good, good, bad, good, good, bad]
    assert outcomes() == [bad] * 6
    for name in ("EBUSY", "ENOTCONN", "EIO", "ENOSPC", "EDQUOT", "EROFS", "EBADFD", "ETIMEDOUT"):
        storage.fail("*", "write", errno=getattr(errno, name), count=1)
        assert outcome() == name
    os.close(descriptor)


OPERATIONS: dict[str, str] = {
    "open": "cat file",
    "create": "touch new",
    "read": "cat file",
    "write": "echo >> file",
    "fsync": "sync file",
    "flush": "dd if=/dev/null of=file",
    "truncate": "truncate -s 1 file",
    "rename": "mv file other",
    "unlink": "rm file",
    "link": "ln file other",
    "symlink": "ln -s file other",
    "readlink": "ln -s file s; readlink -v s",
    "mkdir": "mkdir d",
    "rmdir": "mkdir d; rmdir d",
    "mknod": "mkfifo p",
    "lookup": "stat nothing file",
    "getattr": "exec 3< file; stat -L /dev/fd/3",
    "setattr": "chmod 600 file",
    "readdir": "ls",
    "fsyncdir": "sync .",
    "statfs": "stat -f .",
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_can_fail_and_only_that_one(operation: str, storage: FaultFs) -> None:
    made(storage, "file")
    storage.fail("*", operation, errno=errno.EHOSTDOWN)
    seen = shell(storage, OPERATIONS[operation])
    assert "Host is down" in seen.stderr
    report = storage.report()
    assert report["rules"][0]["hits"] >= 1
    storage.clear()
    assert shell(storage, f"rm -rf *; touch file; {OPERATIONS[operation]}").returncode in (0, 1)


def test_rules_are_limited_to_paths_and_ranges(storage: FaultFs) -> None:
    one, other = opened(storage, "one"), opened(storage, "other")
    storage.fail("o?e", "write", errno=errno.EIO, range=(4096, 8192))
    os.pwrite(other, b"x", 5000)
    os.pwrite(one, b"x" * 4096, 0)
    os.pwrite(one, b"x" * 4096, 8192)
    os.pread(one, 4096, 4096)
    for offset, length in ((4095, 2), (4096, 1), (8191, 1), (0, 16384)):
        refused(errno.EIO, lambda o=offset, n=length: os.pwrite(one, b"x" * n, o))  # type: ignore[misc]
    for descriptor in (one, other):
        os.close(descriptor)


def test_parts_of_an_image_can_be_aimed_at(storage: FaultFs) -> None:
    """Header, BAT, data and one cluster of the disk, wherever it lies in the file."""
    clusters = {5: b"five" * 16384, 2: b"two!" * 16384}
    image = images.write_delta(
        storage.source / "disk.hds", MIB, clusters, cluster_size=65536, order=[5, 2]
    )
    descriptor = os.open(storage.mountpoint / image.name, os.O_RDWR)
    places = {"header": 0, "bat": 64 + 4, "data": 65536, "cluster:5": 65536, "cluster:2": 131072}
    hit = {
        "header": {"header"},
        "bat": {"bat"},
        "data": {"data", "cluster:5", "cluster:2"},
        "cluster:5": {"data", "cluster:5"},
        "cluster:2": {"cluster:2"},
        "cluster:3": set(),
    }
    for region, expected in hit.items():
        storage.fail("disk.hds", "read", errno=errno.EIO, range=region)
        failed = set()
        for name, offset in places.items():
            try:
                os.pread(descriptor, 4, offset)
            except OSError:
                failed.add(name)
        assert failed == expected, region
        storage.clear()
    os.close(descriptor)


def test_delay_and_hang_until_released(storage: FaultFs) -> None:
    descriptor = opened(storage, "file")
    storage.delay("file", "read", seconds=0.3, count=1)
    began = time.monotonic()
    assert os.pread(descriptor, 1, 0) == b"o"
    assert time.monotonic() - began >= 0.3
    results: list[str] = []

    def write(text: bytes) -> None:
        try:
            os.pwrite(descriptor, text, 0)
            results.append("done")
        except OSError as error:
            results.append(errno.errorcode[error.errno or 0])

    for rule, expected in (({}, "done"), ({"errno": errno.EIO}, "EIO")):
        storage.clear()
        storage.hang("file", "write", **rule)
        writer = threading.Thread(target=write, args=(expected.encode(),))
        writer.start()
        wait_for(lambda: storage.status()["hanging"] == 1)
        assert not results
        assert os.pread(descriptor, 1, 100) == b"o", "others go on"
        storage.release()
        writer.join(10)
        assert results.pop() == expected
    assert (storage.source / "file").read_bytes()[:4] == b"done", "only the one that was done"
    os.close(descriptor)


def test_short_reads_and_writes(storage: FaultFs) -> None:
    descriptor = opened(storage, "file")
    storage.short("file", "read", length=100, count=1)
    storage.short("file", "write", length=7, count=1)
    assert len(os.pread(descriptor, 4096, 0)) == 100
    assert os.pwrite(descriptor, b"1234567890", 0) == 7
    assert os.pread(descriptor, 12, 0) == b"1234567ooooo"
    os.close(descriptor)
