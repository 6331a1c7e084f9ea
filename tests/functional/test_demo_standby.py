"""`make demo-standby`: short, but whole; and it notices when something is lost."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import oracles

pytestmark = [pytest.mark.functional, pytest.mark.fuse, pytest.mark.timeout(120)]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fuse() -> None:
    missing = oracles.missing_for_fuse()
    if missing is not None:
        pytest.skip(missing)


def demonstrate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.demo.standby", "--seconds", "6", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )


def row(output: str, name: str) -> str:
    """The value of a row of the table at the end."""
    (line,) = [each for each in output.splitlines() if each.strip().startswith(name)]
    return line.strip().removeprefix(name).strip()


def test_the_disk_outlives_its_storage_and_the_picture_is_drawn(tmp_path: Path) -> None:
    chart = tmp_path / "out" / "demo.png"
    ended = demonstrate("--chart", str(chart))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "$ ploopctl device replace disk --image " in ended.stdout
    assert row(ended.stdout, "errors at the initiator, wrong or lost data") == "0"
    assert row(ended.stdout, "parked at most") == "32 requests"
    assert row(ended.stdout, "acknowledged writes the storage lost") != "0 B"
    assert row(ended.stdout, "written again by the replace") != "0 B"
    if importlib.util.find_spec("matplotlib") is None:
        assert "No chart" in ended.stdout
    else:
        assert chart.read_bytes().startswith(b"\x89PNG")


def test_without_the_journal_it_says_that_something_was_lost(tmp_path: Path) -> None:
    chart = tmp_path / "demo.png"
    ended = demonstrate("--chart", str(chart), "--journal", "off")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "FAILED (seed " in ended.stderr
    assert "expected version" in ended.stderr
    assert not chart.exists()
