"""What storage does to files that had been written: caches that are lost, errors that stay."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from tests.functional.faultfs.helpers import opened, refused, shell, wait_for
from tests.support.faultfs import FaultFs

pytestmark = [pytest.mark.functional, pytest.mark.fuse, pytest.mark.timeout(60)]


# --- lying ------------------------------------------------------------------------------------


def test_acknowledged_writes_are_lost_unless_they_were_synced(storage: FaultFs) -> None:
    descriptor = opened(storage, "file")
    source = storage.source / "file"
    storage.cache("file")
    os.pwrite(descriptor, b"kept", 100)
    os.fsync(descriptor)
    os.pwrite(descriptor, b"lost", 100)
    os.pwrite(descriptor, b"beyond", 70000)
    assert os.pread(descriptor, 4, 100) == b"lost"
    assert os.pread(descriptor, 100, 69998) == b"\0\0beyond"
    assert os.fstat(descriptor).st_size == 70006
    assert source.read_bytes()[100:104] == b"kept"
    assert source.stat().st_size == 65536
    assert storage.report()["unsynced"] == {"file": 8192}
    storage.lose("file")
    assert os.pread(descriptor, 4, 100) == b"kept"
    assert os.fstat(descriptor).st_size == 65536
    os.pwrite(descriptor, b"sync", 100)
    storage.sync()
    assert source.read_bytes()[100:104] == b"sync"
    os.close(descriptor)


def test_fsync_can_lie_and_a_failed_one_can_lose(storage: FaultFs) -> None:
    descriptor = opened(storage, "file")
    storage.cache("file", lie=True)
    os.pwrite(descriptor, b"lost", 0)
    os.fsync(descriptor)
    storage.lose()
    assert os.pread(descriptor, 4, 0) == b"oooo"
    storage.clear()
    storage.cache("file")
    storage.fail("file", "fsync", errno=errno.EIO, lose=True, count=1)
    os.pwrite(descriptor, b"lost", 0)
    refused(errno.EIO, lambda: os.fsync(descriptor))
    os.fsync(descriptor)  # and says nothing any more
    assert os.pread(descriptor, 4, 0) == b"oooo"
    os.close(descriptor)


def test_a_loss_can_come_before_its_error(storage: FaultFs) -> None:
    descriptor = opened(storage, "file")
    storage.cache("file")
    os.pwrite(descriptor, b"lost", 0)
    storage.fail("file", "write", errno=errno.EIO, lose=True, late=1)
    errors: list[int | None] = []

    def write() -> None:
        try:
            os.pwrite(descriptor, b"x", 8192)
        except OSError as error:
            errors.append(error.errno)

    writer = threading.Thread(target=write)
    writer.start()
    wait_for(lambda: storage.report()["unsynced"] == {})
    assert os.pread(descriptor, 4, 0) == b"oooo"
    assert not errors
    writer.join()
    assert errors == [errno.EIO]
    os.close(descriptor)


def test_what_was_cached_of_a_file_that_is_gone_is_forgotten(storage: FaultFs) -> None:
    descriptor = opened(storage, "file")
    storage.cache("file")
    os.pwrite(descriptor, b"cached", 0)
    os.close(descriptor)
    wait_for(lambda: storage.report()["open"] == [])
    (storage.source / "file").unlink()
    storage.lose()
    assert storage.report()["unsynced"] == {}


def test_a_cache_may_lose_a_part(storage: FaultFs) -> None:
    descriptor = opened(storage, "file", 100 * 4096)
    storage.cache("file")
    os.pwrite(descriptor, b"n" * 100 * 4096, 0)
    storage.lose("file", keep=0.5, seed=3)
    data = (storage.source / "file").read_bytes()
    pages = {data[place : place + 4096] for place in range(0, len(data), 4096)}
    assert pages == {b"n" * 4096, b"o" * 4096}
    os.close(descriptor)


def test_truncation_and_the_cache(storage: FaultFs) -> None:
    descriptor = opened(storage, "file", 10)
    storage.cache("file")
    os.pwrite(descriptor, b"n" * 5000, 0)
    os.ftruncate(descriptor, 4100)
    assert os.fstat(descriptor).st_size == 4100
    os.ftruncate(descriptor, 5000)
    assert os.pread(descriptor, 6000, 4090) == b"n" * 10 + bytes(900)
    storage.sync()
    assert (storage.source / "file").read_bytes() == b"n" * 4100 + bytes(900)
    os.close(descriptor)


# --- the ways of network storage --------------------------------------------------------------


def test_errors_stick_until_the_old_descriptor_is_closed(storage: FaultFs) -> None:
    """MooseFS: new descriptors get the error, too, as long as the one it happened to is open."""
    old = opened(storage, "file")
    storage.fail("file", "write", errno=errno.EIO, count=1, stick=True)
    refused(errno.EIO, lambda: os.pwrite(old, b"x", 0))
    new = os.open(storage.mountpoint / "file", os.O_RDWR)
    refused(errno.EIO, lambda: os.pwrite(new, b"x", 0))
    refused(errno.EIO, lambda: os.fsync(new))
    assert os.pread(new, 1, 0) == b"o"
    refused(errno.EIO, lambda: os.close(new))
    assert storage.report()["stuck"] == {"file": "EIO"}
    refused(errno.EIO, lambda: os.close(old))
    wait_for(lambda: storage.report()["stuck"] == {})
    newest = os.open(storage.mountpoint / "file", os.O_RDWR)
    assert os.pwrite(newest, b"x", 0) == 1
    os.fsync(newest)
    os.close(newest)


def test_a_cache_that_is_lost_in_the_moment_of_the_failure(storage: FaultFs) -> None:
    """Nothing works any more, reading neither, until the old descriptor is closed."""
    old = opened(storage, "file")
    storage.cache("file")
    os.pwrite(old, b"lost", 0)
    storage.fail("file", "write", errno=errno.EIO, count=1, stick=True, lose=True)
    refused(errno.EIO, lambda: os.pwrite(old, b"x", 100))
    refused(errno.EIO, lambda: os.pread(old, 1, 0))
    refused(errno.EIO, lambda: os.fsync(old))
    refused(errno.EIO, lambda: os.close(old))
    wait_for(lambda: storage.report()["stuck"] == {})
    assert (storage.mountpoint / "file").read_bytes()[:4] == b"oooo"


def test_a_dead_mount_and_its_return(storage: FaultFs) -> None:
    descriptor = opened(storage, "file")
    storage.hang("file", "read")
    failed: list[int] = []

    def read() -> None:
        try:
            os.pread(descriptor, 1, 0)
        except OSError as error:
            failed.append(error.errno or 0)

    reader = threading.Thread(target=read)
    reader.start()
    wait_for(lambda: storage.status()["hanging"] == 1)
    storage.dead()
    reader.join(10)
    assert failed == [errno.ENOTCONN]
    for script in ("ls", "cat file", "stat -f .", "touch new", "stat .", "mkdir d"):
        assert "Transport endpoint is not connected" in shell(storage, script).stderr, script
    refused(errno.ENOTCONN, lambda: os.fsync(descriptor))
    storage.dead(errno.ESTALE)
    refused(errno.ESTALE, lambda: os.pwrite(descriptor, b"x", 0))
    storage.clear()
    assert os.pwrite(descriptor, b"x", 0) == 1
    os.close(descriptor)


def test_death_waits_for_something_to_lose(storage: FaultFs) -> None:
    descriptor = opened(storage, "file")
    storage.cache("file")
    storage.dead(errno.EIO, unsynced=8192)
    assert os.pwrite(descriptor, b"n" * 4096, 0) == 4096
    os.fsync(descriptor)
    assert os.pwrite(descriptor, b"n" * 4096, 0) == 4096
    assert storage.report()["dead"] is None
    assert os.pwrite(descriptor, b"n" * 4096, 4096) == 4096, "acknowledged, as the one before"
    refused(errno.EIO, lambda: os.pwrite(descriptor, b"n" * 4096, 0))
    refused(errno.EIO, lambda: os.fsync(descriptor))
    report = storage.report()
    assert (report["dead"], report["unsynced"]) == ("EIO", {"file": 8192})
    storage.dead(errno.EIO, unsynced=8192)
    storage.clear()
    storage.dead(errno.EIO, unsynced=8193)
    assert os.pwrite(descriptor, b"n" * 4096, 0) == 4096
    storage.clear()
    assert os.pwrite(descriptor, b"n" * 4096, 8192) == 4096, (
        "what came back has no death to wait for"
    )
    os.close(descriptor)


def test_the_kernel_answers_for_a_process_that_has_died(storage: FaultFs) -> None:
    old = opened(storage, "file")
    inode = os.fstat(old)
    storage.kill()
    refused(errno.ENOTCONN, lambda: os.pread(old, 1, 0))
    storage.remount()
    assert (storage.mountpoint / "file").read_bytes()[:1] == b"o"
    assert (storage.mountpoint / "file").stat().st_dev != inode.st_dev, "another file system"
    refused(errno.ENOTCONN, lambda: os.pread(old, 1, 0))
    refused(errno.ENOTCONN, lambda: os.close(old))
