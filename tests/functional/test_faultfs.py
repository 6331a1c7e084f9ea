"""The fault file system keeps its promises, shown by programs that know nothing of it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import images, oracles
from tests.support.faultfs import FaultFs, FaultFsError
from tests.support.faultfs.script import ScriptError
from tests.support.images import MIB

pytestmark = [pytest.mark.functional, pytest.mark.fuse, pytest.mark.timeout(60)]


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultFs]:
    missing = oracles.missing_for_fuse()
    if missing is not None:
        pytest.skip(missing)
    directory = tmp_path_factory.mktemp("faultfs")
    (directory / "source").mkdir()
    with FaultFs(directory / "source", directory / "mount") as fs:
        yield fs


@pytest.fixture
def storage(mounted: FaultFs) -> Iterator[FaultFs]:
    """Empty and without rules."""
    yield mounted
    mounted.script("alive", "clear", "lose", "unstick", "reset")
    for path in mounted.mountpoint.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def shell(storage: FaultFs, script: str) -> subprocess.CompletedProcess[str]:
    """What a person does in the mount; `$C` is the control file."""
    return subprocess.run(
        ["bash", "-c", script],
        cwd=storage.mountpoint,
        env=os.environ | {"C": str(storage.control), "LC_ALL": "C"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def refused(number: int, action: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:
        action()
    assert caught.value.errno == number, errno.errorcode[caught.value.errno or 0]


def opened(storage: FaultFs, name: str, size: int = 65536) -> int:
    return os.open(made(storage, name, size), os.O_RDWR)


def made(storage: FaultFs, name: str, size: int = 65536) -> Path:
    (storage.source / name).write_bytes(b"o" * size)
    return storage.mountpoint / name


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


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_short_reads_and_writes(storage: FaultFs) -> None:
    descriptor = opened(storage, "file")
    storage.short("file", "read", length=100, count=1)
    storage.short("file", "write", length=7, count=1)
    assert len(os.pread(descriptor, 4096, 0)) == 100
    assert os.pwrite(descriptor, b"1234567890", 0) == 7
    assert os.pread(descriptor, 12, 0) == b"1234567ooooo"
    os.close(descriptor)


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


# --- the control file -------------------------------------------------------------------------


def test_by_hand(storage: FaultFs) -> None:
    """echo and cat are enough; the file does not appear in listings."""
    made(storage, "file")
    seen = shell(
        storage,
        """
        exec 3<> file
        echo 'fail "f*" write errno=ENOSPC count=1   # once' > $C && cat $C; echo x >&3; echo y >&3
        printf '# comment\\n\\nhang hidden fsync\\nshort * read bytes=1k\\n' >> $C
        echo 'clear hidden' > $C; echo 'clear 7777' > $C; ls -A
        """,
    )
    assert "No space left on device" in seen.stderr
    assert "Invalid argument" in seen.stderr
    assert seen.stdout.endswith("}\nfile\n")
    before = json.loads(seen.stdout[: seen.stdout.rindex("}") + 1])
    assert before["open"][0]["path"] == "file"
    assert before["open"][0]["mode"] == "rw"
    report = storage.report()
    assert [(rule["rule"][:5], rule["hits"]) for rule in report["rules"]] == [
        ("fail ", 1),
        ("short", 0),
    ]
    assert report["error"] == "there is no rule 7777"
    assert report["open"] == []
    storage.script("reset", "clear f*")
    assert len(storage.report()["rules"]) == 1
    storage.script(f"clear {report['rules'][1]['id']}")
    assert storage.report()["rules"] == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("explode *", "'explode' is none of fail"),
        ("fail * write", "fail needs errno="),
        ("fail * write errno=EWHAT", "'EWHAT' is no errno"),
        ("fail * wriet errno=EIO", "'wriet' is no operation"),
        ("fail disk errno=EIO", "fail PATH OPERATION"),
        ("fail", "fail PATH OPERATION"),
        ("fail * write errno=EIO every=0", "'0' is no number from 1"),
        ("fail * write errno=EIO count=x", "'x' is no number from 1"),
        ("fail * fsync errno=EIO range=bat", "a range is for read and write"),
        ("fail * write errno=EIO range=here", "'here' is no range"),
        ("fail * write errno=EIO range=cluster:", "'' is no number from 0"),
        ("fail * write errno=EIO range=1x-2", "'1x' is no number of bytes"),
        ("short * read", "short needs bytes="),
        ("short * fsync bytes=3", "only read and write can be short"),
        ("delay * read", "delay needs seconds="),
        ("delay * read seconds=-1", "'-1' is no number of seconds"),
        ("cache * fsync=perhaps", "fsync=honest or fsync=lie"),
        ("hang * read bytes=3", "is no option of hang"),
        ("lose a b", "at most one argument"),
        ("alive now", "takes no argument"),
        ("dead EWHAT", "is no errno"),
        ("fail 'unclosed write errno=EIO", "No closing quotation"),
    ],
)
def test_a_wrong_line_says_what_is_wrong(line: str, says: str, storage: FaultFs) -> None:
    """…and nothing of what was written with it is in force."""
    with pytest.raises(ScriptError) as caught:
        storage.script("fail * read errno=EIO", line)
    assert says in str(caught.value)
    with storage.control.open("w", buffering=-1) as control:  # one write
        control.write(f"fail * read errno=EIO\n{line}\n")
        refused(errno.EINVAL, control.flush)
        refused(errno.EINVAL, control.close)
    assert says in storage.report()["error"]
    assert storage.report()["rules"] == []


def test_a_rule_that_is_not_there_is_an_error(storage: FaultFs) -> None:
    with pytest.raises(FaultFsError, match="there is no rule 9999"):
        storage.script("fail * read errno=EIO", "release 9999")
    assert storage.report()["rules"] == []


def test_it_starts_with_a_script_and_writes_back_at_the_end(tmp_path: Path) -> None:
    missing = oracles.missing_for_fuse()
    if missing is not None:
        pytest.skip(missing)
    source, mount, script = (tmp_path / name for name in ("source", "mount", "script"))
    source.mkdir()
    mount.mkdir()
    script.write_text("fail * mkdir errno=EDQUOT\ncache *\n")
    command = [sys.executable, "-m", "tests.support.faultfs", str(source), str(mount)]
    with subprocess.Popen(
        [*command, "--script", str(script)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == f"faultfs: {source} on {mount}, control file {mount}/.faultfs\n"
        wait_for((mount / ".faultfs").exists)
        refused(errno.EDQUOT, (mount / "d").mkdir)
        (mount / "file").write_text("cached")
        assert (source / "file").read_text() == ""
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert (source / "file").read_text() == "cached"
    assert list(mount.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "says"), [("nonsense", "'nonsense' is none of"), (None, "is not a directory")]
)
def test_a_wrong_start_is_one_line(script: str | None, says: str, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(script or "")
    source = str(tmp_path if script else tmp_path / "nowhere")
    command = [sys.executable, "-m", "tests.support.faultfs", source, str(tmp_path)]
    ended = subprocess.run(
        [*command, "--script", str(tmp_path / "script")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert says in ended.stderr
    assert ended.stderr.count("\n") == 1
