"""The steps of a recovery: one that fails or is cancelled, and what is around it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import trio

from ploopd.control.recovery import (
    ReplaceReport,
    Step,
    StepRecord,
    leave_standby,
    replace,
)
from ploopd.devices import Device, DeviceOptions, OpenedVolume
from ploopd.errors import (
    BusyError,
    ExitCode,
    PloopError,
    StorageError,
)
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.gate.limits import ParkLimits
from ploopd.gate.state import GateState
from ploopd.storage.opener import OpenOptions
from ploopd.storage.volume import Volume
from tests.support.served import (
    call,
    copy_of,
    flush,
    quiet,
    read,
    serving,
    write,
)
from tests.unit.control.recovery_rig import SHORT, SIZE, image


@pytest.mark.trio
@pytest.mark.parametrize("op", ["write", "sync", "open", "read"])
async def test_an_image_on_a_storage_that_is_dead_as_well_leaves_the_device_in_standby(
    op: str, tmp_path: Path, faulty: FaultyOs
) -> None:
    path = image(tmp_path)
    async with serving(faulty) as served:
        device = await served.add(path)
        await write(device, 0, b"a" * 4096)
        await flush(device)
        copy = await trio.to_thread.run_sync(copy_of, path)
        device.gate.enter_standby("test")
        faulty.add(Fault(op=op, path=copy.name, count=None, error=errno.EIO))
        with pytest.raises(StorageError):
            await replace(device, str(copy), force=True, deadlines=SHORT)
        assert device.gate.standby_text == "on"
        faulty.clear()
        await replace(device, str(copy), force=True)
        assert await read(device, 0, 4096) == b"a" * 4096


@pytest.mark.trio
@pytest.mark.parametrize("op", ["open", "read", "write", "sync"])
async def test_an_image_on_a_storage_that_hangs_is_given_up_in_time(
    op: str, tmp_path: Path, faulty: FaultyOs
) -> None:
    path = image(tmp_path)
    async with serving(faulty) as served:
        device = await served.add(path)
        copy = await trio.to_thread.run_sync(copy_of, path)
        device.gate.enter_standby("test")
        faulty.add(Fault(op=op, path=copy.name, count=None, hang=True))
        with trio.fail_after(8), pytest.raises(PloopError) as caught:
            await replace(device, str(copy), force=True, deadlines=SHORT)
        assert caught.value.exit_code is ExitCode.TIMEOUT
        assert device.gate.standby_text == "on"
        await replace(device, str(path))
        assert device.gate.standby_text == "off"
        faulty.clear()
        faulty.release()


@pytest.mark.trio
async def test_a_failing_replay_leaves_the_device_in_standby_and_the_new_image_closed(
    tmp_path: Path,
) -> None:
    path, other = image(tmp_path), image(tmp_path, "other.hds")
    async with serving() as served:
        device = await served.add(path)
        volumes: list[Volume] = []

        async def fail(volume: Volume) -> int:
            volumes.append(volume)
            await trio.lowlevel.checkpoint()
            raise StorageError(errno.EIO, "replay")

        device.replay_hooks.append(fail)
        with pytest.raises(StorageError, match="replay"):
            await replace(device, str(other))
        assert device.gate.standby_text == "on"
        assert other.read_bytes()[44:48] == bytes(4)  # closed cleanly again
        device.replay_hooks.clear()
        await replace(device, str(other))
        assert volumes[0] is not device.volume


@pytest.mark.trio
@pytest.mark.parametrize("step", [Step.STOP, Step.DRAIN, Step.CLOSE, Step.OPEN, Step.REPLAY])
async def test_a_replace_cancelled_after_any_step_can_be_repeated(
    step: Step, tmp_path: Path
) -> None:
    path, other = image(tmp_path), image(tmp_path, "other.hds")
    async with serving() as served:
        device = await served.add(path)
        device.gate.enter_standby("test")
        with trio.CancelScope() as scope:

            def cancel(record: StepRecord) -> None:
                if record.step is step:
                    scope.cancel()

            await replace(device, str(other), on_step=cancel)
        assert scope.cancelled_caught
        assert device.gate.standby_text == "on"
        assert not device.replacing
        await replace(device, str(other))
        assert device.image == str(other)
        await write(device, 0, b"x" * 4096)


@pytest.mark.trio
async def test_an_active_device_goes_on_when_its_replace_is_cancelled_in_time(
    tmp_path: Path,
) -> None:
    path = image(tmp_path)
    async with serving() as served:
        device = await served.add(path)
        with trio.CancelScope() as scope:
            await replace(device, str(path), on_step=lambda _: scope.cancel())
        assert scope.cancelled_caught
        assert device.gate.state is GateState.ACTIVE
        await write(device, 0, b"x" * 4096)


@pytest.mark.trio
async def test_the_second_of_two_replaces_is_refused(tmp_path: Path) -> None:
    path = image(tmp_path)
    async with serving() as served:
        device = await served.add(path)
        reports: list[ReplaceReport] = []
        refused: list[BusyError] = []

        async def one() -> None:
            try:
                reports.append(await replace(device, str(path)))
            except BusyError as error:
                refused.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            nursery.start_soon(one)
        assert (len(reports), len(refused)) == (1, 1)
        assert "replaced already" in str(refused[0])


@pytest.mark.trio
async def test_leaving_standby_by_hand(tmp_path: Path, faulty: FaultyOs) -> None:
    path = image(tmp_path)
    async with serving(faulty) as served:
        device = await served.add(path)
        device.gate.enter_standby("maintenance")
        leave_standby(device)
        assert device.gate.standby_text == "off"
        with pytest.raises(BusyError, match="active"):
            leave_standby(device)
        faulty.add(Fault(op="sync", error=errno.EIO))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flush, device)
            await quiet(device)
            with pytest.raises(BusyError, match="storage failed"):
                leave_standby(device)
            await replace(device, str(path))


@pytest.mark.trio
async def test_with_standby_off_errors_are_reported_and_the_latch_ends_with_a_replace(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    path = image(tmp_path)
    async with serving(faulty) as served:
        device = await served.add(path, DeviceOptions(standby=False))
        assert device.gate.standby_text == "not supported"
        faulty.add(Fault(op="write", error=errno.EIO))
        with pytest.raises(StorageError) as caught:
            await write(device, 0, b"x" * 4096, inline=False)
        assert caught.value.errno == errno.EIO
        with pytest.raises(StorageError) as caught:
            await write(device, 0, b"x" * 4096)
        assert caught.value.errno == errno.EROFS
        await replace(device, str(path))
        await write(device, 0, b"x" * 4096)
        assert device.gate.standby_text == "not supported"


@pytest.mark.trio
async def test_a_read_only_device_is_replaced_without_a_write(tmp_path: Path) -> None:
    path, other = image(tmp_path), image(tmp_path, "other.hds")
    before = other.read_bytes()
    async with serving() as served:
        options = DeviceOptions(open=OpenOptions(read_only=True))
        device = await served.add(path, options)
        await replace(device, str(other))
        assert await read(device, 0, 4096) == bytes(4096)
    assert other.read_bytes() == before


@pytest.mark.trio
async def test_the_new_image_takes_over_the_identity(tmp_path: Path) -> None:
    path = image(tmp_path)
    async with serving() as served:
        device = await served.add(path)
        identity = device.identity
        await replace(device, str(image(tmp_path, "other.hds")))
    async with serving() as served:
        again: Device = await served.add(tmp_path / "other.hds")
        assert again.identity == identity


@pytest.mark.trio
async def test_ten_thousand_parked_requests_are_answered_after_a_replace(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    path = image(tmp_path)
    limits = ParkLimits(max_requests=20_000)
    async with serving(faulty) as served:
        device = await served.add(path, DeviceOptions(limits=limits))
        device.gate.enter_standby("test")
        answered: list[StorageError | None] = []
        buffer = memoryview(bytearray(512))
        for number in range(10_000):
            device.gate.write(number * 512 % SIZE, buffer, answered.append)
        before_swap: list[int] = []

        def on_step(record: StepRecord) -> None:
            if record.step is Step.SWAP:
                before_swap.append(len(answered))

        await replace(device, str(path), on_step=on_step)
        await call(device, "flush")
        assert before_swap == [0]
        assert answered == [None] * 10_000


@pytest.mark.trio
async def test_a_raw_disk_is_not_replaced_by_a_delta_as_large_as_it(tmp_path: Path) -> None:
    """As a raw file it would fit; opened, it would be another disk."""
    raw, delta = tmp_path / "disk.raw", image(tmp_path, "other.hds")
    raw.write_bytes(b"r" * SIZE)
    os.truncate(delta, SIZE)
    before = delta.read_bytes()
    async with serving() as served:
        device = await served.add(raw)
        with pytest.raises(PloopError, match="ploop image"):
            await replace(device, str(delta), deadlines=SHORT)
        assert device.gate.state is GateState.ACTIVE
        assert await read(device, 0, 512) == b"r" * 512
    assert delta.read_bytes() == before


@pytest.mark.trio
async def test_a_disk_that_changes_after_it_was_looked_at_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = image(tmp_path)
    other, larger = image(tmp_path, "other.hds"), image(tmp_path, "larger.hds", size=2 * SIZE)
    async with serving() as served:
        device = await served.add(path)
        open_volume = device.open_volume

        async def changed(*arguments: Any) -> OpenedVolume:
            os.replace(larger, other)
            return await open_volume(*arguments)

        monkeypatch.setattr(device, "open_volume", changed)
        with pytest.raises(PloopError, match="disk size"):
            await replace(device, str(other), deadlines=SHORT)
        assert device.gate.state is GateState.STANDBY
        monkeypatch.undo()
        await replace(device, str(path), deadlines=SHORT)
    assert other.read_bytes()[44:48] == bytes(4)
