"""Replace over real images: faults under load, every wrong image, every failing step."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from ploopd.control.recovery import (
    Deadlines,
    ReplaceReport,
    Step,
    StepRecord,
    leave_standby,
    replace,
)
from ploopd.devices import Device, DeviceOptions, OpenedVolume
from ploopd.errors import (
    BusyError,
    CorruptImageError,
    DeniedError,
    ExitCode,
    ImageFormatError,
    LockedError,
    NotFoundError,
    PloopError,
    StorageError,
    UncleanImageError,
    UnsupportedError,
    UsageError,
)
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.gate.limits import ParkLimits
from ploopd.gate.state import GateState
from ploopd.storage.create import create_image
from ploopd.storage.opener import OpenOptions
from ploopd.storage.volume import Volume
from tests.support.images import guid, write_delta, write_descriptor
from tests.support.served import (
    VerifiedLoad,
    call,
    copy_of,
    flush,
    quiet,
    read,
    serving,
    write,
)

MIB = 1 << 20
SIZE = 4 * MIB
CLUSTER = 64 << 10
SHORT = Deadlines(check=1.0, drain=0.2, close=0.5, open=2.0, replay=0.5, probe=0.5)


@pytest.fixture
def faulty() -> Iterator[FaultyOs]:
    """System calls that fail when told; what hangs is let go at the end."""
    layer = FaultyOs()
    yield layer
    layer.clear()
    layer.release()


def image(directory: Path, name: str = "disk.hds", **changes: int) -> Path:
    options = {"size": SIZE, "cluster_size": CLUSTER, "version": 2} | changes
    path = directory / name
    create_image(path, **options)
    return path


def chain(directory: Path) -> Path:
    """A base with data in every cluster and an empty top: every first write copies."""
    clusters = {index: bytes([index % 251 + 1]) * CLUSTER for index in range(SIZE // CLUSTER)}
    write_delta(directory / "base.hds", SIZE, clusters, cluster_size=CLUSTER)
    write_delta(directory / "top.hds", SIZE, {}, cluster_size=CLUSTER)
    rows = [(guid(1), "Compressed", "base.hds"), (guid(2), "Compressed", "top.hds")]
    return write_descriptor(directory, SIZE, rows, cluster_size=CLUSTER, top_guid=guid(2))


FAULTS = {
    "data write": Fault(op="write", path="disk.hds", start=CLUSTER, count=None, nth=40),
    "data read": Fault(op="read", path="disk.hds", start=CLUSTER, count=None, nth=40),
    "BAT write": Fault(op="write", path="disk.hds", end=CLUSTER, count=None, nth=20),
    "sync": Fault(op="sync", path="disk.hds", count=None, nth=5),
    "allocation": Fault(op="fallocate", path="disk.hds", count=None),
}


@pytest.mark.trio
@pytest.mark.parametrize("number", [errno.EBUSY, errno.ENOTCONN, errno.EIO])
@pytest.mark.parametrize("place", list(FAULTS))
async def test_a_fault_under_load_is_survived_by_a_replace_with_a_copy(
    place: str, number: int, tmp_path: Path, faulty: FaultyOs
) -> None:
    pattern = FAULTS[place]
    path = image(tmp_path)
    async with serving(faulty) as served:
        device = await served.add(path)
        load = VerifiedLoad(device)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            faulty.add(
                Fault(
                    op=pattern.op,
                    path=pattern.path,
                    nth=pattern.nth if place != "allocation" else 1,
                    count=None,
                    start=pattern.start,
                    end=pattern.end,
                    error=number,
                )
            )
            with trio.fail_after(20):
                await quiet(device)
            before = load.operations
            copy = await trio.to_thread.run_sync(copy_of, path)
            report = await replace(device, str(copy), force=True)
            assert [each.step for each in report.steps] == list(Step)
            with trio.fail_after(20):
                while load.operations < before + 200:  # noqa: ASYNC110
                    await trio.sleep(0.005)
            load.stop = True
        await load.verify()
        assert device.image == str(copy)
        assert device.gate.standby_text == "off"
        kinds = [event.kind.value for event in served.events]
        assert kinds.count("standby-entered") == kinds.count("recovered") == 1


@pytest.mark.trio
@pytest.mark.parametrize("number", [errno.EBUSY, errno.ENOTCONN, errno.EIO])
@pytest.mark.parametrize("file", ["base.hds", "top.hds"])
async def test_a_fault_in_a_copy_on_write_is_survived_by_a_new_top(
    file: str, number: int, tmp_path: Path, faulty: FaultyOs
) -> None:
    descriptor = chain(tmp_path)
    async with serving(faulty) as served:
        device = await served.add(descriptor)
        assert device.name == tmp_path.name
        op = "read" if file == "base.hds" else "write"
        fault = faulty.add(Fault(op=op, path=file, start=CLUSTER, count=None, error=number))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, device, 5 * CLUSTER + 4096, b"n" * 4096)
            await quiet(device)
            assert fault.hits
            faulty.clear()
            copy = await trio.to_thread.run_sync(copy_of, tmp_path / "top.hds")
            await replace(device, str(copy), force=True)
        assert (device.image, device.substitutes) == (str(descriptor), {})
        assert [each.path for each in device.volume.layers][0] == str(copy)
        found = await read(device, 5 * CLUSTER, CLUSTER)
        assert found == b"\x06" * 4096 + b"n" * 4096 + b"\x06" * (CLUSTER - 8192)
        again = copy.with_name("third.hds")
        shutil.copyfile(copy, again)
        await replace(device, str(again), force=True)
        assert await read(device, 5 * CLUSTER, CLUSTER) == found
        with pytest.raises(UsageError, match="delta of level 1"):
            await replace(device, str(tmp_path / "base.hds"), force=True)


@pytest.mark.trio
async def test_the_same_path_again_works_without_force_once_its_storage_does(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    path = image(tmp_path)
    async with serving(faulty) as served:
        device = await served.add(path)
        identity = device.identity
        await write(device, 0, b"a" * 4096)
        await flush(device)
        faulty.add(Fault(op="*", count=None, error=errno.EIO))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, device, 4096, b"b" * 4096)
            await quiet(device)
            with pytest.raises(PloopError):
                await replace(device, str(path), deadlines=SHORT)
            assert device.gate.standby_text == "on"
            assert device.gate.parked_count == 1
            assert not device.volume_open
            with pytest.raises(BusyError, match="no open image"):
                leave_standby(device, force=True)
            faulty.clear()
            await replace(device, str(path))
        assert await read(device, 0, 8192) == b"a" * 4096 + b"b" * 4096
        assert device.identity == identity == device.volume.identity
        assert device.unit is not None


@pytest.mark.trio
async def test_a_device_that_is_not_in_standby_may_be_replaced(tmp_path: Path) -> None:
    path = image(tmp_path)
    async with serving() as served:
        device = await served.add(path)
        load = VerifiedLoad(device)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            for _ in range(5):
                await trio.sleep(0.02)
                await replace(device, str(path))
            load.stop = True
        await load.verify()
        assert "standby-entered" not in [event.kind.value for event in served.events]


# -- hung storage --------------------------------------------------------------------------


@pytest.mark.trio
async def test_hung_writes_are_disowned_and_land_only_in_the_old_file(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    path = image(tmp_path)
    async with serving(faulty) as served:
        device = await served.add(path)
        await write(device, 0, b"1" * 4096)
        await flush(device)
        faulty.add(Fault(op="write", path="disk.hds", start=CLUSTER, count=None, hang=True))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, device, 0, b"2" * 4096)
            await trio.sleep(0.05)
            copy = await trio.to_thread.run_sync(copy_of, path)
            started = time.monotonic()
            with pytest.raises(BusyError, match="hang in the kernel"):
                await replace(device, str(path), deadlines=SHORT)
            assert device.gate.state is GateState.STANDBY
            report = await replace(device, str(copy), force=True, deadlines=SHORT)
            assert time.monotonic() - started < 3
        assert report.image == str(copy)
        assert await read(device, 0, 4096) == b"2" * 4096
        await write(device, 0, b"3" * 4096)
        faulty.release()
        with trio.fail_after(5):
            while device.hung_operations():  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert await read(device, 0, 4096) == b"3" * 4096
        data = await trio.to_thread.run_sync(path.read_bytes)
        assert b"2" * 4096 in data  # late, and harmless
        await flush(device)
        assert b"2" * 4096 not in await trio.to_thread.run_sync(copy.read_bytes)


@pytest.mark.trio
async def test_an_old_file_that_hangs_in_close_does_not_hold_the_replace(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    path = image(tmp_path)
    async with serving(faulty) as served:
        device = await served.add(path)
        copy = await trio.to_thread.run_sync(copy_of, path)
        faulty.add(Fault(op="sync", path="disk.hds", count=None, hang=True))
        with trio.fail_after(3):
            report = await replace(device, str(copy), force=True, deadlines=SHORT)
        closing = next(each for each in report.steps if each.step is Step.CLOSE)
        assert "abandoned" in closing.detail
        faulty.release()
        await write(device, 0, b"x" * 4096)


# -- wrong images --------------------------------------------------------------------------

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


# -- failing steps -------------------------------------------------------------------------


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


# -- around it -----------------------------------------------------------------------------


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
