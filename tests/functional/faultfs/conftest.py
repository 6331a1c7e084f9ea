"""One fault file system for the tests of a module."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.support import oracles
from tests.support.faultfs import FaultFs


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
