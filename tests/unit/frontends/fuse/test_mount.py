"""What is said of a mount point, or a system, that cannot be used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ploopd.errors import DeniedError, PloopError, UnsupportedError, UsageError
from ploopd.frontends.fuse import mount


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with FUSE, made of files: `device`, and a fusermount3 that says what it is told to
    on standard error, and fails."""
    device = tmp_path / "device"
    device.touch()
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / "fusermount3"
    program.write_text('#!/bin/sh\necho "fusermount3: $SAYS" >&2\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setattr(mount, "FUSE_DEVICE", device)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("SAYS", "user has no write access to mountpoint")
    (tmp_path / "view").mkdir()
    return tmp_path


def test_an_empty_directory_is_fine(system: Path) -> None:
    mount.check(system / "view")


def test_no_fuse_in_the_kernel(system: Path) -> None:
    (system / "device").unlink()
    with pytest.raises(UnsupportedError, match=r"no FUSE in this kernel.*modprobe fuse"):
        mount.check(system / "view")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_no_permission_for_fuse(system: Path) -> None:
    (system / "device").chmod(0)
    with pytest.raises(DeniedError, match="cannot be read and written"):
        mount.check(system / "view")


def test_no_fusermount(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(system / "nothing"))
    with pytest.raises(UnsupportedError, match="apt-get install fuse3"):
        mount.check(system / "view")


def test_something_is_mounted_there() -> None:
    with pytest.raises(UsageError, match="something is mounted there already"):
        mount.check(Path("/proc"))


def test_what_fusermount_says_is_passed_on(system: Path) -> None:
    with pytest.raises(PloopError) as refused:
        mount.mount(system / "view", everybody=False)
    text = str(refused.value)
    assert f"{system}/view: cannot be mounted: user has no write access to mountpoint" in text
    with pytest.raises(PloopError, match="cannot be unmounted: user has no write access"):
        mount.unmount(system / "view")


def test_a_hint_names_the_command(system: Path) -> None:
    with pytest.raises(PloopError) as missing:
        mount.check(system / "nothing")
    assert missing.value.hint == f"mkdir -p {system}/nothing"
    (system / "view/file").touch()
    with pytest.raises(UsageError, match="is not empty: it has 'file'"):
        mount.check(system / "view")
