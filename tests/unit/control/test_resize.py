"""A device grows while it is served, or goes on as it was."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import trio

from image_format import PvdHeader, parse_descriptor
from ploopd.control.recovery import reload, replace
from ploopd.control.resize import resize
from ploopd.control.steps import Deadlines, Step, StepRecord
from ploopd.devices import Device, DeviceOptions
from ploopd.errors import BusyError, PloopError, ReadOnlyError, StorageError, UsageError
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.gate.events import EventKind
from ploopd.gate.state import GateState
from ploopd.scsi.target import Target
from ploopd.scsi.unit_attention import UnitAttention
from ploopd.storage.check import check_all
from ploopd.storage.grow import PlannedGrowth
from ploopd.storage.opener import OpenOptions
from tests.support.served import Served, VerifiedLoad, copy_of, read, serving, write
from tests.unit.control.recovery_rig import CLUSTER, SHORT, SIZE, chain, image

LARGE = 3 * (CLUSTER // 4) * CLUSTER
"""Its BAT takes four clusters; that of SIZE has room in one."""


def state(device: Device) -> GateState:
    return device.gate.state


class Watcher:
    """An initiator of the unit, that asks what attentions are pending."""

    def __init__(self, device: Device) -> None:
        target = Target("iqn.2026-11.org.example:watched")
        target.add_unit(0, device.unit)
        itl = target.open_nexus("i", "t").itl(0)
        assert itl is not None
        self._itl = itl
        assert self.attentions == [UnitAttention.POWER_ON]

    @property
    def attentions(self) -> list[UnitAttention]:
        """Those that came since the last time."""
        return list(iter(self._itl.take_attention, None))


async def fill(device: Device) -> VerifiedLoad:
    load = VerifiedLoad(device)
    for offset in range(0, SIZE, CLUSTER):
        load.content[offset : offset + CLUSTER] = await read(device, offset, CLUSTER)
    return load


@pytest.mark.trio
@pytest.mark.parametrize("make", [image, chain])
async def test_a_device_grows_under_load(tmp_path: Path, make: type) -> None:
    path = make(tmp_path)
    async with serving() as served:
        device = await served.add(path)
        watcher = Watcher(device)
        steps: list[StepRecord] = []
        load = await fill(device)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            await trio.sleep(0.05)
            report = await resize(device, LARGE, on_step=steps.append)
            before = load.operations
            with trio.fail_after(20):
                while load.operations < before + 100:  # noqa: ASYNC110
                    await trio.sleep(0.005)
            load.stop = True
        assert (report.size, report.previous, device.size) == (LARGE, SIZE, LARGE)
        assert [each.step for each in steps] == list(Step)
        assert watcher.attentions == [UnitAttention.CAPACITY_CHANGED]
        assert device.unit.blocks == LARGE // 512
        assert await read(device, LARGE - 4096, 4096) == bytes(4096)
        await write(device, LARGE - 4096, b"n" * 4096)
        load.content.extend(bytes(4 * SIZE - SIZE))
        for offset in range(0, SIZE, CLUSTER):
            assert await read(device, offset, CLUSTER) == load.content[offset : offset + CLUSTER]
        (event,) = [each for each in served.events if each.kind is EventKind.RESIZED]
        assert event.details == {"size": LARGE, "previous": SIZE}
    for one in check_all(path):
        assert (one.corruptions, one.leaks) == (0, 0), one.details


@pytest.mark.trio
async def test_whoever_waits_for_another_size_is_told(tmp_path: Path) -> None:
    async with serving() as served:
        device = await served.add(image(tmp_path))
        resized = device.resized
        await resize(device, 2 * SIZE)
        assert resized.is_set()
        assert not device.resized.is_set()


@pytest.mark.trio
async def test_a_raw_file_and_a_rounded_size(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(b"\x5a" * SIZE)
    async with serving() as served:
        raw = await served.add(tmp_path / "disk.raw")
        assert (await resize(raw, SIZE + 1)).size == SIZE + 512
        assert await read(raw, SIZE - 512, 1024) == b"\x5a" * 512 + bytes(512)
        delta = await served.add(image(tmp_path))
        with pytest.raises(UsageError, match=str(SIZE + CLUSTER)):
            await resize(delta, SIZE + 1, exact=True)
        assert (await resize(delta, SIZE + 1)).size == SIZE + CLUSTER


@pytest.mark.trio
async def test_the_same_size_does_not_stop_anything(tmp_path: Path) -> None:
    async with serving() as served:
        device = await served.add(image(tmp_path))
        volume, watcher = device.volume, Watcher(device)
        assert (await resize(device, SIZE)).size == SIZE
        assert device.volume is volume
        assert watcher.attentions == []
        assert [each.details.get("step") for each in served.events] == ["check"]


@pytest.mark.trio
async def test_the_journal_goes_on_with_the_larger_disk(tmp_path: Path) -> None:
    from ploopd.storage.journaling import JournalMode

    async with serving() as served:
        device = await served.add(image(tmp_path), DeviceOptions(journal=JournalMode.ON))
        await write(device, 4096, b"j" * 4096)
        await resize(device, 2 * SIZE)
        await write(device, 2 * SIZE - 4096, b"k" * 4096)
        assert await read(device, 4096, 4096) == b"j" * 4096
        status = device.journaling.status
        assert status is not None
        assert status.requests == 1


# -- refusals ---------------------------------------------------------------------------------


def as_it_was(served: Served, device: Device, path: Path) -> None:
    assert device.size == SIZE
    assert state(device) is GateState.ACTIVE
    assert not device.replacing
    header = PvdHeader.parse(path.read_bytes()[:64], file=str(path))
    assert header.size == SIZE


@pytest.mark.trio
@pytest.mark.parametrize("size", [SIZE - CLUSTER, 0, 1 << 70])
async def test_a_size_that_cannot_be_is_refused_first(tmp_path: Path, size: int) -> None:
    path = image(tmp_path)
    async with serving() as served:
        device = await served.add(path)
        volume = device.volume
        with pytest.raises(UsageError):
            await resize(device, size)
        as_it_was(served, device, path)
        assert device.volume is volume
        assert served.events == []


@pytest.mark.trio
async def test_a_device_in_standby_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    path = image(tmp_path)
    async with serving() as served:
        device = await served.add(path)
        device.gate.enter_standby("maintenance")
        with pytest.raises(BusyError, match=r"maintenance.*wait --state off"):
            await resize(device, LARGE)
        device.gate.leave_standby()
        as_it_was(served, device, path)
        await resize(device, LARGE)


@pytest.mark.trio
async def test_read_only_latched_and_busy_devices_are_refused(tmp_path: Path) -> None:
    path = image(tmp_path)
    async with serving() as served:
        device = await served.add(path, DeviceOptions(open=OpenOptions(read_only=True)))
        with pytest.raises(ReadOnlyError):
            await resize(device, LARGE)
        other = await served.add(image(tmp_path, "other.hds"))
        other.gate.judge(StorageError(errno.ESTALE, "write", path="other.hds"))
        with pytest.raises(BusyError, match="storage has failed"):
            await resize(other, LARGE)
        third = await served.add(image(tmp_path, "third.hds"))
        third.replacing = True
        with pytest.raises(BusyError, match="replaced already"):
            await resize(third, LARGE)


@pytest.mark.trio
async def test_a_top_that_the_descriptor_does_not_name_is_refused(tmp_path: Path) -> None:
    descriptor = chain(tmp_path)
    copy = Path(shutil.copy(tmp_path / "top.hds", tmp_path / "copy.hds"))
    async with serving() as served:
        device = await served.add(descriptor)
        await replace(device, str(copy), keep_descriptor=True, force=True)
        with pytest.raises(UsageError, match="keep-descriptor"):
            await resize(device, LARGE)
        assert state(device) is GateState.ACTIVE
    assert parse_descriptor(descriptor.read_bytes()).disk_size_sectors == SIZE // 512


@pytest.mark.trio
async def test_requests_that_do_not_end_keep_it_from_growing_and_are_not_disowned(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    path = image(tmp_path)
    async with serving(faulty) as served:
        device = await served.add(path)
        await write(device, 0, b"a" * 4096)
        faulty.add(Fault(op="fdatasync", hang=True))
        faulty.add(Fault(op="fsync", hang=True))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_flush, device)
            await trio.sleep(0.05)
            with pytest.raises(BusyError, match="have not ended"):
                await resize(device, LARGE, deadlines=SHORT)
            as_it_was(served, device, path)
            assert device.gate.executing_count == 1
            await write(device, 8192, b"b" * 4096)
            faulty.release()
        assert not [each for each in served.events if each.kind is EventKind.DISOWNED]
        await resize(device, LARGE)
        assert await read(device, 8192, 4096) == b"b" * 4096


async def _flush(device: Device) -> None:
    from tests.support.served import flush

    await flush(device)


# -- failures ---------------------------------------------------------------------------------


@pytest.mark.trio
async def test_without_room_it_goes_on_with_its_old_size(tmp_path: Path, faulty: FaultyOs) -> None:
    path = image(tmp_path)
    async with serving(faulty) as served:
        device = await served.add(path)
        watcher = Watcher(device)
        await write(device, 0, b"a" * 4096)
        faulty.add(Fault(op="fallocate", error=errno.ENOSPC))
        with pytest.raises(StorageError) as caught:
            await resize(device, LARGE)
        assert caught.value.errno == errno.ENOSPC
        as_it_was(served, device, path)
        assert watcher.attentions == []
        assert await read(device, 0, 4096) == b"a" * 4096
        await write(device, CLUSTER, b"b" * 4096)
        assert (await resize(device, LARGE)).size == LARGE
        assert await read(device, CLUSTER, 4096) == b"b" * 4096


@pytest.mark.trio
async def test_a_file_system_without_room_is_found_out_before_anything_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = image(tmp_path)
    async with serving() as served:
        device = await served.add(path)
        monkeypatch.setattr(PlannedGrowth, "missing_room", lambda *_: 4711)
        with pytest.raises(StorageError, match="4711"):
            await resize(device, LARGE)
        as_it_was(served, device, path)
        assert served.events == []


@pytest.fixture(params=["before the header", "after the header"])
def broken(request: pytest.FixtureRequest) -> Fault:
    """The storage dies while the image grows, and is back when `faulty` is cleared."""
    failing = Fault(op="write", path="*.hds", count=None, error=errno.EIO, start=64)
    if request.param == "after the header":
        failing.start, failing.end, failing.nth = 0, 64, 3  # marked, grown, to be closed
    return failing


@pytest.mark.trio
async def test_after_a_storage_failure_the_image_is_taken_as_it_is(
    tmp_path: Path, faulty: FaultyOs, broken: Fault
) -> None:
    descriptor = chain(tmp_path)
    async with serving(faulty) as served:
        device = await served.add(descriptor)
        watcher = Watcher(device)
        await write(device, 0, b"a" * 4096)

        def fail(record: StepRecord) -> None:
            if record.step is Step.CLOSE:
                faulty.add(broken)
            if record.step is Step.GROW:
                assert "failed" in record.detail
                faulty.add(Fault(op="open", path="*.hds", count=None, error=errno.EIO))

        with pytest.raises(PloopError):
            await resize(device, LARGE, on_step=fail)
        assert state(device) is GateState.STANDBY
        assert device.size == SIZE
        faulty.clear()
        await reload(device)
        assert state(device) is GateState.ACTIVE
        grown = device.size == LARGE
        assert grown == (broken.start == 0)
        assert watcher.attentions == [UnitAttention.CAPACITY_CHANGED] * grown
        assert await read(device, 0, 4096) == b"a" * 4096
        await resize(device, LARGE)
        assert device.size == LARGE
    for one in check_all(descriptor):
        assert one.corruptions == 0, one.details


@pytest.mark.trio
async def test_a_copy_of_the_grown_image_may_take_its_place(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    path = image(tmp_path)
    async with serving(faulty) as served:
        device = await served.add(path)

        def fail(record: StepRecord) -> None:
            if record.step is Step.GROW:
                faulty.add(Fault(op="open", path="*.hds", count=None, error=errno.EIO))

        with pytest.raises(PloopError):
            await resize(device, LARGE, on_step=fail)
        faulty.clear()
        assert (state(device), device.size) == (GateState.STANDBY, SIZE)
        with pytest.raises(UsageError, match="disk size"):
            await replace(device, str(image(tmp_path, "other.hds", size=2 * SIZE)))
        await replace(device, str(copy_of(path)), force=True)
        assert (state(device), device.size) == (GateState.ACTIVE, LARGE)


@pytest.mark.trio
async def test_one_that_hangs_leaves_the_device_in_standby_and_the_files_locked(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    path = image(tmp_path)
    limits = Deadlines(grow=0.2, open=2.0, check=2.0)
    async with serving(faulty) as served:
        device = await served.add(path)

        def hang(record: StepRecord) -> None:
            if record.step is Step.CLOSE:
                faulty.add(Fault(op="write", path="*.hds", nth=2, hang=True))

        with pytest.raises(PloopError, match="growing"):
            await resize(device, LARGE, deadlines=limits, on_step=hang)
        assert state(device) is GateState.STANDBY
        with pytest.raises(PloopError):
            await reload(device, deadlines=limits)
        faulty.clear()
        faulty.release()
        with trio.fail_after(20):
            while state(device) is not GateState.ACTIVE:
                try:
                    await reload(device)
                except PloopError:
                    await trio.sleep(0.02)
        assert device.size == LARGE


@pytest.mark.trio
async def test_a_replace_does_not_lose_the_descriptor_of_a_growth_that_was_cut(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    """The image has grown and its descriptor waits for its name, when another file takes over."""
    descriptor = chain(tmp_path)
    waiting = tmp_path / "DiskDescriptor.xml.resize"
    async with serving(faulty) as served:
        device = await served.add(descriptor)
        old = descriptor.read_bytes()

        def cut(record: StepRecord) -> None:
            if record.step is Step.GROW:
                descriptor.rename(waiting)
                descriptor.write_bytes(old)
                faulty.add(Fault(op="open", path="*.hds", count=None, error=errno.EIO))

        with pytest.raises(PloopError):
            await resize(device, LARGE, on_step=cut)
        faulty.clear()
        assert state(device) is GateState.STANDBY
        copy = str(copy_of(tmp_path / "top.hds"))
        with pytest.raises(PloopError, match="try again"):
            await replace(device, copy, force=True)
        await replace(device, copy, force=True)
        assert (state(device), device.size) == (GateState.ACTIVE, LARGE)
        assert not waiting.exists()
    said = parse_descriptor(descriptor.read_bytes())
    assert said.disk_size_sectors == LARGE // 512
    assert "copy-of-top.hds" in [image.file for image in said.storages[0].images]
