"""`make install` into an empty directory: what a packager gets, complete and free of that path."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import oracles

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = "usr/lib/ploopd"

pytestmark = [pytest.mark.functional, pytest.mark.slow, pytest.mark.timeout(400)]


def make(target: str, destination: Path) -> str:
    command = ["make", "--no-print-directory", target, f"DESTDIR={destination}", "PREFIX=/usr"]
    result = subprocess.run(
        [*command, "EXTRAS="], cwd=ROOT, capture_output=True, text=True, check=False
    )
    said = result.stdout + result.stderr
    if result.returncode and re.search("No matching distribution|NewConnectionError", said):
        pytest.skip("NOT TESTED: pip has no package index here")
    assert result.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tree, after it was moved away from where it was made."""
    made = tmp_path_factory.mktemp("made-here") / "destination"
    make("install", made)
    moved = tmp_path_factory.mktemp("moved") / "root"
    made.rename(moved)
    yield moved
    shutil.rmtree(moved)


def ploopctl(installed: Path, *words: str | Path) -> str:
    python = installed / ENVIRONMENT / "bin/python"
    command = [python, "-I", "-m", "ploopd.cli.ploopctl", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_program_is_whole(installed: Path, tmp_path: Path) -> None:
    image = tmp_path / "x.hds"
    ploopctl(installed, "image", "create", "--size", "16M", image)
    assert "16 MiB" in ploopctl(installed, "image", "info", image)
    for name in ("ploopd", "ploopctl"):
        script = installed / "usr/bin" / name
        assert script.resolve() == (installed / ENVIRONMENT / "bin" / name).resolve()
        assert script.read_text().startswith(f"#!/{ENVIRONMENT}/bin/python\n")


def test_its_request_path_is_compiled(installed: Path) -> None:
    if absent := oracles.have("gcc"):
        pytest.skip(f"{absent[0]} is not installed")
    command = [installed / ENVIRONMENT / "bin/python", "-I", "-c"]
    command += ["from ploopd.daemon import request_path; print(request_path())"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout == "compiled\n"


def test_nothing_remembers_where_it_was_made(installed: Path) -> None:
    for path in installed.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            assert b"made-here" not in content, path
            assert os.fsencode(ROOT) not in content, path


def test_the_units_find_it(installed: Path) -> None:
    for unit in (installed / "usr/lib/systemd/system").iterdir():
        program = re.search(r"^ExecStart=(\S+)", unit.read_text(), re.M)
        assert program is not None
        assert (installed / program[1].lstrip("/")).exists(), unit


@pytest.mark.parametrize("name", ["ploopd", "ploopctl"])
def test_completion(installed: Path, name: str) -> None:
    share = installed / "usr/share"
    script = share / "bash-completion/completions" / name
    command = ["bash", "--norc", "-c", f". {script}; complete -p {name}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.strip().endswith(name)
    assert (share / f"zsh/site-functions/_{name}").read_text().startswith(f"#compdef {name}\n")
    assert (
        f"complete --no-files --command {name}"
        in (share / f"fish/vendor_completions.d/{name}.fish").read_text()
    )


def test_uninstall_takes_all_of_it(installed: Path) -> None:
    make("uninstall", installed)
    left = {str(one.relative_to(installed)) for one in installed.rglob("*") if one.is_file()}
    assert left == {"etc/ploopd/ploopd.toml"}
