"""What a person, a program and a careful test do with a mount."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.faultfs import FaultFs


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


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
