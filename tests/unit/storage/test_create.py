"""New images: what is in them, and that a failure leaves nothing behind."""

from __future__ import annotations

import errno
import functools
import json
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from image_format import TOP_GUID, PvdHeader, chain, parse_descriptor
from ploopd.errors import (
    DeniedError,
    ExitCode,
    NotFoundError,
    PloopError,
    StorageError,
    UsageError,
)
from ploopd.fileio.oslayer import RealOs
from ploopd.storage.create import create_image
from tests.support import oracles

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


def qemu_info(path: Path) -> dict[str, Any]:
    command = ["qemu-img", "info", "--output=json", "-f", "parallels", str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def ploop(*arguments: str | None) -> str:
    """What Debian's libploop says; it needs neither kernel nor root for this."""
    oracles.require_libploop_locks()
    command = [oracles.PLOOP, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("cluster", [32 * KIB, 64 * KIB, MIB, 64 * MIB])
def test_qemu_and_ploop_accept_new_images(tmp_path: Path, version: int, cluster: int) -> None:
    path = tmp_path / "new.hds"
    made = create_image(path, 2 * GIB, cluster, version)
    assert made.path == str(path)
    assert made.descriptor is None
    assert qemu_info(path)["virtual-size"] == 2 * GIB
    # QEMU 7.2 takes an empty BAT of several clusters for a leak, in its own images too.
    quirk = made.header.header_clusters > 1
    check = ["qemu-img", "check", "-q", "-f", "parallels", str(path)]
    assert subprocess.run(check, check=False).returncode == (3 if quirk else 0)


@pytest.mark.parametrize("version", [1, 2])
def test_libploop_accepts_new_images(tmp_path: Path, version: int) -> None:
    made = create_image(f"{tmp_path}/vm/", 2 * GIB, 64 * KIB, version, descriptor=True)
    said = ploop("info", "-s", made.descriptor)
    assert said.split("size:")[1].split()[0] == str(2 * GIB // 512)
    assert said.split("blocksize:")[1].split()[0] == "128"
    assert said.split("fmt_version:")[1].split()[0] == str(version)
    ploop("check", "-f", made.path)
    listed = ploop("snapshot-list", "-H", "-o", "uuid,fname", made.descriptor)
    assert listed.split() == [TOP_GUID, made.path]


def test_qemu_writes_into_it_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "new.hds"
    create_image(path, 100 * MIB, 64 * KIB)
    for command in ("write -P 0x5a 70k 200k", "read -P 0x5a 70k 200k", "read -P 0 0 70k"):
        done = subprocess.run(
            ["qemu-io", "-f", "parallels", "-c", command, str(path)],
            check=True,
            capture_output=True,
            text=True,
        )
        assert "Pattern verification failed" not in done.stdout


def test_size_is_rounded_up_to_clusters(tmp_path: Path) -> None:
    made = create_image(tmp_path / "a.hds", 10 * MIB + 1)
    assert made.header.size == 11 * MIB
    assert qemu_info(tmp_path / "a.hds")["virtual-size"] == 11 * MIB


def test_a_16_tib_image_is_a_header(tmp_path: Path) -> None:
    made = create_image(tmp_path / "big.hds", 16 * TIB)
    assert os.path.getsize(tmp_path / "big.hds") == 65 * MIB == made.header.data_offset


def test_the_file_is_private_and_has_its_blocks(tmp_path: Path) -> None:
    create_image(tmp_path / "a.hds", GIB)
    state = os.stat(tmp_path / "a.hds")
    assert stat.S_IMODE(state.st_mode) == 0o600
    assert state.st_nlink == 1
    assert state.st_blocks * 512 == state.st_size == MIB


def test_descriptor_beside_the_delta(tmp_path: Path) -> None:
    made = create_image(tmp_path / "disk.hds", 3 * GIB, descriptor=True)
    assert made.descriptor == str(tmp_path / "DiskDescriptor.xml")
    found = parse_descriptor((tmp_path / "DiskDescriptor.xml").read_bytes())
    assert found.disk_size_sectors == 3 * GIB // 512
    assert [(image.guid, image.file) for image in chain(found)] == [(TOP_GUID, "disk.hds")]


@pytest.mark.parametrize("exists", [True, False])
def test_a_directory_is_an_image_too(tmp_path: Path, exists: bool) -> None:
    directory = tmp_path / "vm.hdd"
    if exists:
        directory.mkdir()
    made = create_image(f"{directory}/", GIB, descriptor=True)
    assert made.path == str(directory / "root.hds")
    assert sorted(os.listdir(directory)) == ["DiskDescriptor.xml", "root.hds"]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"size": 0}, "size"),
        ({"size": 2 * TIB, "version": 1}, "size"),
        ({"size": MIB, "cluster_size": 3 * MIB}, "cluster_size"),
        ({"size": MIB, "version": 3}, "version"),
    ],
)
def test_impossible_images(tmp_path: Path, arguments: dict[str, int], field: str) -> None:
    with pytest.raises(UsageError) as caught:
        create_image(tmp_path / "a.hds", **arguments)
    assert caught.value.field == field
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("taken", ["disk.hds", "DiskDescriptor.xml"])
def test_nothing_is_overwritten(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("precious")
    with pytest.raises(UsageError, match="already exists"):
        create_image(tmp_path / "disk.hds", GIB, descriptor=True)
    assert os.listdir(tmp_path) == [taken]
    assert (tmp_path / taken).read_text() == "precious"


def test_a_dangling_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.hds").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="already exists"):
        create_image(tmp_path / "a.hds", GIB)
    assert os.listdir(tmp_path) == ["a.hds"]


class Interfering(RealOs):
    """Lets something happen at the first fsync: the moment before the file gets its name."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def fsync(self, fd: int, /) -> None:
        os.fsync(fd)
        self._action()


def test_a_file_that_appears_meanwhile_survives(tmp_path: Path) -> None:
    path = tmp_path / "a.hds"
    with pytest.raises(UsageError, match="already exists"):
        create_image(path, GIB, layer=Interfering(lambda: path.write_text("precious") and None))
    assert os.listdir(tmp_path) == ["a.hds"]
    assert path.read_text() == "precious"


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    create_image(tmp_path / "a.hds", GIB)
    assert os.listdir(tmp_path) == ["a.hds"]
    assert PvdHeader.parse((tmp_path / "a.hds").read_bytes()[:64]).size == GIB
    with pytest.raises(UsageError, match="already exists"):
        create_image(tmp_path / "a.hds", GIB)


class Failing(RealOs):
    """Fails the n-th call of any kind that changes something."""

    def __init__(self, at: int, number: int) -> None:
        self.left = at
        self._errno = number

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(self._errno, os.strerror(self._errno))

    def pwritev(self, fd: int, buffers: Any, offset: int, flags: int = 0, /) -> int:
        self._count()
        return os.pwritev(fd, buffers, offset, flags)

    def fsync(self, fd: int, /) -> None:
        self._count()
        os.fsync(fd)


def failure(call: Callable[[], object]) -> StorageError | None:
    try:
        call()
    except StorageError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, ExitCode.NO_SPACE), (errno.EIO, ExitCode.ERROR)]
)
def test_every_failure_leaves_nothing(tmp_path: Path, number: int, code: ExitCode) -> None:
    steps = 0
    while True:
        steps += 1
        layer = Failing(steps, number)
        target = f"{tmp_path}/made/"
        error = failure(functools.partial(create_image, target, GIB, descriptor=True, layer=layer))
        if error is None:
            break
        assert (error.errno, error.exit_code) == (number, code)
        assert os.listdir(tmp_path) == []
    # zeros, header, sync; descriptor, sync; sync of the directory
    assert steps == 7
    assert sorted(os.listdir(tmp_path / "made")) == ["DiskDescriptor.xml", "root.hds"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("missing/a.hds", NotFoundError),
        ("file/a.hds", UsageError),
        ("x" * 300, UsageError),
        ("file/", UsageError),
    ],
)
def test_bad_places(tmp_path: Path, name: str, kind: type[PloopError]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(kind) as caught:
        create_image(f"{tmp_path}/{name}", GIB)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DeniedError):
        create_image(tmp_path / "a.hds", GIB)
