"""A reload opens everything again from where the device was opened."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import trio

from ploopd.control.recovery import Step, clear_latch, reload, replace
from ploopd.control.steps import RECOVERY_STEPS
from ploopd.devices import DeviceOptions
from ploopd.errors import (
    BusyError,
    CorruptImageError,
    DescriptorError,
    ImageFormatError,
    LockedError,
    NotFoundError,
    PloopError,
    StorageError,
    UsageError,
)
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.gate.state import GateState
from tests.support.images import guid, write_delta, write_descriptor
from tests.support.served import VerifiedLoad, copy_of, quiet, read, serving, write
from tests.unit.control.recovery_rig import CLUSTER, SHORT, SIZE, chain, image


def with_new_top(directory: Path, name: str = "new.hds", size: int = SIZE) -> Path:
    """What libploop's snapshot does to the files: a new empty top over the old one."""
    write_delta(directory / name, size, {}, cluster_size=CLUSTER)
    rows = [
        (guid(1), "Compressed", "base.hds"),
        (guid(2), "Compressed", "top.hds"),
        (guid(3), "Compressed", name),
    ]
    return write_descriptor(directory, size, rows, cluster_size=CLUSTER, top_guid=guid(3))


@pytest.mark.trio
async def test_standby_is_cleared_and_parked_requests_are_executed(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    path = image(tmp_path)
    async with serving(faulty) as served:
        device = await served.add(path)
        identity = device.identity
        faulty.add(Fault(op="*", count=None, error=errno.EIO))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, device, 4096, b"b" * 4096)
            await quiet(device)
            with pytest.raises(PloopError):
                await reload(device, deadlines=SHORT)
            assert device.gate.standby_text == "on"
            faulty.clear()
            report = await reload(device)
        assert [each.step for each in report.steps] == list(RECOVERY_STEPS)
        assert (report.image, report.level) == (str(path), None)
        assert await read(device, 4096, 4096) == b"b" * 4096
        assert device.identity == identity == device.volume.identity


@pytest.mark.trio
async def test_a_reload_under_load_loses_nothing(tmp_path: Path) -> None:
    descriptor = chain(tmp_path)
    async with serving() as served:
        device = await served.add(descriptor)
        load = VerifiedLoad(device)
        for offset in range(0, SIZE, CLUSTER):
            load.content[offset : offset + CLUSTER] = await read(device, offset, CLUSTER)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            for _ in range(5):
                await trio.sleep(0.02)
                await reload(device)
            load.stop = True
        await load.verify()


@pytest.mark.trio
async def test_a_changed_descriptor_is_taken_up(tmp_path: Path) -> None:
    descriptor = chain(tmp_path)
    async with serving() as served:
        device = await served.add(descriptor)
        await write(device, 0, b"below")
        with_new_top(tmp_path)
        report = await reload(device, dry_run=True)
        assert len(device.volume.layers) == 2
        assert report.dry_run
        await reload(device)
        assert [each.guid for each in device.volume.layers] == [guid(3), guid(2), guid(1)]
        await write(device, CLUSTER, b"above")
        assert await read(device, 0, 5) == b"below"
    assert (tmp_path / "new.hds").stat().st_size > CLUSTER
    assert b"above" not in (tmp_path / "top.hds").read_bytes()


@pytest.mark.trio
async def test_a_substitute_stays_as_long_as_the_chain_has_its_guid(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    descriptor = chain(tmp_path / "disk")
    outside = tmp_path / "copy.hds"
    shutil.copyfile(tmp_path / "disk/top.hds", outside)
    async with serving() as served:
        device = await served.add(descriptor)
        await replace(device, str(outside), keep_descriptor=True)
        await write(device, 0, b"kept")
        await reload(device)
        assert device.volume.layers[0].path == str(outside)
        assert await read(device, 0, 4) == b"kept"
        rows = [(guid(1), "Compressed", "base.hds")]
        (tmp_path / "disk/top.hds").rename(tmp_path / "disk/unused.hds")
        write_descriptor(tmp_path / "disk", SIZE, rows, cluster_size=CLUSTER, top_guid=guid(1))
        await reload(device)
        assert device.substitutes == {}


@pytest.mark.trio
@pytest.mark.parametrize("began", [GateState.ACTIVE, GateState.STANDBY])
async def test_what_cannot_be_opened_is_refused_before_anything_is_touched(
    began: GateState, tmp_path: Path
) -> None:
    descriptor = chain(tmp_path)
    good = descriptor.read_bytes()
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / "new.hds")
    async with serving() as served:
        device = await served.add(descriptor)
        other = await served.add(image(tmp_path, "other.hds"))
        if began is GateState.STANDBY:
            device.gate.enter_standby("test")

        async def refused(error: type[PloopError], words: str) -> None:
            with pytest.raises(error, match=words):
                await reload(device, deadlines=SHORT)
            assert device.gate.state is began
            assert device.volume_open
            descriptor.write_bytes(good)

        descriptor.write_bytes(good[:-30])
        await refused(DescriptorError, "well-formed")
        with_new_top(tmp_path, "larger.hds", 2 * SIZE)
        await refused(UsageError, "disk_size")
        with_new_top(tmp_path, "garbage.hds")
        (tmp_path / "garbage.hds").write_bytes(b"nothing at all" * 10000)
        await refused(ImageFormatError, "garbage.hds")
        with_new_top(tmp_path)
        (tmp_path / "new.hds").unlink()
        await refused(DescriptorError, "does not exist")
        descriptor.write_bytes(good.replace(b"top.hds", b"fifo/new.hds"))
        await refused(DescriptorError, "regular file")
        descriptor.write_bytes(good.replace(b"top.hds", b"other.hds"))
        await refused(LockedError, "in use")
        with_new_top(tmp_path, "broken.hds")
        data = bytearray((tmp_path / "broken.hds").read_bytes())
        data[64:68] = (77).to_bytes(4, "little")
        (tmp_path / "broken.hds").write_bytes(data)
        await refused(CorruptImageError, "BAT")
        descriptor.unlink()
        await refused(NotFoundError, "no such file")
        assert await read(other, 0, 4) == bytes(4)
        await reload(device)
        assert device.gate.state is GateState.ACTIVE


@pytest.mark.trio
async def test_a_reload_and_a_replace_at_once(tmp_path: Path) -> None:
    path = image(tmp_path)
    async with serving() as served:
        device = await served.add(path)
        refused: list[BusyError] = []

        async def reloading() -> None:
            await reload(device)

        async def replacing() -> None:
            try:
                await replace(device, str(path))
            except BusyError as error:
                refused.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reloading)
            await trio.lowlevel.checkpoint()
            nursery.start_soon(replacing)
        assert ["or reloaded" in str(each) for each in refused] == [True]


@pytest.mark.trio
async def test_a_replace_while_another_one_drains_is_refused(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    path = image(tmp_path)
    copy = copy_of(path)
    async with serving(faulty) as served:
        device = await served.add(path)
        await write(device, 0, b"1" * 4096)
        faulty.add(Fault(op="write", path="disk.hds", start=CLUSTER, count=None, hang=True))
        draining = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, device, 0, b"2" * 4096)
            await trio.sleep(0.05)

            async def first() -> None:
                await replace(
                    device,
                    str(copy),
                    force=True,
                    deadlines=SHORT,
                    on_step=lambda record: draining.set() if record.step is Step.STOP else None,
                )

            nursery.start_soon(first)
            await draining.wait()
            with pytest.raises(BusyError, match="replaced already"):
                await replace(device, str(copy), force=True)
            with pytest.raises(BusyError, match="replaced already"):
                await reload(device)
        assert device.volume.layers[0].path == str(copy)
        assert await read(device, 0, 4096) == b"2" * 4096
        faulty.release()


@pytest.mark.trio
async def test_the_latch_is_cleared_by_an_operator(tmp_path: Path, faulty: FaultyOs) -> None:
    path = image(tmp_path)
    async with serving(faulty) as served:
        device = await served.add(path, DeviceOptions(standby=False))
        with pytest.raises(BusyError, match="not latched"):
            clear_latch(device)
        faulty.add(Fault(op="write", error=errno.EIO))
        with pytest.raises(StorageError):
            await write(device, 0, b"x" * 4096, inline=False)
        with pytest.raises(StorageError, match="read-only after a storage failure"):
            await write(device, 0, b"x" * 4096)
        assert "Input/output error" in clear_latch(device)
        await write(device, 0, b"y" * 4096)
        assert await read(device, 0, 4096) == b"y" * 4096
        assert served.events[-1].kind.value == "latch-cleared"
