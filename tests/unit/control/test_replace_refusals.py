"""Every wrong image is refused with a clear message, before anything is touched."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ploopd.control.recovery import (
    replace,
)
from ploopd.errors import (
    CorruptImageError,
    DeniedError,
    ImageFormatError,
    LockedError,
    NotFoundError,
    PloopError,
    UncleanImageError,
    UnsupportedError,
    UsageError,
)
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.gate.state import GateState
from tests.support.images import write_delta
from tests.support.served import (
    read,
    serving,
    write,
)
from tests.unit.control.recovery_rig import CLUSTER, SIZE, image

Wrong = Callable[[Path], Path]


def _truncated(path: Path) -> Path:
    found = image(path, "short.hds")
    os.truncate(found, 100)
    return found


def _garbage(path: Path) -> Path:
    found = path / "garbage.hds"
    found.write_bytes(b"no image at all " * 65536)
    return found


def _duplicate(path: Path) -> Path:
    clusters = dict.fromkeys(range(4), b"d" * CLUSTER)
    found = write_delta(path / "duplicate.hds", SIZE, clusters, cluster_size=CLUSTER)
    data = bytearray(found.read_bytes())
    data[64:68] = data[68:72]
    found.write_bytes(data)
    return found


def _in_use(path: Path) -> Path:
    found = image(path, "unclean.hds")
    data = bytearray(found.read_bytes())
    data[44:48] = (0x746F6E59).to_bytes(4, "little")
    found.write_bytes(data)
    return found


def _directory(path: Path) -> Path:
    found = path / "directory"
    found.mkdir()
    return found


def _link_to_nothing(path: Path) -> Path:
    found = path / "link.hds"
    found.symlink_to(path / "nothing")
    return found


WRONG: dict[str, tuple[Wrong, type[PloopError], str]] = {
    "missing": (lambda path: path / "missing.hds", NotFoundError, "no such file"),
    "dangling link": (_link_to_nothing, NotFoundError, "no such file"),
    "directory": (_directory, UnsupportedError, "regular"),
    "device node": (lambda _: Path("/dev/null"), UnsupportedError, "regular"),
    "smaller disk": (lambda path: image(path, "n.hds", size=SIZE // 2), UsageError, "disk_size"),
    "larger disk": (lambda path: image(path, "n.hds", size=SIZE * 2), UsageError, "disk_size"),
    "cluster size": (
        lambda path: image(path, "n.hds", cluster_size=CLUSTER * 2),
        UsageError,
        "cluster_size",
    ),
    "version": (lambda path: image(path, "n.hds", version=1), UsageError, "format_version"),
    "truncated": (_truncated, ImageFormatError, "short.hds"),
    "garbage": (_garbage, ImageFormatError, "garbage.hds"),
    "in use": (_in_use, UncleanImageError, "--force"),
}


@pytest.mark.trio
@pytest.mark.parametrize("began", [GateState.ACTIVE, GateState.STANDBY])
@pytest.mark.parametrize("kind", list(WRONG))
async def test_a_wrong_image_is_refused_before_anything_is_touched(
    kind: str, began: GateState, tmp_path: Path
) -> None:
    make, error, words = WRONG[kind]
    path = image(tmp_path)
    async with serving() as served:
        device = await served.add(path)
        await write(device, 0, b"a" * 4096)
        if began is GateState.STANDBY:
            device.gate.enter_standby("test")
        wrong = make(tmp_path)
        before = wrong.read_bytes() if wrong.is_file() else b""
        with pytest.raises(error) as caught:
            await replace(device, str(wrong))
        assert words in str(caught.value)
        assert str(wrong) in str(caught.value)
        assert device.gate.state is began
        assert device.volume_open
        assert (wrong.read_bytes() if wrong.is_file() else b"") == before
        if began is GateState.STANDBY:
            await replace(device, str(path))
        assert await read(device, 0, 4096) == b"a" * 4096


@pytest.mark.trio
async def test_a_corrupt_map_is_found_at_open_and_the_device_stays_in_standby(
    tmp_path: Path,
) -> None:
    path = image(tmp_path)
    async with serving() as served:
        device = await served.add(path)
        device.gate.enter_standby("test")
        with pytest.raises(CorruptImageError, match="BAT"):
            await replace(device, str(_duplicate(tmp_path)))
        assert device.gate.standby_text == "on"
        await replace(device, str(path))
        assert device.gate.standby_text == "off"


@pytest.mark.trio
async def test_the_image_of_another_live_device_is_refused_by_its_locks(tmp_path: Path) -> None:
    first, second = image(tmp_path, "one.hds"), image(tmp_path, "two.hds")
    async with serving() as served:
        one, two = await served.add(first), await served.add(second)
        one.gate.enter_standby("test")
        with pytest.raises(LockedError):
            await replace(one, str(second), force=True)
        assert one.gate.standby_text == "on"
        await write(two, 0, b"2" * 4096)
        await replace(one, str(first))


@pytest.mark.trio
async def test_a_file_without_permission_is_refused(tmp_path: Path, faulty: FaultyOs) -> None:
    path, other = image(tmp_path), image(tmp_path, "other.hds")
    async with serving(faulty) as served:
        device = await served.add(path)
        faulty.add(Fault(op="open", path="other.hds", count=None, error=errno.EACCES))
        with pytest.raises(DeniedError):
            await replace(device, str(other))
        assert device.gate.state is GateState.ACTIVE
