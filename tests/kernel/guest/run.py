"""Running commands in the guest, and waiting."""

from __future__ import annotations

import hashlib
import mmap
import os
import subprocess
import time
from pathlib import Path


def sh(*command: str | Path, timeout: float = 90, check: bool = True) -> str:
    """Run a command; its output is in the error message when it fails."""
    result = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and result.returncode:
        line = " ".join(str(word) for word in command)
        raise AssertionError(f"{line}: exit code {result.returncode}\n{result.stdout}")
    return result.stdout


def wait_until(condition: object, what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    assert callable(condition)
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def can_be_opened(disk: Path) -> bool:
    """Its node is there a moment before the kernel lets anybody open the disk (ENXIO)."""
    try:
        os.close(os.open(disk, os.O_RDONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def disk_digest(disk: Path) -> str:
    """The digest of a disk, as `oracles.digest` has it, in half the time: past the page cache."""
    hasher = hashlib.sha256()
    descriptor = os.open(disk, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 4 << 20) as memory, memoryview(memory) as view:
            while count := os.readv(descriptor, [view]):
                hasher.update(view[:count])
    finally:
        os.close(descriptor)
    return hasher.hexdigest()
