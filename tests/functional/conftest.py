"""Fixtures of the tests that look at ploopd from outside, with other people's programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support import oracles
from tests.support.faultfs import FaultFs
from tests.support.images import KINDS, ImageCase
from tests.support.serve import ServeProcess

Serve = Callable[..., ServeProcess]
PEERS = ("qemu-img", "qemu-io", "iscsi-ls", "iscsi-inq")


@pytest.fixture(scope="session", autouse=True)
def peers() -> None:
    missing = oracles.have(*PEERS)
    if missing:
        pytest.skip(
            f"not installed: {', '.join(missing)} "
            "(apt-get install qemu-utils qemu-block-extra libiscsi-bin)"
        )


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start `ploopd serve` on images; stopped at the end of the test if the test did not."""
    with ExitStack() as stack:

        def start(*images: str | Path, **options: Any) -> ServeProcess:
            process = ServeProcess(*images, directory=tmp_path, **options)
            return stack.enter_context(process)

        yield start


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[FaultFs]:
    """A storage that fails when told, with nothing on it."""
    missing = oracles.missing_for_fuse()
    if missing is not None:
        pytest.skip(missing)
    source = tmp_path / "source"
    source.mkdir()
    with FaultFs(source, tmp_path / "mount") as fs:
        yield fs


@pytest.fixture(params=sorted(KINDS))
def image(request: pytest.FixtureRequest, tmp_path: Path) -> ImageCase:
    """An image of every kind in turn."""
    directory = tmp_path / "image"
    directory.mkdir()
    return KINDS[request.param](directory)


@pytest.fixture
def simple(tmp_path: Path) -> ImageCase:
    """The plainest image: v2, 1 MiB clusters, 64 MiB, half filled."""
    directory = tmp_path / "simple"
    directory.mkdir()
    return KINDS["v2-1m"](directory)
