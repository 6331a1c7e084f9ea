"""The view in standby: who looks is told at once, and who waits stops nobody else."""

from __future__ import annotations

import errno
import os
import random
import select
import shutil
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ploopd.fileio.inotify import Happened
from tests.functional.fuse_view.conftest import SIZE, sh
from tests.support import images
from tests.support.faultfs import FaultFs
from tests.support.images import MIB
from tests.support.initiator import Initiator
from tests.support.inotify import Inotify
from tests.support.serve import ServeProcess

pytestmark = [pytest.mark.functional, pytest.mark.fuse, pytest.mark.timeout(120)]

CHANGED = select.POLLPRI | select.POLLERR


def on_storage(storage: FaultFs, name: str = "disk.hds") -> Path:
    images.write_delta(storage.source / name, SIZE, {}, cluster_size=65536)
    return storage.mountpoint / name


def test_watchers_wake_within_50_ms_of_a_real_failure(
    storage: FaultFs, view: Callable[..., ServeProcess], directory: Path
) -> None:
    image = on_storage(storage)
    server = view(image, options=("--journal", "off"))
    flag = directory / "block/disk/queue/standby"
    by_poll: list[float] = []
    by_inotify: list[float] = []
    with Initiator(server.url) as initiator, Inotify(flag) as inotify, flag.open("rb", 0) as file:
        initiator.settle()
        poll = select.poll()
        poll.register(file, CHANGED)
        for round_ in range(5):
            assert os.pread(file.fileno(), 100, 0) == b"off\n"
            assert poll.poll(0) == []
            storage.fail("disk.hds", "write", errno=errno.EIO)
            began = time.monotonic()
            write = initiator.write(8 * round_, b"w" * 4096)
            initiator.poll(0)
            [(_, events)] = poll.poll(5000)
            by_poll.append(time.monotonic() - began)
            assert events & CHANGED == CHANGED
            [noticed] = inotify.wait(5)
            assert noticed.mask == Happened.MODIFY
            by_inotify.append(noticed.time - began)
            assert os.pread(file.fileno(), 100, 0) == b"on\n"
            storage.clear()
            server.ctl("device", "replace", "disk", "--image", str(image), "--force")
            initiator.good(write)
            assert poll.poll(5000)
            assert len(inotify.wait(5)) == 1
    for times in (by_poll, by_inotify):
        assert statistics.median(times) < 0.050, times
        assert max(times) < 1.0, times


def test_select_and_epoll_see_it_too(running: ServeProcess, directory: Path) -> None:
    flag = directory / "block/disk/queue/standby"
    with flag.open("rb", 0) as file:
        assert file.read() == b"off\n"
        epoll = select.epoll()
        epoll.register(file, select.EPOLLPRI)
        assert epoll.poll(0) == []
        running.ctl("device", "standby", "disk", "enter")
        assert select.select([], [], [file], 5)[2] == [file]
        [(_, events)] = epoll.poll(5)
        assert events & select.EPOLLPRI
        epoll.close()
        running.ctl("device", "standby", "disk", "leave")


def test_a_reader_and_a_writer_live_through_an_episode(
    storage: FaultFs, view: Callable[..., ServeProcess], directory: Path, tmp_path: Path
) -> None:
    image = on_storage(storage)
    server = view(image, options=("--park-max", "0.3", "--journal", "off"))
    disk = directory / "disk/disk"
    data = random.Random(3).randbytes(MIB)
    sh("dd if=/dev/urandom bs=64k count=4 oflag=direct of=" + str(disk), cwd=tmp_path)
    storage.dead()
    writer = subprocess.Popen(
        ["dd", f"of={disk}", "bs=4096", "seek=1024", "conv=notrunc,fsync"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    feeder = threading.Thread(target=writer.communicate, args=(data,))
    feeder.start()
    flag = directory / "block/disk/queue/standby"
    deadline = time.monotonic() + 10
    while flag.read_text() != "on\n":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    reader = subprocess.Popen(
        ["dd", f"if={disk}", "bs=4096", "skip=1024", "count=256"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    time.sleep(1.0)  # longer than park_max, three times over
    assert (writer.poll(), reader.poll()) == (None, None)
    assert int((directory / "block/disk/pstate/queued_bios").read_text()) in (0, 1, 2)
    storage.alive()
    server.ctl("device", "replace", "disk", "--image", str(image), "--force")
    assert len(reader.communicate(timeout=20)[0]) == MIB
    feeder.join(20)
    assert writer.returncode == 0
    with disk.open("rb", 0) as file:
        assert os.pread(file.fileno(), MIB, 4 * MIB) == data


def test_a_hanging_reader_stops_nothing(running: ServeProcess, directory: Path) -> None:
    """What waits for the disk can be killed, and neither the flag nor the shutdown waits for it."""
    running.ctl("device", "standby", "disk", "enter")
    readers = [
        subprocess.Popen(["dd", f"if={directory}/disk/disk", "of=/dev/null", "count=1"])
        for _ in range(4)
    ]
    queued = directory / "block/disk/pstate/queued_bios"
    deadline = time.monotonic() + 10
    while queued.read_text() != "4\n":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    began = time.monotonic()
    assert (directory / "block/disk/queue/standby").read_text() == "on\n"
    assert time.monotonic() - began < 0.5
    readers[0].send_signal(signal.SIGTERM)
    assert readers[0].wait(5) == -signal.SIGTERM
    readers[1].kill()
    assert readers[1].wait(5) == -signal.SIGKILL
    assert queued.read_text() == "2\n"
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        readers[2].wait(0.1)
    code = running.stop()
    assert time.monotonic() - began < 10
    assert code == 8, "it stopped in standby with requests that were not executed"
    for reader in readers[2:]:
        assert reader.wait(5) > 0
    assert not os.path.ismount(directory)


def test_a_storage_that_hangs_stops_nothing_either(
    storage: FaultFs, view: Callable[..., ServeProcess], directory: Path
) -> None:
    server = view(on_storage(storage))
    disk = directory / "disk/disk"
    sh(f"dd if=/dev/urandom of={disk} bs=64k count=4 conv=notrunc", cwd=directory)
    storage.hang("disk.hds", "read")
    reader = subprocess.Popen(["dd", f"if={disk}", "of=/dev/null", "bs=4k", "count=1"])
    busy = directory / "block/disk/pstate/active_reqs"
    deadline = time.monotonic() + 10
    while busy.read_text() != "1\n":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    began = time.monotonic()
    assert (directory / "block/disk/queue/standby").read_text() == "off\n"
    assert time.monotonic() - began < 0.5
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < 25
    assert reader.wait(5) > 0
    assert not os.path.ismount(directory)


def test_a_parked_write_holds_nobody_else(running: ServeProcess, directory: Path) -> None:
    """Writers wait beside each other, and reading, stat and open do not wait for them."""
    disk = directory / "disk/disk"
    running.ctl("device", "standby", "disk", "enter")
    writers = [
        subprocess.Popen(
            [
                "dd",
                "if=/dev/zero",
                f"of={disk}",
                "bs=4k",
                f"seek={number}",
                "count=1",
                "conv=notrunc",
                "status=none",
            ]
        )
        for number in range(3)
    ]
    queued = directory / "block/disk/pstate/queued_bios"
    deadline = time.monotonic() + 10
    while queued.read_text() != "3\n":
        assert time.monotonic() < deadline, "they wait for each other in the kernel"
        time.sleep(0.02)
    assert disk.stat().st_size == SIZE
    with disk.open("rb", 0):
        pass
    writers[0].kill()
    assert writers[0].wait(5) == -signal.SIGKILL
    running.ctl("device", "standby", "disk", "leave")
    assert [writer.wait(10) for writer in writers[1:]] == [0, 0]


def test_the_view_follows_a_replace(running: ServeProcess, directory: Path, tmp_path: Path) -> None:
    name = directory / "block/disk/pdelta/0/image"
    assert name.read_text() == f"{tmp_path}/disk.hds\n"
    running.ctl("device", "standby", "disk", "enter")
    copy = tmp_path / "copy.hds"
    shutil.copy(tmp_path / "disk.hds", copy)
    running.ctl("device", "replace", "disk", "--image", str(copy), "--force")
    assert name.read_text() == f"{copy}\n"
    assert (directory / "block/disk/queue/standby").read_text() == "off\n"


def test_without_a_fuse_it_is_not_supported(
    tmp_path: Path, view: Callable[..., ServeProcess], directory: Path
) -> None:
    view(images.write_delta(tmp_path / "disk.hds", SIZE, {}), options=("--standby", "off"))
    assert (directory / "block/disk/queue/standby").read_text() == "not supported\n"
