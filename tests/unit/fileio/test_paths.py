"""Names from a descriptor: beneath its directory or not at all; with openat2 and without it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ploopd.errors import DescriptorError, NotFoundError, PloopError
from ploopd.fileio import libc
from ploopd.fileio.paths import open_beneath, relative_name


@pytest.fixture(params=["openat2", "walk"])
def root(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, int]]:
    """A directory with things in it and outside of it, and a descriptor of it."""
    if request.param == "walk":

        def refuse(*_: object) -> int:
            raise OSError(errno.ENOSYS, "no openat2")

        monkeypatch.setattr(libc, "openat2", refuse)
    path = tmp_path / "root"
    (path / "sub").mkdir(parents=True)
    (tmp_path / "outside").write_bytes(b"outside")
    (path / "delta").write_bytes(b"delta")
    (path / "sub" / "base").write_bytes(b"base")
    (path / "link").symlink_to("sub/base")
    (path / "sub" / "up").symlink_to("../delta")
    (path / "out").symlink_to("../outside")
    (path / "absolute").symlink_to(path / "delta")
    (path / "loop").symlink_to("loop")
    (path / "dirlink").symlink_to("sub")
    (path / "outdir").symlink_to("..")
    os.mkfifo(path / "fifo")
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    yield path, fd
    os.close(fd)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("delta", b"delta"),
        ("./delta", b"delta"),
        ("sub/base", b"base"),
        ("sub//base", b"base"),
        ("link", b"base"),
        ("sub/up", b"delta"),
        ("dirlink/base", b"base"),
        ("dirlink/up", b"delta"),
    ],
)
def test_what_is_beneath_is_opened(root: tuple[Path, int], name: str, content: bytes) -> None:
    fd = open_beneath(root[1], name, os.O_RDONLY)
    assert os.read(fd, 100) == content
    assert os.get_blocking(fd)
    assert not os.get_inheritable(fd)
    os.close(fd)


REFUSED = (
    *("out", "absolute", "loop", "outdir/outside", "../outside", "sub/../../outside"),
    *("sub/../delta", "/etc/passwd", "delta/below", "fifo", "sub", "dirlink", ".", "", "a\0b"),
)


@pytest.mark.parametrize("name", REFUSED)
def test_what_leads_out_or_is_no_file_is_refused(root: tuple[Path, int], name: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DescriptorError) as caught:
        open_beneath(root[1], name, os.O_RDWR)
    assert name == "" or repr(name) in str(caught.value) or name in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_not_there_is_not_found(root: tuple[Path, int]) -> None:
    for name in ("none", "sub/none", "nodir/none"):
        with pytest.raises(NotFoundError, match="no such file"):
            open_beneath(root[1], name, os.O_RDONLY)


def test_an_absolute_name_within_the_configured_root(root: tuple[Path, int]) -> None:
    path, fd = root
    found = open_beneath(fd, str(path / "delta"), os.O_RDONLY, root=path)
    assert os.read(found, 10) == b"delta"
    os.close(found)
    for name in (path.parent / "outside", Path(f"{path}x/delta"), path / ".." / "outside"):
        with pytest.raises(DescriptorError):
            open_beneath(fd, str(name), os.O_RDONLY, root=path)


def test_relative_names() -> None:
    assert relative_name("a/./b") == "a/b"
    assert relative_name("/images/a/b", Path("/images")) == "a/b"
    with pytest.raises(DescriptorError, match="absolute"):
        relative_name("/images/a")


def test_a_file_that_is_swapped_meanwhile_is_not_served(
    root: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fd = root
    real = os.open if libc.openat2.__name__ == "refuse" else libc.openat2
    calls = [0]

    def swap(*arguments: object, **options: object) -> int:
        calls[0] += 1
        if calls[0] == 2:
            (path / "other").write_bytes(b"other")
            (path / "other").rename(path / "delta")
        return real(*arguments, **options)  # type: ignore[operator]

    if real is os.open:
        monkeypatch.setattr(os, "open", swap)
    else:
        monkeypatch.setattr(libc, "openat2", swap)
    with pytest.raises(PloopError, match="was replaced"):
        open_beneath(fd, "delta", os.O_RDONLY)
