"""An image for `ploopd serve`, and what a refusal to serve must look like."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ploopd.errors import ExitCode
from tests.support.images import MIB, write_delta

SIZE = 8 * MIB


def run(
    *arguments: str | Path,
    env: dict[str, str] | None = None,
    timeout: float = 60,
    prefix: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    """Run `ploopd` with these arguments; never asks for a free port by itself."""
    return subprocess.run(
        [*prefix, sys.executable, "-m", "ploopd.cli.ploopd", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=os.environ | (env or {}),
    )


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A v2 delta with three clusters."""
    path = tmp_path / "disk.hds"
    write_delta(path, SIZE, {0: b"a" * MIB, 3: b"b" * MIB, 7: b"c" * MIB})
    return path


def snapshot(directory: Path) -> dict[str, str]:
    """Names and digests of all regular files below a directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def assert_refused(
    result: subprocess.CompletedProcess[str], code: ExitCode, *mentioned: str
) -> None:
    """One line on stderr (log lines aside), the exit code, nothing on stdout, no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("ploopd: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "internal error" not in result.stderr
    assert result.stdout == ""
    for text in mentioned:
        assert text in lines[0]
    assert (result.returncode, lines[0]) == (code, lines[0])
