"""`ploopctl shell` on a running daemon, one command at a time and from standard input."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ploopd.config_file import load_config
from tests.support.serve import ServeProcess

pytest.importorskip("configshell_fb")
pytestmark = pytest.mark.functional


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServeProcess]:
    for name in ("one.hds", "two.hds"):
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "parallels", str(tmp_path / name), "64M"], check=True
        )
    images = (tmp_path / "one.hds", tmp_path / "two.hds")
    with ServeProcess(*images, directory=tmp_path, options=("--park-max", "7")) as served:
        yield served


def shell(
    served: ServeProcess, *words: str, stdin: str | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ploopd.cli.ploopctl", "--control", str(served.control)]
    return subprocess.run(
        [*command, "shell", *words],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        timeout=60,
    )


def test_the_tree_shows_devices_and_targets(served: ServeProcess) -> None:
    tree = shell(served, "ls").stdout
    assert "o- one" in tree
    assert "(64 MiB) active" in tree
    assert "o- lun1" in tree
    assert "[/devices/two]" in tree
    assert "does not serve the kernel's target" in tree
    assert "targets" not in shell(served, "ls", "/devices").stdout


def test_a_device_is_shown_and_put_into_standby(served: ServeProcess) -> None:
    assert "size: 64 MiB (67,108,864 bytes)" in shell(served, "/devices/one", "info").stdout
    assert shell(served, "/devices/one", "standby", "enter").stdout == "on\n"
    assert "in standby: one" in shell(served, "ls", "/devices").stdout
    image = served.directory / "one.hds"
    steps = shell(served, "/devices/one", "replace", f"image={image}").stdout
    assert [line.split(" s  ")[1] for line in steps.splitlines()][-2:] == ["release", "done"]
    assert shell(served, "/devices/one", "standby").stdout == "off\n"


def test_commands_come_from_standard_input_until_the_first_error(served: ServeProcess) -> None:
    script = "cd /devices/two\n# a comment\n\npwd\nnonsense\nversion\n"
    done = shell(served, stdin=script)
    assert done.stdout.split() == ["/devices/two"]
    assert "Command not found nonsense" in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["/devices/none", "info"], 1, "No such path /devices/none"),
        (["/devices/one", "replace", "image=/nowhere"], 4, "/nowhere: no such file"),
        (["/devices/one", "standby", "sideways"], 1, "none of show, enter, leave"),
        (["/lio", "export", "one", "iqn.2026-01.org.example:x"], 16, "does not serve"),
        (["/lio", "export", "one", "iqn.2026-01.org.example:x", "lun=x"], 1, "not a number"),
    ],
)
def test_errors_are_told_in_one_line(
    served: ServeProcess, words: list[str], code: int, reason: str
) -> None:
    done = shell(served, *words)
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.returncode == code


def test_the_configuration_is_saved_and_can_be_run(served: ServeProcess, tmp_path: Path) -> None:
    for _ in range(2):
        assert shell(served, "saveconfig", "saved.toml", cwd=tmp_path).returncode == 0
    config = load_config(tmp_path / "saved.toml").serve
    assert [(device.name, device.park_max) for device in config.devices] == [
        ("one", 7.0),
        ("two", 7.0),
    ]
    assert [device.image for device in config.devices] == [
        str(tmp_path / "one.hds"),
        str(tmp_path / "two.hds"),
    ]
    assert len(list(tmp_path.glob("saved.toml.*"))) == 1, "the first one is kept"
    tomllib.loads((tmp_path / "saved.toml").read_text())


def test_no_daemon_is_told(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ploopd.cli.ploopctl", "--control", str(tmp_path / "none")]
    done = subprocess.run(
        [*command, "shell", "ls"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 3
