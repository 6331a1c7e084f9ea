"""What a machine does not have must not look like a failure of ploopd.

A program that is not installed skips the test that needs it; a long TMPDIR is not used; how long an
example takes is nothing that a property test judges by.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.oracles import PACKAGES

LONGEST_TEMPORARY = 16
"""A Unix socket's path has 107 bytes at most; pytest's part, with the user's name, is up to 90."""


settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_configure(config: pytest.Config) -> None:
    # Extension modules that are older than their sources would be tested in their place.
    if "PLOOPD_IN_GUEST" not in os.environ:  # there the host has looked
        tool = Path(__file__).resolve().parents[1] / "tools" / "compile_modules.py"
        subprocess.run([sys.executable, tool, "--tidy"], check=True)
    place = tempfile.gettempdir()
    if len(place) > LONGEST_TEMPORARY:
        os.environ["TMPDIR"] = "/tmp"
        tempfile.tempdir = None


def pytest_report_header() -> str:
    return f"temporary files: {tempfile.gettempdir()}"


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
