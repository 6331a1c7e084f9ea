"""The mounted view, used as people use sysfs and as programs use a file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.util
import mmap
import os
import random
import select
import shutil
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.functional.conftest import Serve
from tests.support import images, oracles
from tests.support.faultfs import FaultFs
from tests.support.images import MIB, ImageCase
from tests.support.initiator import Initiator
from tests.support.inotify import IN_MODIFY, Inotify
from tests.support.serve import ServeError, ServeProcess

pytestmark = [pytest.mark.functional, pytest.mark.fuse, pytest.mark.timeout(120)]

SIZE = 64 * MIB
CHANGED = select.POLLPRI | select.POLLERR


@pytest.fixture(autouse=True)
def fuse() -> None:
    missing = oracles.missing_for_fuse()
    if missing is not None:
        pytest.skip(missing)
    if importlib.util.find_spec("pyfuse3") is None:
        pytest.skip("pyfuse3 is not installed: pip install 'ploopd[fuse]'")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """Where the view is mounted; nothing is left there."""
    path = tmp_path / "sysfs"
    path.mkdir()
    yield path
    subprocess.run(["fusermount3", "-u", "-z", str(path)], stderr=subprocess.DEVNULL, check=False)


@pytest.fixture
def view(serve: Serve, directory: Path) -> Callable[..., ServeProcess]:
    """Serve images with a view at `directory`."""

    def start(*served: Path, options: tuple[str, ...] = ()) -> ServeProcess:
        return serve(*served, options=("--sysfs", str(directory), *options))

    return start


@pytest.fixture
def running(tmp_path: Path, view: Callable[..., ServeProcess]) -> ServeProcess:
    return view(images.write_delta(tmp_path / "disk.hds", SIZE, {}, cluster_size=65536))


@pytest.fixture
def disk(running: ServeProcess, directory: Path) -> Path:
    """The file of an empty disk of 64 MiB that is being served."""
    return directory / "disk/disk"


def sh(script: str, *, cwd: Path, check: bool = True, timeout: float = 60) -> str:
    """What a person types; standard error is part of what is seen."""
    result = subprocess.run(
        ["bash", "-c", script],
        cwd=cwd,
        env=os.environ | {"LC_ALL": "C"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert not check or result.returncode == 0, result.stdout
    return result.stdout


# -- like sysfs ----------------------------------------------------------------------------


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


# -- standby -------------------------------------------------------------------------------


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[FaultFs]:
    (tmp_path / "source").mkdir()
    with FaultFs(tmp_path / "source", tmp_path / "mount") as fs:
        yield fs


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
            assert noticed.mask == IN_MODIFY
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


# -- the disk as a file --------------------------------------------------------------------


def test_the_content_of_every_kind_of_image(
    image: ImageCase, view: Callable[..., ServeProcess], directory: Path, tmp_path: Path
) -> None:
    expected = oracles.read_through_qemu(image.layers, tmp_path / "expected.raw")
    view(image.serve, options=("--read-only",))
    [disk] = (directory / "disk").iterdir()
    oracles.assert_same_content(disk, expected)
    sh(f"cp --sparse=always {disk} sparse.raw", cwd=tmp_path)
    oracles.assert_same_content(tmp_path / "sparse.raw", expected)
    refused = sh(f"echo > {disk}", cwd=tmp_path, check=False)
    assert ("Read-only file system" if os.geteuid() == 0 else "Permission denied") in refused


def test_writes_are_seen_by_initiators_and_theirs_by_readers(
    running: ServeProcess, directory: Path
) -> None:
    disk = directory / "disk/disk"
    with Initiator(running.url) as initiator, disk.open("r+b", 0) as file:
        initiator.settle()
        fd = file.fileno()
        for round_ in range(20):
            text = f"round {round_}".encode().ljust(4096, b".")
            initiator.good(initiator.write(8 * round_, text))
            assert os.pread(fd, 4096, 4096 * round_) == text
            assert os.pwrite(fd, b"file", 4096 * round_ + 100) == 4
            seen = initiator.good(initiator.read(8 * round_, 8))
            assert seen == text[:100] + b"file" + text[104:]
        with mmap.mmap(fd, 4096, access=mmap.ACCESS_READ) as mapped:
            assert mapped[100:104] == b"file"
        initiator.good(initiator.write(0, b"n" * 4096))
        with disk.open("rb", 0) as again, mmap.mmap(again.fileno(), 4096, prot=mmap.PROT_READ) as m:
            assert m[:4096] == b"n" * 4096


def test_part_of_a_block_is_written_atomically(disk: Path) -> None:
    """Many writers, each with its own bytes of the same blocks: none loses any."""
    with disk.open("r+b", 0) as file:

        def write(number: int) -> None:
            for block in range(50):
                os.pwrite(file.fileno(), bytes([number]) * 64, 512 * block + 64 * number)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = b"".join(bytes([number]) * 64 for number in range(8)) * 50
        assert os.pread(file.fileno(), len(expected), 0) == expected


def test_part_of_a_block_never_brings_back_what_an_initiator_has_overwritten(
    tmp_path: Path, view: Callable[..., ServeProcess], directory: Path
) -> None:
    image = images.write_delta(tmp_path / "disk.hds", SIZE, {}, cluster_size=65536)
    server = view(image, options=("--io", "io_uring"))
    ended = threading.Event()

    def scribble() -> None:
        with (directory / "disk/disk").open("r+b", 0) as file:
            while not ended.is_set():
                for block in range(8):
                    os.pwrite(file.fileno(), b"f", 512 * block)

    writer = threading.Thread(target=scribble)
    with Initiator(server.url) as initiator:
        initiator.settle()
        initiator.good(initiator.write(0, bytes(4096)))
        writer.start()
        try:
            for version in range(1, 250):
                data = bytes([version]) * 512
                tags = {initiator.write(block, data) for block in range(8)}
                while tags:
                    answers = initiator.poll(30)
                    assert answers, "an initiator waits for ever"
                    assert {answer.status for answer in answers} == {0}
                    tags -= {answer.tag for answer in answers}
                seen = initiator.good(initiator.read(0, 8))
                for block in range(8):
                    assert seen[512 * block + 1 : 512 * (block + 1)] == data[1:]
        finally:
            ended.set()
            writer.join()


def test_like_a_block_device_it_keeps_its_size(disk: Path, tmp_path: Path) -> None:
    sh(f"head -c 100000 /dev/urandom > data; dd if=data of={disk}", cwd=tmp_path)
    sh(f"cmp -n 100000 data {disk}", cwd=tmp_path)
    assert disk.stat().st_size == SIZE
    sh(f"truncate -s {SIZE} {disk}", cwd=tmp_path)
    assert "Invalid argument" in sh(f"truncate -s 10 {disk}", cwd=tmp_path, check=False)
    assert "No space left" in sh(f"echo more >> {disk}", cwd=tmp_path, check=False)
    assert disk.stat().st_size == SIZE


def test_holes_are_punched_in_the_image(disk: Path, tmp_path: Path, directory: Path) -> None:
    before = disk.stat().st_blocks
    sh(f"dd if=/dev/urandom of={disk} bs=1M count=8 conv=notrunc; cp {disk} was", cwd=tmp_path)
    assert disk.stat().st_blocks == before + 8 * 2048
    sh(f"fallocate -p -o 1000 -l {4 * MIB} {disk}", cwd=tmp_path)
    sh(f"cmp -n 1000 was {disk}", cwd=tmp_path)
    sh(f"cmp -n {4 * MIB} -i 1000:0 {disk} /dev/zero", cwd=tmp_path)
    after = 1000 + 4 * MIB
    sh(f"cmp -n 100000 -i {after}:{after} was {disk}", cwd=tmp_path)
    assert disk.stat().st_blocks < before + 5 * 2048
    with disk.open("rb", 0) as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 65536
        assert os.lseek(file.fileno(), 65536, os.SEEK_DATA) == 4 * MIB
    sh(f"fallocate -z -o 5000000 -l 777 {disk}", cwd=tmp_path)
    sh(f"cmp -n 777 -i 5000000:0 {disk} /dev/zero", cwd=tmp_path)
    refused = sh(f"fallocate -l 4096 {disk}", cwd=tmp_path, check=False)
    assert "not supported" in refused


@pytest.mark.parametrize(
    "job",
    [
        "--rw=randrw --bs=4k --ioengine=libaio --iodepth=16 --direct=1",
        "--rw=randwrite --bsrange=512-64k --bs_unaligned --ioengine=psync --fsync=32",
        "--rw=randwrite --bs=4k --ioengine=mmap",
    ],
)
def test_fio_verifies(disk: Path, tmp_path: Path, job: str) -> None:
    if oracles.have("fio"):
        pytest.skip("fio is not installed: apt-get install fio")
    common = "--size=16M --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=5"
    said = sh(f"fio --name=v --filename={disk} {common} {job}", cwd=tmp_path, check=False)
    if "mmap" in job and "No such device" in said:
        pytest.skip("this kernel has no shared mappings of files with direct I/O (Linux 6.6)")
    assert "err= 0" in said, said


@pytest.mark.parametrize("direct", ["off", "on"])
def test_a_file_system_on_a_loop_device(disk: Path, tmp_path: Path, direct: str) -> None:
    mount = tmp_path / "mnt"
    mount.mkdir()
    attach = subprocess.run(
        ["losetup", "--find", "--show", f"--direct-io={direct}", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if attach.returncode:
        pytest.skip(f"no loop devices here: {attach.stderr.strip()}")
    loop = attach.stdout.strip()
    try:
        sh(f"mkfs.ext4 -q -F {loop} && mount {loop} {mount}", cwd=tmp_path)
        try:
            sh(
                "mkdir tree; for i in $(seq 40); do"
                " head -c $((i * 3001)) /dev/urandom > tree/$i; done",
                cwd=tmp_path,
            )
            sh(
                f"cp -r tree {mount}/ && sync -f {mount} && rm {mount}/tree/1 && fstrim {mount}",
                cwd=tmp_path,
            )
            sh("rm tree/1", cwd=tmp_path)
        finally:
            sh(f"umount {mount}", cwd=tmp_path)
        sh(f"e2fsck -fn {loop}", cwd=tmp_path)
        sh(f"mount -o ro {loop} {mount}", cwd=tmp_path)
        try:
            sh(f"diff -r tree {mount}/tree", cwd=tmp_path)
        finally:
            sh(f"umount {mount}", cwd=tmp_path)
    finally:
        sh(f"losetup -d {loop}", cwd=tmp_path)


# -- mounting ------------------------------------------------------------------------------


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
    root = str(Path(__file__).resolve().parents[2])
    with pytest.raises(ServeError, match=r"pip install 'ploopd\[fuse\]'") as refused:
        serve(
            image,
            options=("--sysfs", str(directory)),
            env={"PYTHONPATH": f"{lacking}{os.pathsep}{root}"},
        )
    assert refused.value.returncode == 16
