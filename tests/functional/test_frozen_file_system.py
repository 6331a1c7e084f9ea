"""A local file system that stalls (fsfreeze): the loop and the files of others go on.

Needs root and loop devices.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from ploopd.errors import StorageError
from ploopd.fileio import uring
from ploopd.fileio.engine import IoEngine, make_engine
from ploopd.fileio.file import File, Policy

FILES = 200
"""Enough for some of them to share one of the kernel's 64 write queues with the frozen one."""
ATTEMPTS = 3
"""Other programs' load on the disk and the CPUs may spoil one of them."""
HANGS = 15.0
"""Seconds after which an operation is taken to wait for the thaw."""
THAW = 4 * HANGS

pytestmark = [
    pytest.mark.functional,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(
        not all(map(shutil.which, ("mkfs.ext4", "fsfreeze")))
        or not Path("/dev/loop-control").exists(),
        reason="needs mkfs.ext4, fsfreeze and loop devices",
    ),
]


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Path]:
    """A mounted ext4 whose file "stuck" nobody can write any more."""
    image, mountpoint = tmp_path / "ext4", tmp_path / "mnt"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    mountpoint.mkdir()
    run("mkfs.ext4", "-q", "-F", image)
    try:
        run("mount", "-o", "loop", image, mountpoint)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"mount: {error.stderr}")
    (mountpoint / "stuck").write_bytes(bytes(1 << 20))
    # Whoever sleeps in a frozen file system cannot be killed: it thaws even if the test goes wrong.
    thaw = ["sh", "-c", f'sleep {THAW}; exec fsfreeze -u "$1"', "sh", str(mountpoint)]
    guard = subprocess.Popen(thaw, stderr=subprocess.DEVNULL, start_new_session=True)
    run("fsfreeze", "-f", mountpoint)
    try:
        yield mountpoint
    finally:
        os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()
        subprocess.run(["fsfreeze", "-u", mountpoint], check=False, capture_output=True)
        subprocess.run(["umount", "-l", mountpoint], check=False, capture_output=True)


async def write_other_files(engine: IoEngine, directory: Path) -> tuple[float, float]:
    """One write to each of FILES new files: seconds until all have ended, longest loop stall."""
    os.mkdir(directory)
    block = memoryview(bytes(4096))
    results: list[StorageError | None] = []
    files = []
    for index in range(FILES):
        path = directory / str(index)
        path.write_bytes(bytes(4096))
        files.append(File.open(path, read_only=False, engine=engine))
    began = last = trio.current_time()
    longest = 0.0
    for file in files:
        if not file.try_write(block, 0):
            file.write(block, 0, results.append)
        else:
            results.append(None)
    engine.kick()
    with trio.fail_after(HANGS):
        while len(results) < FILES:
            await trio.sleep(0.01)
            now = trio.current_time()
            longest, last = max(longest, now - last), now
    assert results == [None] * FILES
    for file in files:
        file.close()
    return last - began, longest


@pytest.mark.skipif(uring.probe() is not None, reason=f"{uring.probe()}")
@pytest.mark.trio
async def test_writes_to_other_files_end_while_one_is_frozen(frozen: Path, tmp_path: Path) -> None:
    engine = make_engine("io_uring")
    late: list[StorageError | None] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        stuck = File.open(frozen / "stuck", read_only=False, engine=engine)
        assert stuck.policy is Policy.NOWAIT
        block = memoryview(bytes(4096))
        for index in range(64):
            assert not stuck.try_write(block, index * 4096)
            stuck.write(block, index * 4096, late.append)
        engine.kick()
        measured = []
        for attempt in range(ATTEMPTS):
            measured.append(await write_other_files(engine, tmp_path / str(attempt)))
            if measured[-1][0] < 1 and measured[-1][1] < 0.5:
                break
        else:
            pytest.fail(f"seconds for all files, and longest stall of the loop: {measured}")
        assert late == []
        run("fsfreeze", "-u", frozen)
        with trio.fail_after(HANGS):
            while len(late) < 64:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert late == [None] * 64
        stuck.close()
        nursery.cancel_scope.cancel()
    engine.close()
