"""`ploopctl shell` on a running daemon, one command at a time and from standard input."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ploopd.config_file import load_config
from tests.support.serve import ServeProcess

pytest.importorskip("configshell_fb")
pytestmark = pytest.mark.functional


@contextmanager
def serving(tmp_path: Path) -> Iterator[ServeProcess]:
    for name in ("one.hds", "two.hds"):
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "parallels", str(tmp_path / name), "64M"], check=True
        )
    images = (tmp_path / "one.hds", tmp_path / "two.hds")
    with ServeProcess(*images, directory=tmp_path, options=("--park-max", "7")) as served:
        yield served


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServeProcess]:
    with serving(tmp_path) as served:
        yield served


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    """For tests that change nothing."""
    with serving(tmp_path_factory.mktemp("shell")) as served:
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


def test_a_device_grows(served: ServeProcess) -> None:
    steps = shell(served, "/devices/one", "resize", "size=+64M").stdout
    assert [line.split(" s  ")[1] for line in steps.splitlines()][-2:] == ["release", "done"]
    assert "(128 MiB) active" in shell(served, "ls", "/devices").stdout
    refused = shell(served, "/devices/one", "resize", "1M")
    assert "can only become larger" in refused.stderr
    assert "is not a size" in shell(served, "/devices/one", "resize", "+x").stderr


def test_commands_come_from_standard_input_until_the_first_error(served: ServeProcess) -> None:
    script = "cd /devices/two\n# a comment\n\npwd\nnonsense\nversion\n"
    done = shell(served, stdin=script)
    assert done.stdout.split() == ["/devices/two"]
    assert "Command not found nonsense" in done.stderr
    assert done.returncode == 1


def test_exit_ends_a_script(served: ServeProcess) -> None:
    done = shell(served, stdin="version\nexit\nnonsense\n")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)


def test_the_events_of_one_device_and_of_all(served: ServeProcess) -> None:
    shell(served, "/devices/one", "standby", "enter")
    shell(served, "/devices/one", "standby", "leave")
    events = [line.split()[2:4] for line in shell(served, "/devices", "events").stdout.splitlines()]
    assert events == [
        ["one", "device-added"],
        ["two", "device-added"],
        ["one", "standby-entered"],
        ["one", "standby-left"],
    ]
    assert len(shell(served, "/devices/two", "events").stdout.splitlines()) == 1


def test_a_device_is_found_by_a_relative_path_and_all_by_a_star(served: ServeProcess) -> None:
    done = shell(served, stdin="cd devices\none/ info\n* standby\n")
    assert done.returncode == 0, done.stderr
    assert "name: one" in done.stdout
    for name in ("one", "two"):
        assert f"[/devices/{name}]\noff\n" in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["/devices/none", "info"], 1, "No such path /devices/none"),
        (["/devices/one", "replace", "image=/nowhere"], 4, "/nowhere: no such file"),
        (["/devices/one", "standby", "sideways"], 1, "none of show, enter, leave"),
        (["/devices/one", "replace", "x", "force=perhaps"], 1, "neither true nor false"),
        (
            ["/devices/one", "replace", "image=/no where/\u00fc.hds"],
            4,
            "/no where/\u00fc.hds: no such",
        ),
        (["/devices/one", "replace"], 1, "Missing required parameter image"),
        (["/devices/one", "info", "more=x"], 1, "more"),
        (["/devices/one replace 'image=/no where'"], 4, "/no where: no such file"),
        (["/devices/one replace 'image=/no"], 1, "no closing quotation"),
        (["ls", "/nowhere"], 1, "/nowhere"),
        (["cd", "/nowhere"], 1, "/nowhere"),
        (["reload"], 16, "only `ploopd run` has something to read again"),
        (["/devices", "reload"], 1, "Command not found reload"),
        (["/lio", "export", "one", "iqn.2026-01.org.example:x"], 16, "does not serve"),
        (["/lio", "export", "one", "iqn.2026-01.org.example:x", "lun=x"], 1, "not a number"),
    ],
)
def test_errors_are_told_in_one_line(
    unchanged: ServeProcess, words: list[str], code: int, reason: str
) -> None:
    done = shell(unchanged, *words)
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


def test_names_and_paths_are_completed(unchanged: ServeProcess) -> None:
    command = [sys.executable, "-m", "ploopd.cli.ploopctl", "--control", str(unchanged.control)]
    image = unchanged.directory / "one.hds"
    pid, terminal = pty.fork()
    if pid == 0:  # pragma: no cover
        os.environ |= {"HOME": str(unchanged.directory), "TERM": "dumb"}
        os.execv(sys.executable, [*command, "shell"])

    def read_until(wanted: str) -> str:
        seen = ""
        while wanted not in seen:
            assert select.select([terminal], [], [], 30)[0], f"no {wanted!r} in {seen!r}"
            seen += os.read(terminal, 65536).decode()
        return seen

    def say(text: str, wanted: str) -> str:
        os.write(terminal, text.encode())
        return read_until(wanted)

    try:
        termios.tcsetwinsize(terminal, (24, 500))  # nothing is scrolled
        read_until("/> ")
        say("/devices/t\t", "/devices/two ")
        say("inf\t\n", "name: two")
        read_until("/> ")
        say("/devices/one rep\t", "replace ")
        say(f"image={str(image)[:-6]}\t", str(image)[-6:])
        say(" dry_run=t\t", "dry_run=true")
        say("\x15\n", "/> ")  # the line is taken back
        say("nonsense\n", "Command not found")
        say("cd /devices/one\n", "/devices/one> ")
        os.write(terminal, b"exit\n")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        pid = 0
    finally:
        os.close(terminal)
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
