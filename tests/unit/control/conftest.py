"""Fixtures of the recovery tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ploopd.fileio.faults import FaultyOs


@pytest.fixture
def faulty() -> Iterator[FaultyOs]:
    """System calls that fail when told; what hangs is let go at the end."""
    layer = FaultyOs()
    yield layer
    layer.clear()
    layer.release()
