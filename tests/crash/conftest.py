"""The crash tests need QEMU's tools as judge."""

from __future__ import annotations

import pytest

from tests.support import oracles


@pytest.fixture(scope="session", autouse=True)
def peers() -> None:
    if oracles.have("qemu-img"):
        pytest.skip("qemu-img is not installed: apt-get install qemu-utils")
