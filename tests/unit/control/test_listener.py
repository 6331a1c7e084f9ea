"""Who gets the control socket's path."""

from __future__ import annotations

import os
import socket
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ploopd.control import paths
from ploopd.control.listener import ControlSocket, claim_control_socket
from ploopd.errors import DeniedError, ExitCode, NotFoundError, PloopError, UsageError


@pytest.fixture
def default_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", os.getuid)
    path = tmp_path / "ploopd" / "control.sock"
    monkeypatch.setattr("ploopd.control.listener.default_control_path", lambda: path)
    return path


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
        return True


def test_the_socket_is_private_and_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    claimed = claim_control_socket(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert connects(path)
    claimed.close()
    assert list(tmp_path.iterdir()) == []
    claim_control_socket(path).close()


def test_closing_leaves_the_socket_of_a_successor(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    first = claim_control_socket(path)
    path.unlink()
    second = claim_control_socket(path)
    first.close()
    assert connects(path)
    second.close()


def test_daemons_that_start_together_do_not_both_get_the_path(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    barrier = threading.Barrier(8)

    def claim() -> ControlSocket | None:
        barrier.wait()
        try:
            return claim_control_socket(path)
        except PloopError as error:
            return None if error.exit_code == ExitCode.ADDRESS_IN_USE else pytest.fail(str(error))

    with ThreadPoolExecutor(8) as pool:
        claimed = [one for one in pool.map(lambda _: claim(), range(8)) if one is not None]
    assert len(claimed) == 1
    assert connects(path)
    claimed[0].close()


def test_a_live_socket_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    first = claim_control_socket(path)
    with pytest.raises(PloopError, match="another ploopd listens here") as caught:
        claim_control_socket(path)
    assert caught.value.exit_code == ExitCode.ADDRESS_IN_USE
    assert connects(path)
    first.close()


def test_a_live_socket_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(PloopError, match="listens here"):
            claim_control_socket(path)
        assert path.exists()


def test_the_socket_of_a_dead_daemon_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.is_socket()
    claimed = claim_control_socket(path)
    assert connects(path)
    claimed.close()


def test_a_file_that_is_not_a_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "image.hds"
    path.write_bytes(b"precious")
    with pytest.raises(UsageError, match="not a socket"):
        claim_control_socket(path)
    assert path.read_bytes() == b"precious"


def test_a_missing_directory_and_a_long_path_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        claim_control_socket(tmp_path / "missing" / "c.sock")
    with pytest.raises(UsageError, match="107 bytes"):
        claim_control_socket(tmp_path / ("x" * 120))


def test_the_default_path_has_a_private_directory(default_path: Path) -> None:
    claimed = claim_control_socket(None)
    assert claimed.path == default_path
    assert claimed.instead_of is None
    assert stat.S_IMODE(default_path.parent.stat().st_mode) == 0o700
    claimed.close()


def test_a_second_daemon_gets_a_path_of_its_own(default_path: Path) -> None:
    first = claim_control_socket(None)
    second = claim_control_socket(None)
    assert second.instead_of == default_path
    assert second.path == default_path.with_name(f"control-{os.getpid()}.sock")
    assert connects(first.path)
    assert connects(second.path)
    second.close()
    first.close()


def test_a_directory_that_others_can_write_is_refused(default_path: Path) -> None:
    default_path.parent.mkdir(mode=0o700)
    default_path.parent.chmod(0o777)
    with pytest.raises(DeniedError, match="can be written by others"):
        claim_control_socket(None)


def test_a_symlink_in_place_of_the_directory_is_refused(default_path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    default_path.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DeniedError, match="not a directory"):
        claim_control_socket(None)


def test_default_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert paths.default_control_path() == Path("/run/ploopd/control.sock")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert paths.default_control_path() == Path("/run/user/1000/ploopd/control.sock")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert paths.default_control_path() == Path("/tmp/ploopd-1000/control.sock")
