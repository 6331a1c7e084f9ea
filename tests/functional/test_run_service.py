"""`ploopd run` as a service manager starts it: files in, READY=1 out, the watchdog fed."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import images
from tests.support.images import MIB
from tests.support.initiator import Initiator
from tests.support.serve import ServeError, ServeProcess

pytestmark = [pytest.mark.functional, pytest.mark.timeout(60)]


class RunProcess(ServeProcess):
    """A running `ploopd run --config FILE`."""

    def command(self) -> list[str]:
        config = self.directory / "ploopd.toml"
        text = config.read_text().replace("CONTROL", str(self.control))
        config.write_text(text)
        return [sys.executable, "-m", "ploopd.cli.ploopd", "run", "--config", str(config)]


class Manager:
    """The service manager's end of NOTIFY_SOCKET."""

    def __init__(self) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="ploopd-notify.")
        self.path = os.path.join(self.directory.name, "s")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.said: list[str] = []

    def wait_for(self, text: str, seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not any(text in line for line in self.said):
            self.socket.settimeout(max(0.01, deadline - time.monotonic()))
            self.said += self.socket.recv(4096).decode().splitlines()

    def close(self) -> None:
        self.socket.close()
        self.directory.cleanup()


@pytest.fixture
def manager() -> Iterator[Manager]:
    with contextlib.closing(Manager()) as found:
        yield found


def write_config(directory: Path, *devices: str, more: str = "") -> None:
    tables = "".join(f"[[device]]\n{device}\n" for device in devices)
    (directory / "ploopd.toml").write_text(
        f'[daemon]\ncontrol = "CONTROL"\n[iscsi]\nportals = ["127.0.0.1:0"]\n{more}{tables}'
    )


def test_a_service_from_its_files(tmp_path: Path, manager: Manager) -> None:
    paths = [images.write_delta(tmp_path / f"{n}.hds", 16 * MIB, {}) for n in range(3)]
    write_config(
        tmp_path, f'image = "{paths[0]}"\nname = "first"', f'image = "{paths[1]}"\nread_only = true'
    )
    (tmp_path / "ploopd.d").mkdir()
    (tmp_path / "ploopd.d" / "more.toml").write_text(f'[[device]]\nimage = "{paths[2]}"\n')
    env = {"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "600000"}
    with RunProcess(*paths, directory=tmp_path, env=env) as server:
        manager.wait_for("READY=1")
        assert "STATUS=serving 3 devices" in manager.said
        rows = server.ctl_json("device", "list")
        assert [row["name"] for row in rows] == ["first", "1", "2"]
        assert [row["read_only"] for row in rows] == [False, True, False]
        with Initiator(server.urls[0]) as initiator:
            initiator.settle()
            initiator.good(initiator.write(0, bytes([5]) * 4096))
            initiator.logout()
        with Initiator(server.urls[1]) as initiator:
            initiator.settle()
            assert initiator.wait(initiator.write(0, bytes(4096))).sense_text.startswith("sense 07")
            initiator.logout()
        manager.said.clear()
        manager.wait_for("WATCHDOG=1")
        server.ctl("device", "standby", "first", "enter")
        manager.wait_for("STATUS=serving 3 devices; in standby: first")
        server.ctl("device", "standby", "first", "leave")
        manager.said.clear()
        manager.wait_for("STATUS=serving 3 devices")
        assert server.stop() == 0, server.stderr[-2000:]
    manager.wait_for("STOPPING=1")


def test_a_mistake_in_a_file_is_one_line_and_code_17(tmp_path: Path) -> None:
    write_config(tmp_path, 'image = "/a"\nreadonly = true')
    with pytest.raises(ServeError) as caught:
        RunProcess("/a", directory=tmp_path).start()
    assert caught.value.returncode == 17
    line = caught.value.stderr.strip()
    assert line.count("\n") == 0
    assert "ploopd.toml: line 7: there is no such key: readonly" in line
    assert "did you mean read_only?" in line


def test_check_config_says_what_would_be_served(tmp_path: Path) -> None:
    write_config(tmp_path, 'image = "/x/a.hds"', 'image = "/y/a.hds"\nrecovery = "reopen"')
    command = [sys.executable, "-m", "ploopd.cli.ploopd", "check-config", "--config"]
    config = tmp_path / "ploopd.toml"
    config.write_text(config.read_text().replace("CONTROL", "/run/c.sock"))
    result = subprocess.run([*command, str(config)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == f"read {config}\n"
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["LUN", "NAME", "READ-ONLY", "RECOVERY", "IMAGE"],
        ["0", "a", "no", "manual", "/x/a.hds"],
        ["1", "a-2", "no", "reopen", "/y/a.hds"],
    ]
    result = subprocess.run(
        [*command, str(tmp_path / "none.toml")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 4
    assert "none.toml: no such file" in result.stderr
