"""A program that is not installed is said so, by a skipped test, and is no failure of ploopd."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.support.oracles import PACKAGES


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """Where a test started a peer that is not there, name the package that has it."""
    try:
        return (yield)
    except FileNotFoundError as error:
        package = PACKAGES.get(str(error.filename))
        if package is None or shutil.which(str(error.filename)) is not None:
            raise
        pytest.skip(f"{error.filename} is not installed: apt-get install {package}")
