"""A replace ends an episode: faults in every place under load, storages that hang."""

from __future__ import annotations

import errno
import shutil
import time
from pathlib import Path

import pytest
import trio

from ploopd.control.recovery import (
    Step,
    leave_standby,
    replace,
)
from ploopd.control.steps import RECOVERY_STEPS
from ploopd.errors import (
    BusyError,
    PloopError,
    UsageError,
)
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.gate.state import GateState
from tests.support.served import (
    VerifiedLoad,
    copy_of,
    flush,
    quiet,
    read,
    serving,
    write,
)
from tests.unit.control.recovery_rig import CLUSTER, SHORT, chain, image

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
            assert [each.step for each in report.steps] == list(RECOVERY_STEPS)
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
        assert device.volume.layers[0].path == str(copy)
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
