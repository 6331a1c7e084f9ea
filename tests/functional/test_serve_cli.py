"""`ploopd serve` as users meet it: start, announce, stop."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ploopd.errors import ExitCode
from tests.functional.serve_rig import SIZE, assert_refused, image, run, snapshot
from tests.support.images import MIB, write_delta
from tests.support.serve import ServeProcess

pytestmark = pytest.mark.functional

__all__ = ["image"]  # a fixture


def test_one_line_per_lun_when_ready(tmp_path: Path, image: Path) -> None:
    other = tmp_path / "a name with spaces.raw"
    other.write_bytes(bytes(SIZE))
    with ServeProcess(image, other, directory=tmp_path) as server:
        assert server.process is not None
        first, second = server.urls
        assert (first.lun, second.lun) == (0, 1)
        assert (first.host, first.iqn) == (second.host, second.iqn)
        assert first.port == second.port != 0
        with socket.create_connection((first.host, first.port), timeout=5):
            pass
        listed = server.ctl_json("device", "list")
        assert [row["name"] for row in listed] == ["disk", "a-name-with-spaces"]
        assert [row["urls"] for row in listed] == [[str(first)], [str(second)]]
        assert [row["image"] for row in listed] == [str(image), str(other)]
        assert [row["size"] for row in listed] == [SIZE, SIZE]
        assert [row["standby"] for row in listed] == ["off", "off"]
        assert server.stop() == 0
    assert "Traceback" not in server.stderr


def test_the_line_has_url_image_and_size(tmp_path: Path, image: Path) -> None:
    command = [sys.executable, "-m", "ploopd.cli.ploopd", "serve", "--portal", "127.0.0.1:0"]
    command += ["--iqn", "iqn.2026-11.org.example:named", "--control", str(tmp_path / "c.sock")]
    with subprocess.Popen([*command, str(image)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.terminate()
        rest = process.stdout.read()
        assert process.wait(20) == 0
    url, path, size = line.split("  ")
    assert re.fullmatch(r"iscsi://127\.0\.0\.1:\d+/iqn\.2026-11\.org\.example:named/0", url)
    assert path == str(image)
    assert size == "8 MiB (8,388,608 bytes)\n"
    assert rest == ""
    assert not (tmp_path / "c.sock").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_closes_cleanly(tmp_path: Path, image: Path, number: signal.Signals) -> None:
    before = image.read_bytes()
    with ServeProcess(image, directory=tmp_path) as server:
        assert image.read_bytes()[:64] != before[:64], "the in-use word is set while served"
        assert server.process is not None
        server.process.send_signal(number)
        assert server.process.wait(20) == 0
        server._forget()
    after = image.read_bytes()
    assert after[: 2 * MIB] == before[: 2 * MIB]
    assert len(after) == len(before), "the preallocation is given back"


def test_a_read_only_server_shares_and_writes_nothing(tmp_path: Path, image: Path) -> None:
    image.chmod(0o444)
    before = snapshot(tmp_path)
    options = ("--read-only",)
    elsewhere = tmp_path.with_name(tmp_path.name + "-logs")
    elsewhere.mkdir()
    with (
        ServeProcess(image, directory=elsewhere, options=options) as one,
        ServeProcess(image, directory=elsewhere, options=options) as two,
    ):
        assert one.ctl_json("device", "list")[0]["read_only"]
        assert two.stop() == 0
        assert one.stop() == 0
    assert snapshot(tmp_path) == before
    shutil.rmtree(elsewhere)


def test_hints_go_to_stderr(tmp_path: Path, image: Path) -> None:
    with ServeProcess(image, directory=tmp_path, options=("--hints",)) as server:
        url = server.url
        assert server.logged(f"iscsiadm -m node -T {url.iqn} -p 127.0.0.1:{url.port}")
        assert server.logged(f"--control {server.control} device list")


def test_standby_off_reads_not_supported(tmp_path: Path, image: Path) -> None:
    with ServeProcess(image, directory=tmp_path, options=("--standby", "off")) as server:
        assert server.standby("disk") == "not supported"
        refused = server.ctl("device", "standby", "disk", "enter", check=False)
        assert refused.returncode == ExitCode.USAGE
        assert "not supported" in refused.stderr


def test_standby_by_hand(tmp_path: Path, image: Path) -> None:
    with ServeProcess(image, directory=tmp_path) as server:
        assert server.standby("disk") == "off"
        server.ctl("device", "standby", "disk", "enter")
        assert server.standby("disk") == "on"
        server.ctl("device", "standby", "disk", "wait", "--state", "on")
        late = server.ctl(
            "device", "standby", "disk", "wait", "--state", "off", "--timeout", "0.3", check=False
        )
        assert late.returncode == ExitCode.TIMEOUT
        assert "waited 0.3 s for standby of disk to be off" in late.stderr
        server.ctl("device", "standby", "disk", "leave")
        assert server.standby("disk") == "off"
        again = server.ctl("device", "standby", "disk", "leave", check=False)
        assert again.returncode == ExitCode.BUSY
        unknown = server.ctl("device", "show", "disc", check=False)
        assert unknown.returncode == ExitCode.NOT_FOUND
        assert "did you mean disk?" in unknown.stderr


def test_a_dead_daemons_socket_is_taken_over(tmp_path: Path, image: Path) -> None:
    server = ServeProcess(image, directory=tmp_path)
    with server:
        server.kill()
        assert server.control.exists()
        refused = server.ctl("device", "list", check=False)
        assert refused.returncode == ExitCode.NOT_RUNNING
        assert str(server.control) in refused.stderr
        server.start()
        assert len(server.ctl_json("device", "list")) == 1


def test_a_live_daemons_socket_is_refused(tmp_path: Path, image: Path) -> None:
    other = tmp_path / "other.hds"
    write_delta(other, SIZE, {0: b"x" * MIB})
    before = other.read_bytes()
    with ServeProcess(image, directory=tmp_path) as server:
        result = run("serve", "--portal", "127.0.0.1:0", "--control", server.control, other)
        assert_refused(result, ExitCode.ADDRESS_IN_USE, str(server.control))
        assert len(server.ctl_json("device", "list")) == 1
    assert other.read_bytes() == before


def test_secrets_are_nowhere_to_be_seen(tmp_path: Path, image: Path) -> None:
    secret = "correct horse battery"
    chap = tmp_path / "chap.toml"
    chap.write_text(f'user = "alice"\nsecret = "{secret}"\n')
    chap.chmod(0o600)
    options = ("--chap-file", str(chap), "--log-level", "debug")
    with ServeProcess(image, directory=tmp_path, options=options) as server:
        shown = server.ctl("device", "show", "disk", "--output", "json").stdout
        shown += server.ctl("info", "--output", "json").stdout
        arguments = Path(f"/proc/{server.pid}/cmdline").read_text()
        environment = Path(f"/proc/{server.pid}/environ").read_text()
        for text in (shown, arguments, environment, server.stderr):
            assert secret not in text
    chap.chmod(0o640)
    result = run("serve", "--portal", "127.0.0.1:0", "--chap-file", chap, image)
    assert_refused(result, ExitCode.DENIED, str(chap))
    assert secret not in result.stderr
