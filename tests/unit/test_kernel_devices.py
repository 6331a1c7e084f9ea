"""Devices for the kernel's target: found by name or path, opened and closed on demand."""

from __future__ import annotations

import errno
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from ploopd.control.automation import Automation, DeviceFiles, RecoveryPolicy
from ploopd.device_table import DeviceTable
from ploopd.devices import DeviceOptions, Environment
from ploopd.errors import ImageFormatError, NotFoundError, PloopError, StorageError, UsageError
from ploopd.fileio.engine import make_engine
from ploopd.frontends.tcmu.names import Reference
from ploopd.gate.events import Event
from ploopd.kernel_devices import KernelDevices
from ploopd.storage.create import create_image
from scst_shim import StandbyCheck

SIZE = 8 << 20

pytestmark = pytest.mark.trio


@pytest.fixture
async def table() -> AsyncIterator[DeviceTable]:
    engine = make_engine("auto")
    check = StandbyCheck()
    check.enable()
    env = Environment(engine=engine, buffers=engine.buffers, check=check, clock=trio.current_time)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        table = DeviceTable(env)
        await nursery.start(table.run)
        yield table
        await table.close()
        nursery.cancel_scope.cancel()
    engine.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.hds"
    create_image(str(path), SIZE, 1 << 20, 2)
    return path


def content(path: Path) -> bytes:
    return path.read_bytes()


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


async def test_a_served_device_is_found_and_stays(table: DeviceTable, image: Path) -> None:
    device = await table.add(str(image))
    devices = KernelDevices(table, DeviceOptions(), Automation(Path("/nowhere")))
    by_name = await devices.acquire(Reference(device="disk"))
    by_path = await devices.acquire(Reference(image=f"{image.parent}/./disk.hds"))
    assert by_name.unit is by_path.unit is device.unit
    assert by_name.size == SIZE
    assert devices.users(device) == 2
    await devices.release(by_name)
    assert devices.users(device) == 1
    await devices.release(by_path)
    assert devices.users(device) == 0
    assert list(table) == [device]


async def test_an_image_is_opened_for_its_first_and_closed_after_its_last_backstore(
    table: DeviceTable, image: Path
) -> None:
    devices = KernelDevices(table, DeviceOptions(), Automation(Path("/nowhere")))
    reference = Reference(image=str(image))
    first, second = await devices.acquire(reference), await devices.acquire(reference)
    assert len(table) == 1
    await devices.release(first)
    assert len(table) == 1
    await devices.release(second)
    assert len(table) == 0
    await devices.release(await devices.acquire(reference))  # its locks are gone


async def test_a_device_that_is_served_comes_and_goes_as_an_event(
    table: DeviceTable, image: Path
) -> None:
    devices = KernelDevices(table, DeviceOptions(), Automation(Path("/nowhere")))
    reference = Reference(image=str(image))
    events: list[Event] = []
    table.env.events.subscribe(events.append)
    await devices.release(await devices.acquire(reference))  # its size was not the backstore's
    assert events == []
    first, second = await devices.acquire(reference), await devices.acquire(reference)
    for each in (first, second):
        each.bind()
    for each in (first, second):
        each.unbind()
        await devices.release(each)
    assert [(event.device, event.kind.value, event.details) for event in events] == [
        ("disk", "device-added", {"image": str(image), "size": SIZE, "mode": "rw"}),
        ("disk", "device-removed", {}),
    ]
    device = await table.add(str(image), name="ours")  # of the configuration
    again = await devices.acquire(reference)
    again.bind()
    again.unbind()
    await devices.release(again)
    assert [event.device for event in events] == ["disk", "disk"]
    await table.remove(device)


async def test_two_at_once_open_the_image_once(table: DeviceTable, image: Path) -> None:
    devices = KernelDevices(table, DeviceOptions(), Automation(Path("/nowhere")))
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(devices.acquire, Reference(image=str(image)))
    assert len(table) == 1


async def test_unknown_names_and_files_are_told(table: DeviceTable, tmp_path: Path) -> None:
    devices = KernelDevices(table, DeviceOptions(), Automation(Path("/nowhere")))
    with pytest.raises(NotFoundError, match="there are: none"):
        await devices.acquire(Reference(device="disk"))
    with pytest.raises(NotFoundError, match=r"missing\.hds"):
        await devices.acquire(Reference(image=str(tmp_path / "missing.hds")))
    with pytest.raises(PloopError):
        await devices.acquire(Reference(image="/dev/null"))
    assert len(table) == 0


async def test_a_check_tells_what_would_happen_and_changes_nothing(
    table: DeviceTable, image: Path
) -> None:
    devices = KernelDevices(table, DeviceOptions(), Automation(Path("/nowhere")))
    before = content(image)
    await devices.check(Reference(image=str(image)))
    assert content(image) == before
    assert len(table) == 0
    with pytest.raises(NotFoundError, match="there are: none"):
        await devices.check(Reference(device="disk"))
    with pytest.raises(NotFoundError):
        await devices.check(Reference(image=f"{image}.none"))
    overwrite(image, 28, b"\xff\xff\xff\0")
    with pytest.raises(ImageFormatError):
        await devices.check(Reference(image=str(image)))


async def test_another_medium_is_a_replace(table: DeviceTable, image: Path, tmp_path: Path) -> None:
    devices = KernelDevices(table, DeviceOptions(), Automation(Path("/nowhere")))
    served = await devices.acquire(Reference(image=str(image)))
    other = tmp_path / "other.hds"
    create_image(str(other), SIZE, 1 << 20, 2)
    await devices.change_medium(served, Reference(image=str(other)))
    assert [device.image for device in table] == [str(other)]
    with pytest.raises(UsageError, match="a device's name"):
        await devices.change_medium(served, Reference(device="disk"))


async def test_a_change_of_medium_stops_an_automatic_recovery_under_way(
    table: DeviceTable, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator wins: what reopens the old image is not waited for, nor does it refuse him."""
    other = tmp_path / "other.hds"
    shutil.copyfile(image, other)
    began, gone = trio.Event(), False

    async def slow(_files: DeviceFiles, _path: str) -> None:
        nonlocal gone
        began.set()
        try:
            await trio.sleep_forever()
        finally:
            gone = True

    monkeypatch.setattr(DeviceFiles, "fingerprint", slow)
    device = await table.add(str(image))
    device.bind()
    automation = Automation(Path("/nowhere"))
    devices = KernelDevices(table, DeviceOptions(), automation)
    served = await devices.acquire(Reference(device="disk"))
    automation.add(device, RecoveryPolicy(mode="reopen"))
    async with trio.open_nursery() as nursery:
        await nursery.start(automation.run)
        device.gate.judge(StorageError(errno.EIO, "write"))
        with trio.fail_after(10):
            await began.wait()
        await devices.change_medium(served, Reference(image=str(other)))
        assert gone
        nursery.cancel_scope.cancel()
    assert device.image == str(other)
    assert device.gate.standby_text == "off"


async def test_an_image_that_is_opened_for_a_backstore_is_recovered_as_configured(
    table: DeviceTable, image: Path
) -> None:
    automation = Automation(Path("/nowhere"))
    devices = KernelDevices(table, DeviceOptions(), automation, RecoveryPolicy(mode="reopen"))
    served = await devices.acquire(Reference(image=str(image)))
    (device,) = table
    served.bind()
    async with trio.open_nursery() as nursery:
        await nursery.start(automation.run)
        device.gate.judge(StorageError(errno.EIO, "write"))
        with trio.fail_after(10):
            while device.gate.standby_text == "on":  # noqa: ASYNC110 - nobody announces it
                await trio.sleep(0.01)
        served.unbind()
        await devices.release(served)
        assert not list(table)
        nursery.cancel_scope.cancel()


async def test_a_disk_grows_to_exactly_what_a_backstore_wants(
    table: DeviceTable, image: Path
) -> None:
    devices = KernelDevices(table, DeviceOptions(), Automation(Path("/nowhere")))
    served = await devices.acquire(Reference(image=str(image)))
    with pytest.raises(UsageError, match=str(SIZE + (1 << 20))):
        await served.grow(SIZE + 512)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(served.wait_resized)
        await trio.testing.wait_all_tasks_blocked()
        await served.grow(2 * SIZE)
    assert served.size == 2 * SIZE
