"""`pytest -p tests.support.interpreted`: the sources, also where the request path is compiled.

For tests that replace what compiled classes do not let them replace.  `again` runs a test file so.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, SourceFileLoader
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def compiled() -> bool:
    """Whether this process has the compiled request path."""
    from ploopd.daemon import request_path

    return request_path() == "compiled"


def _finder(path: str) -> FileFinder:
    if not Path(path).is_relative_to(ROOT / "ploopd"):
        raise ImportError("not ours")
    return FileFinder(path, (SourceFileLoader, SOURCE_SUFFIXES))


def pytest_load_initial_conftests() -> None:
    already = [name for name in sys.modules if name.partition(".")[0] == "ploopd"]
    if already:
        raise pytest.UsageError(f"too late: {already[0]} has been imported")
    sys.path_hooks.insert(0, _finder)
    sys.path_importer_cache.clear()


def again(file: str) -> None:
    """Run the tests of `file` with the sources in a process of their own; they must pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.support.interpreted"]
    command += ["-p", "no:cacheprovider", file]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
