"""Acknowledged writes outlive a storage that loses them; real images, with and without journal."""

from __future__ import annotations

import errno
import random
import shutil
from pathlib import Path

import pytest
import trio
import trio.testing

from ploopd.control.recovery import leave_standby, replace
from ploopd.control.steps import Step, StepRecord
from ploopd.devices import DeviceOptions
from ploopd.errors import StorageError
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.gate.events import EventKind
from ploopd.storage.journaling import JournalMode
from tests.support.served import VerifiedLoad, call, flush, quiet, read, serving, write
from tests.unit.control.journal_rig import (
    CLUSTER,
    KEPT,
    MIB,
    NOT_KEPT,
    SIZE,
    chain,
    change_everything,
    directory,
    faulty,
    image,
    shm,
    whole,
)

__all__ = ["directory", "faulty", "shm"]


@pytest.mark.trio
@pytest.mark.parametrize("kind", ["single", "chain"])
@pytest.mark.parametrize("back", ["the same path", "a copy from before"])
@pytest.mark.parametrize("options", [KEPT, NOT_KEPT], ids=["kept", "not kept"])
async def test_a_storage_that_acknowledges_loses_and_fails(
    options: DeviceOptions, back: str, kind: str, directory: Path, faulty: FaultyOs
) -> None:
    path = directory / "disk.hds"
    served_image = image(directory) if kind == "single" else chain(directory)
    async with serving(faulty) as served:
        device = await served.add(served_image, options)
        content = await change_everything(device)
        lost = directory / "lost.hds"
        lost.write_bytes(faulty.log(path).durable())
        number = errno.ENOTCONN if kind == "single" else errno.EIO
        faulty.add(Fault(op="*", path="disk.hds", count=None, error=number))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, device, 30 * CLUSTER, 4096)
            nursery.start_soon(write, device, 0, b"8" * 512)
            await quiet(device)

            def storage_comes_back(record: StepRecord) -> None:
                if record.step is Step.CLOSE:
                    faulty.clear()
                    shutil.copyfile(lost, path)

            new = path if back == "the same path" else lost
            await replace(device, str(new), force=new == lost, on_step=storage_comes_back)
        content[:512] = b"8" * 512
        if options is KEPT:
            assert await whole(device) == content
        else:
            assert await whole(device) != content, "this storage loses nothing: a useless test"


@pytest.mark.trio
@pytest.mark.parametrize("options", [KEPT, NOT_KEPT], ids=["kept", "not kept"])
async def test_any_part_may_be_lost_under_load_episode_after_episode(
    options: DeviceOptions, directory: Path, faulty: FaultyOs
) -> None:
    path = image(directory)
    chance = random.Random(3)
    async with serving(faulty) as served:
        device = await served.add(path, options)
        load = VerifiedLoad(device)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(load.run)
                for episode in range(6):
                    before = load.operations
                    while load.operations < before + 150:  # noqa: ASYNC110
                        await trio.sleep(0.002)
                    op = ("write", "sync", "*")[episode % 3]
                    faulty.add(Fault(op=op, path=path.name, count=None, error=errno.EIO))
                    await quiet(device)
                    left = faulty.log(path).state(keep=lambda _: chance.random() < 0.5)
                    path = directory / f"disk{episode}.hds"
                    path.write_bytes(left)
                    faulty.clear()
                    await replace(device, str(path), force=True)
                load.stop = True
            await load.verify()
        except* AssertionError:
            assert options is NOT_KEPT
        else:
            assert options is KEPT, "this storage loses nothing: a useless test"


@pytest.mark.trio
@pytest.mark.parametrize("op", ["write", "sync"])
async def test_a_replay_that_fails_loses_nothing(
    op: str, directory: Path, faulty: FaultyOs
) -> None:
    path = image(directory)
    async with serving(faulty) as served:
        device = await served.add(path, KEPT)
        content = await change_everything(device)
        left = faulty.log(path).durable()
        device.gate.enter_standby("test")
        for attempt, name in enumerate(["one.hds", "two.hds", "three.hds"]):
            (directory / name).write_bytes(left)
            if attempt == 2:
                await replace(device, str(directory / name), force=True)
                break

            def fail(record: StepRecord, name: str = name) -> None:
                if record.step is Step.OPEN:
                    faulty.add(Fault(op=op, path=name, count=None, error=errno.EIO))

            with pytest.raises(StorageError):
                await replace(device, str(directory / name), force=True, on_step=fail)
        assert await whole(device) == content


@pytest.mark.trio
async def test_a_probe_that_fails_after_the_replay_loses_nothing(
    directory: Path, faulty: FaultyOs
) -> None:
    path, first, second = image(directory), directory / "one.hds", directory / "two.hds"
    async with serving(faulty) as served:
        device = await served.add(path, KEPT)
        content = await change_everything(device)
        for new in (first, second):
            new.write_bytes(faulty.log(path).durable())

        def fail(record: StepRecord) -> None:
            if record.step is Step.REPLAY:
                assert record.detail.endswith("bytes")
                faulty.add(Fault(op="sync", path="one.hds", count=None, error=errno.EIO))

        with pytest.raises(StorageError):
            await replace(device, str(first), force=True, on_step=fail)
        await replace(device, str(second), force=True)
        assert await whole(device) == content
        status = device.journaling.status
        assert status is not None
        assert status.requests == 0


@pytest.mark.trio
async def test_a_flush_after_a_failed_sync_never_succeeds_before_a_replace(
    directory: Path, faulty: FaultyOs
) -> None:
    """The second sync would succeed, and the first one's pages were never written."""
    path = image(directory)
    async with serving(faulty) as served:
        device = await served.add(path, KEPT)
        content = await change_everything(device)
        left = faulty.log(path).durable()
        faulty.add(Fault(op="sync", path="disk.hds", count=1, error=errno.EIO))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flush, device)
            await quiet(device)
            leave_standby(device, force=True)
            await quiet(device)  # the flush was tried again, and failed again
            assert device.gate.parked_count == 1
            (directory / "new.hds").write_bytes(left)
            await replace(device, str(directory / "new.hds"), force=True)
        assert await whole(device) == content


@pytest.mark.trio
@pytest.mark.parametrize("start", [64, CLUSTER], ids=["entry", "data"])
async def test_a_cluster_that_a_failed_replay_may_have_given_away_is_not_used(
    start: int, directory: Path, faulty: FaultyOs
) -> None:
    """Its entry, or its data, was written, and the answer was an error: on some storages it lands
    later."""
    path = image(directory)
    async with serving(faulty) as served:
        device = await served.add(path, KEPT)
        left = path.read_bytes()
        await write(device, 0, b"a" * 4096)
        faulty.add(Fault(op="*", path="disk.hds", count=None, error=errno.ENOTCONN))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flush, device)
            await quiet(device)
            faulty.clear()
            path.write_bytes(left)
            faulty.add(
                Fault(
                    op="write",
                    path="disk.hds",
                    start=start,
                    end=start + 4,
                    count=None,
                    error=errno.EIO,
                )
            )
            with pytest.raises(StorageError, match="EIO"):
                await replace(device, str(path))
            faulty.clear()
            with pytest.raises(BaseException, match="interrupted"):  # a second one that fails
                await replace(device, str(path), on_step=_interrupt)
            await replace(device, str(path))
        (extent,) = device.volume.extents(0, CLUSTER)
        assert extent.host_offset is not None
        assert extent.host_offset // CLUSTER > 1
        assert await read(device, 0, 4096) == b"a" * 4096


def _interrupt(record: StepRecord) -> None:
    if record.step is Step.OPEN:
        raise StorageError(errno.EIO, "test", message="interrupted")


# -- the bound -----------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_steady_writer_without_flushes_stays_within_the_bound(
    directory: Path, faulty: FaultyOs
) -> None:
    """Ten times the bound: forced flushes keep up, and what a failure then loses is replayed."""
    path = image(directory)
    limit = MIB
    async with serving(faulty) as served:
        device = await served.add(path, DeviceOptions(journal=JournalMode.ON, journal_size=limit))
        before = sum(op == "fdatasync" for op, _ in faulty.calls)
        content = bytearray(SIZE)
        chance = random.Random(1)
        for number in range(10 * limit // 16384):
            offset = chance.randrange(SIZE // 16384) * 16384
            data = number.to_bytes(4, "big") * 4096
            await write(device, offset, data, inline=bool(number % 3))
            content[offset : offset + len(data)] = data
            status = device.journaling.status
            assert status is not None
            assert status.used <= limit
        syncs = sum(op == "fdatasync" for op, _ in faulty.calls) - before
        assert syncs >= 8
        faulty.add(Fault(op="sync", path="disk.hds", count=None, error=errno.EIO))
        new = directory / "new.hds"

        def storage_is_gone(record: StepRecord) -> None:
            if record.step is Step.CLOSE:
                new.write_bytes(faulty.log(path).durable())

        shutil.copyfile(path, new)
        await replace(device, str(new), force=True, on_step=storage_is_gone)
        assert await whole(device) == content


@pytest.mark.trio
async def test_a_forced_flush_that_fails_puts_the_device_into_standby(
    directory: Path, faulty: FaultyOs
) -> None:
    path = image(directory)
    options = DeviceOptions(journal=JournalMode.ON, journal_size=MIB)
    async with serving(faulty) as served:
        device = await served.add(path, options)
        faulty.add(Fault(op="sync", path="disk.hds", count=None, error=errno.EIO))
        async with trio.open_nursery() as nursery:
            for number in range(64):
                nursery.start_soon(write, device, number * 16384, b"x" * 16384)
            await quiet(device)
            faulty.clear()
            new = directory / "new.hds"
            new.write_bytes(faulty.log(path).durable())
            await replace(device, str(new), force=True)
        assert await read(device, 0, MIB) == b"x" * (MIB)


# -- the end -------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_clean_end_loses_nothing_and_says_nothing(directory: Path) -> None:
    path = image(directory)
    async with serving() as served:
        device = await served.add(path, KEPT)
        await change_everything(device)
        await device.close()
        assert EventKind.JOURNAL_LOST not in [event.kind for event in served.events]
        status = device.journaling.status
        assert status is not None
        assert status.requests == 0


@pytest.mark.trio
@pytest.mark.parametrize("replaced", [False, True], ids=["in standby", "after a failed replace"])
async def test_what_cannot_be_written_at_the_end_is_reported(
    replaced: bool, directory: Path, faulty: FaultyOs
) -> None:
    path = image(directory)
    async with serving(faulty) as served:
        device = await served.add(path, KEPT)
        await write(device, 0, b"a" * 4096)
        await call(device, "discard", CLUSTER, CLUSTER)
        faulty.add(Fault(op="*", path="disk.hds", count=None, error=errno.EIO))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flush, device)
            await quiet(device)
            if replaced:
                with pytest.raises(StorageError):
                    await replace(device, str(path))
                await device.close()
            else:
                with pytest.raises(StorageError):
                    await device.close()
            nursery.cancel_scope.cancel()
        (lost,) = [event for event in served.events if event.kind is EventKind.JOURNAL_LOST]
        assert lost.details == {"requests": 2, "bytes": 4096}


@pytest.mark.trio
async def test_a_sync_at_the_end_is_not_trusted_after_a_write_has_failed(
    directory: Path, faulty: FaultyOs
) -> None:
    path = image(directory)
    async with serving(faulty) as served:
        device = await served.add(path, KEPT)
        await write(device, 0, b"a" * 4096)
        faulty.add(Fault(op="write", path="disk.hds", start=CLUSTER, error=errno.EIO))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, device, 0, b"b" * 4096)
            await quiet(device)
            await device.close()
            nursery.cancel_scope.cancel()
        (lost,) = [event for event in served.events if event.kind is EventKind.JOURNAL_LOST]
        assert lost.details == {"requests": 1, "bytes": 4096}


@pytest.mark.trio
@pytest.mark.parametrize("op", ["read", "write"])
async def test_after_any_failure_no_flush_counts(
    op: str, directory: Path, faulty: FaultyOs
) -> None:
    """A client that writes behind tells of a lost write once, by whatever comes next: also a read,
    after which the device is latched and goes on."""
    path = image(directory)
    async with serving(faulty) as served:
        device = await served.add(path, KEPT)
        await write(device, 0, b"a" * 4096)
        faulty.add(Fault(op=op, path="disk.hds", count=1, error=errno.EUCLEAN))
        failing = read(device, 0, 4096) if op == "read" else write(device, 0, b"b" * 4096)
        with pytest.raises(StorageError, match="EUCLEAN"):
            await failing
        assert device.gate.latched is not None
        with pytest.raises(StorageError, match="EUCLEAN"):
            await flush(device)
        status = device.journaling.status
        assert status is not None
        assert status.requests == 1
        assert device.gate.clear_latch()
        await flush(device)
        assert device.journaling.status is not None
        assert device.journaling.status.requests == 0


@pytest.mark.trio
async def test_a_flush_in_execution_when_a_read_fails_drops_nothing(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    path = image(tmp_path)
    async with serving(faulty) as served:
        device = await served.add(path, KEPT)
        await write(device, 0, b"a" * 4096)
        faulty.add(Fault(op="sync", path="disk.hds", count=1, hang=True))
        faulty.add(Fault(op="read", path="disk.hds", count=1, error=errno.ENOTCONN))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flush, device)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(read, device, 0, 4096)
            while device.gate.standby_text != "on":  # noqa: ASYNC110 - nobody announces it
                await trio.sleep(0.005)
            faulty.release()
            await quiet(device)
            assert device.journaling.status is not None
            assert device.journaling.status.requests == 1
            await replace(device, str(path))
        assert await read(device, 0, 4096) == b"a" * 4096


@pytest.mark.trio
async def test_a_device_that_is_read_only_or_without_need_has_no_journal(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = image(directory)
    async with serving() as served:
        read_only = DeviceOptions(
            journal=JournalMode.ON, open=DeviceOptions().open.__class__(read_only=True)
        )
        device = await served.add(path, read_only)
        assert device.journaling.status is None
        await device.close()
    for filesystem, kept in [("ext4", False), ("tmpfs", False), ("fuse.mfs", True), ("nfs4", True)]:
        monkeypatch.setattr("ploopd.fileio.opening.filesystem_type", lambda *_: filesystem)  # noqa: B023
        async with serving() as served:
            device = await served.add(path, DeviceOptions())
            assert (device.journaling.status is not None) == kept, filesystem
            await write(device, 0, b"a" * 512)
            await replace(device, str(path))
            assert (device.journaling.status is not None) == kept, filesystem
