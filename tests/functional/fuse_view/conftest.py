"""A daemon with a view, and a person at a shell in it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.functional.conftest import Serve
from tests.support import images, oracles
from tests.support.images import MIB
from tests.support.serve import ServeProcess

SIZE = 64 * MIB


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
