"""A storage without room: a sync that fails for it is made up for, where there is a journal."""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from ploopd.control.handlers.device import full_text
from ploopd.control.recovery import replace
from ploopd.control.steps import Step, StepRecord
from ploopd.devices import DeviceOptions
from ploopd.errors import StorageError
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.gate.events import EventKind
from ploopd.gate.state import GateState
from ploopd.storage.journaling import JournalMode
from tests.support.served import flush, read, serving, write
from tests.unit.control.journal_rig import (
    CLUSTER,
    KEPT,
    MIB,
    NOT_KEPT,
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
async def test_a_sync_that_failed_for_want_of_space_is_made_up_for_by_a_replace(
    directory: Path, faulty: FaultyOs
) -> None:
    """ENOSPC is no reason for standby; the same path again writes everything once more."""
    path = image(directory)
    async with serving(faulty) as served:
        device = await served.add(path, KEPT)
        content = await change_everything(device)
        left = faulty.log(path).durable()
        faulty.add(Fault(op="sync", path="disk.hds", count=2, error=errno.ENOSPC))
        for _ in range(2):
            with pytest.raises(StorageError, match="space"):
                await flush(device)
        assert device.gate.standby_text == "off"

        def lose(record: StepRecord) -> None:
            if record.step is Step.CLOSE:
                path.write_bytes(left)

        await replace(device, str(path), on_step=lose)
        assert await whole(device) == content
        await flush(device)


@pytest.mark.trio
@pytest.mark.parametrize("make", [image, chain])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
async def test_a_sync_that_failed_for_want_of_space_is_made_up_for_when_there_is_some(
    number: int, make: Callable[[Path], Path], directory: Path, faulty: FaultyOs
) -> None:
    """The page cache has lost all that was not synced, entries of the BAT among it: nobody has to
    do anything, the next flush that succeeds has it all."""
    path, served_image = directory / "disk.hds", make(directory)
    async with serving(faulty) as served:
        device = await served.add(served_image, KEPT)
        content = await change_everything(device)
        left = faulty.log(path).durable()
        faulty.add(Fault(op="sync", path="disk.hds", count=3, error=number))
        for _ in range(3):
            with pytest.raises(StorageError, match=errno.errorcode[number]):
                await flush(device)
        with path.open("r+b") as file:
            file.write(left)
        assert full_text(device) is not None
        await flush(device)
        assert full_text(device) is None
        assert device.gate.standby_text == "off"
        assert device.journaling.status is not None
        assert device.journaling.status.requests == 0
        assert await whole(device) == content
        shutil.copyfile(path, directory / "copy.hds")  # the log does not know what was lost
        await write(device, 40 * CLUSTER, b"9" * 4096)
        await flush(device)
    assert not [event for event in served.events if event.kind is EventKind.JOURNAL_LOST]
    shutil.copyfile(directory / "copy.hds", path)  # what a power cut after the flush would leave
    async with serving() as served:
        assert await whole(await served.add(served_image)) == content


@pytest.mark.trio
async def test_a_full_storage_under_load_is_made_up_for_again_and_again(
    directory: Path, faulty: FaultyOs
) -> None:
    """Readers never see older data while the journal is written again, and no write is lost."""
    path = image(directory)
    async with serving(faulty) as served:
        device = await served.add(path, DeviceOptions(journal=JournalMode.ON, journal_size=1 * MIB))
        blocks: list[set[bytes]] = [{bytes(4096)} for _ in range(64)]
        rng = random.Random(8)
        errors: list[StorageError] = []

        async def work(mine: range) -> None:
            for _ in range(300):
                index = rng.choice(mine)
                data = rng.randbytes(4096)
                try:
                    match rng.randrange(8):
                        case 0 | 1 | 2 | 3 as way:
                            before = blocks[index]
                            blocks[index] = before | {data}
                            await write(device, index * 6144, data[:4096], inline=way < 2)
                            blocks[index] = {data}
                        case 4:
                            await flush(device)
                        case way:
                            found = await read(device, index * 6144, 4096, inline=way < 6)
                            assert found in blocks[index]
                except StorageError as error:
                    assert error.errno == errno.ENOSPC  # noqa: PT017 - it need not fail
                    errors.append(error)
                await trio.lowlevel.checkpoint()

        async def fill() -> None:
            while True:
                faulty.add(Fault(op="sync", path="disk.hds", count=2, error=errno.ENOSPC))
                await trio.sleep(0.02)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fill)
            async with trio.open_nursery() as working:
                for first in range(8):
                    working.start_soon(work, range(first, 64, 8))
            nursery.cancel_scope.cancel()
        faulty.clear()
        await flush(device)
        for index, known in enumerate(blocks):
            assert await read(device, index * 6144, 4096) in known
        assert errors
        assert device.gate.state is GateState.ACTIVE
        left = faulty.log(path).durable()
    path.write_bytes(left)
    async with serving() as served:
        device = await served.add(path)
        for index, known in enumerate(blocks):
            assert await read(device, index * 6144, 4096) in known


@pytest.mark.trio
async def test_without_a_journal_no_flush_succeeds_after_a_sync_without_room(
    directory: Path, faulty: FaultyOs
) -> None:
    """Nobody has what the page cache has lost."""
    path = image(directory)
    async with serving(faulty) as served:
        device = await served.add(path, NOT_KEPT)
        await write(device, 0, b"a" * 4096)
        faulty.add(Fault(op="sync", path="disk.hds", count=1, error=errno.ENOSPC))
        for _ in range(2):
            with pytest.raises(StorageError, match="ENOSPC"):
                await flush(device)
        assert "no flush succeeds" in (full_text(device) or "")
        await replace(device, str(path))
        await flush(device)
        assert full_text(device) is None


@pytest.mark.trio
async def test_a_device_that_ends_when_there_is_room_again_loses_nothing(
    directory: Path, faulty: FaultyOs
) -> None:
    path = image(directory)
    async with serving(faulty) as served:
        device = await served.add(path, KEPT)
        content = await change_everything(device)
        faulty.add(Fault(op="sync", path="disk.hds", count=1, error=errno.ENOSPC))
        with pytest.raises(StorageError, match="ENOSPC"):
            await flush(device)
        await device.close()
        assert not [event for event in served.events if event.kind is EventKind.JOURNAL_LOST]
    async with serving() as served:
        device = await served.add(path)
        assert not [note for note in device.volume.notes if "cleanly" in note]
        assert await whole(device) == content


@pytest.mark.trio
@pytest.mark.parametrize("while_executed", [False, True])
async def test_a_write_larger_than_the_journal_is_not_overwritten_by_what_is_made_up_for(
    while_executed: bool, directory: Path, faulty: FaultyOs
) -> None:
    """It has no record: older ones must not be written again once it has been executed."""
    path = image(directory)
    async with serving(faulty) as served:
        options = DeviceOptions(journal=JournalMode.ON, journal_size=1 * MIB)
        device = await served.add(path, options)
        await write(device, 0, b"1" * 4096)
        large = b"2" * (2 * MIB)
        faulty.add(Fault(op="sync", path="disk.hds", count=1, error=errno.ENOSPC))
        expected = b"2" * 4096
        if while_executed:  # its own sync is the one that fails, and so does it
            with pytest.raises(StorageError, match="ENOSPC"):
                await write(device, 0, large, inline=False)
            expected = await read(device, 0, 4096)
            assert expected in (b"1" * 4096, b"2" * 4096)
        else:
            with pytest.raises(StorageError, match="ENOSPC"):
                await flush(device)
            await write(device, 0, large, inline=False)
        assert await read(device, 0, 4096) == expected
        await flush(device)
        assert await read(device, 0, 4096) == expected
        await write(device, 0, large, inline=False)
        await flush(device)
        assert await read(device, 0, 2 * MIB) == large
