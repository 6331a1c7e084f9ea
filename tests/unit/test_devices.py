"""Names, the table, the life of a device, and the timer that answers BUSY."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
import trio

from ploopd.device_table import DeviceTable, device_name, unique_name
from ploopd.devices import DeviceOptions
from ploopd.errors import LockedError, NotFoundError, ParkTimeoutError, PloopError, StorageError
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.gate.limits import ParkLimits
from ploopd.storage.create import create_image
from tests.support.served import call, flush, read, serving, write

SIZE = 4 << 20


def image(directory: Path, name: str = "disk.hds") -> Path:
    directory.mkdir(exist_ok=True)
    create_image(directory / name, SIZE, cluster_size=64 << 10)
    return directory / name


def open_files() -> list[str]:
    return [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/vz/private/101/root.hdd/root.hds", "root"),
        ("/vz/private/101/root.hdd/DiskDescriptor.xml", "root"),
        ("/vz/private/101/root.hdd", "root"),
        ("/vz/private/101/root.hdd/", "root"),
        ("/srv/my disk (old).raw", "my-disk-old"),
        ("/srv/.hidden", "hidden"),
        ("/srv/плуп.hds", "disk"),
        ("/srv/a.b.hds", "a.b"),
        ("/", "disk"),
    ],
)
def test_names_come_from_the_file(path: str, name: str) -> None:
    assert device_name(path) == name


def test_names_are_unique() -> None:
    assert unique_name("root", {}) == "root"
    assert unique_name("root", {"root": 1, "root-2": 1}) == "root-3"


@pytest.mark.trio
async def test_a_table_serves_devices_side_by_side(tmp_path: Path) -> None:
    paths = [image(tmp_path / each, "root.hds") for each in ("a", "b")]
    async with serving() as served:
        one, two = [await served.add(path) for path in paths]
        table = served.table
        assert (len(table), [each.name for each in table]) == (2, ["root", "root-2"])
        assert table.get("root-2") is two
        assert table.get(str(paths[0])) is one
        with pytest.raises(NotFoundError, match="there are: root, root-2"):
            table.get("disk")
        assert one.identity != two.identity
        assert one.unit is not two.unit
        one.gate.enter_standby("test")
        await write(two, 0, b"2" * 4096)  # the other one is not concerned
        assert (one.gate.standby_text, two.gate.standby_text) == ("on", "off")
        assert one.size == SIZE


@pytest.mark.trio
async def test_an_image_is_served_once(tmp_path: Path) -> None:
    path = image(tmp_path)
    async with serving() as served:
        await served.add(path)
        with pytest.raises(LockedError):
            await served.add(path)
        assert len(served.table) == 1


@pytest.mark.trio
async def test_an_image_that_cannot_be_opened_leaves_no_device(tmp_path: Path) -> None:
    async with serving() as served:
        with pytest.raises(NotFoundError):
            await served.add(tmp_path / "missing.hds")
        assert len(served.table) == 0


@pytest.mark.trio
async def test_a_table_that_is_not_running_takes_no_device(tmp_path: Path) -> None:
    async with serving() as served:
        with pytest.raises(RuntimeError, match="not running"):
            await DeviceTable(served.table.env).add(str(tmp_path / "disk.hds"))


@pytest.mark.trio
async def test_closing_clears_the_in_use_word_and_twice_is_once(tmp_path: Path) -> None:
    path = image(tmp_path)
    async with serving() as served:
        device = await served.add(path)
        await write(device, 0, b"x" * 4096)
        assert path.read_bytes()[44:48] != bytes(4)
        assert await served.table.close() == []
        assert path.read_bytes()[44:48] == bytes(4)
        await device.close()
    async with serving() as served:
        device = await served.add(path)
        assert await read(device, 0, 4096) == b"x" * 4096


@pytest.mark.trio
async def test_a_close_that_fails_is_told_and_does_not_keep_the_others(tmp_path: Path) -> None:
    layer = FaultyOs()
    bad, good = image(tmp_path, "bad.hds"), image(tmp_path, "good.hds")
    async with serving(layer) as served:
        for path in (bad, good):
            await write(await served.add(path), 0, b"x" * 4096)
        layer.add(Fault(op="sync", path="bad.hds", count=None, error=errno.EIO))
        problems = await served.table.close()
        assert [problem.path for problem in problems] == [str(bad)]
        assert good.read_bytes()[44:48] == bytes(4)
        assert bad.read_bytes()[44:48] != bytes(4)


@pytest.mark.trio
async def test_a_close_that_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ploopd.devices.CLOSE_DEADLINE", 0.2)
    layer = FaultyOs()
    path = image(tmp_path)
    async with serving(layer) as served:
        device = await served.add(path)
        layer.add(Fault(op="sync", count=None, hang=True))
        with trio.fail_after(5), pytest.raises(PloopError, match="abandoned"):
            await device.close()
        layer.clear()
        layer.release()


@pytest.mark.trio
async def test_parked_requests_are_answered_busy_in_time_and_only_then(tmp_path: Path) -> None:
    limits = ParkLimits(park_max=0.2)
    async with serving() as served:
        device = await served.add(image(tmp_path), DeviceOptions(limits=limits))
        for _ in range(2):  # a second episode, too
            device.gate.enter_standby("test")
            started = time.monotonic()
            for _ in range(2):
                with pytest.raises(ParkTimeoutError):
                    await call(device, "write", 0, memoryview(b"x" * 4096))
            assert 0.4 <= time.monotonic() - started < 3.0
            device.gate.leave_standby()
            await flush(device)
        assert await read(device, 0, 4096) == bytes(4096)


@pytest.mark.trio
async def test_errors_reach_the_caller_while_no_front_end_has_set_the_fuse(tmp_path: Path) -> None:
    layer = FaultyOs()
    path = image(tmp_path)
    async with serving(layer) as served:
        device = await served.table.add(str(path))
        assert device.gate.standby_text == "not supported"
        layer.add(Fault(op="sync", error=errno.EIO))
        with pytest.raises(StorageError):
            await flush(device)
        device.bind()
        assert device.gate.standby_text == "off"
        device.unbind()
        assert device.gate.standby_text == "not supported"


@pytest.mark.trio
async def test_descriptors_of_closed_devices_are_given_back(tmp_path: Path) -> None:
    path = image(tmp_path)
    async with serving() as served:
        await served.add(path)
    assert str(path) not in open_files()


@pytest.mark.trio
async def test_a_request_that_fails_late_is_answered_in_its_own_time(tmp_path: Path) -> None:
    layer = FaultyOs()
    async with serving(layer) as served:
        limits = ParkLimits(park_max=1.0)
        device = await served.add(image(tmp_path), DeviceOptions(limits=limits))
        await write(device, 0, b"x" * 4096)
        layer.add(Fault(op="write", delay=0.8, error=errno.EIO))
        answered: dict[str, float] = {}

        async def busy(name: str, offset: int) -> None:
            with pytest.raises(ParkTimeoutError):
                await call(device, "write", offset, memoryview(b"y" * 4096))
            answered[name] = time.monotonic()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(busy, "executed first", 0)
            await trio.sleep(0.6)
            device.gate.enter_standby("test")
            nursery.start_soon(busy, "only parked", 8192)
        assert answered["only parked"] - answered["executed first"] > 0.2


@pytest.mark.trio
@pytest.mark.parametrize("fuses", [True, False])
async def test_the_in_use_word_tells_of_an_error_that_nobody_recovered_from(
    tmp_path: Path, fuses: bool
) -> None:
    layer = FaultyOs()
    path = image(tmp_path)
    async with serving(layer) as served:
        device = await served.table.add(str(path))
        if fuses:
            device.bind()
        layer.add(Fault(op="read", start=64 << 10, error=errno.EIO))
        await write(device, 0, b"x" * 4096)
        device.gate.read(0, memoryview(bytearray(4096)), lambda _: None)
        device.gate.kick()
        with trio.fail_after(5):
            while not (device.gate.faulted or device.gate.latched):  # noqa: ASYNC110
                await trio.sleep(0.01)
        await device.close()
    assert path.read_bytes()[44:48] == b"Ynot"
    async with serving() as served:
        device = await served.add(path)  # checked, and found to be sound
        assert await read(device, 0, 4096) == b"x" * 4096
    assert path.read_bytes()[44:48] == bytes(4)
