"""Which files automatic recovery takes for the disk that a device had, and which never."""

from __future__ import annotations

import errno
import shutil
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from ploopd.control import automation
from ploopd.control.automation import Automation, RecoveryPolicy
from ploopd.control.recovery import replace
from ploopd.control.verification import is_refusal, verify
from ploopd.devices import Device, DeviceOptions
from ploopd.errors import NotFoundError, PloopError, StorageError
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.gate.events import EventKind
from ploopd.gate.state import GateState
from ploopd.storage.opener import OpenOptions
from ploopd.storage.probe import ImageFormat
from tests.support.served import Served, copy_of, flush, quiet, read, serving, write
from tests.unit.control.recovery_rig import SIZE, chain, image

pytestmark = pytest.mark.trio


def sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".uuid")


def replica_of(path: Path) -> Path:
    """A copy with the identity beside it, made while the image is served."""
    copy = copy_of(path)
    shutil.copyfile(sidecar(path), sidecar(copy))
    return copy


def verdict(device: Device, path: Path, *, closed_by_us: bool = False) -> str:
    """Empty when the file is the disk, else why not."""
    try:
        verify(device, str(path), closed_by_us=closed_by_us)
    except PloopError as error:
        if not is_refusal(error):
            raise
        return str(error)
    return ""


async def test_the_file_itself_and_a_replica_are_the_disk(tmp_path: Path) -> None:
    async with serving() as served:
        path = image(tmp_path)
        device = await served.add(path)
        assert verdict(device, path) == ""
        assert verdict(device, replica_of(path)) == ""
        # The served path may have no identity beside it, as in a directory that cannot be written.
        sidecar(path).unlink()
        assert verdict(device, path) == ""


async def test_a_copy_without_a_name_is_nobody(tmp_path: Path) -> None:
    async with serving() as served:
        path = image(tmp_path)
        device = await served.add(path)
        told = verdict(device, copy_of(path))
        assert "nothing says that it is this disk" in told
        assert str(device.identity) in told


async def test_another_disk(tmp_path: Path) -> None:
    async with serving() as served:
        path = image(tmp_path)
        device = await served.add(path)
        copy = replica_of(path)
        sidecar(copy).write_text(f"{uuid.uuid4()}\n")
        assert "is another disk" in verdict(device, copy)
        # Also when it has been put at the very path.
        sidecar(path).write_text(f"{uuid.uuid4()}\n")
        assert "is another disk" in verdict(device, path)
        sidecar(path).write_text("nonsense\n")
        assert "does not hold the image's UUID" in verdict(device, path)


async def test_a_file_that_somebody_has_closed(tmp_path: Path) -> None:
    """From before the device was opened, or served and closed by another host since."""
    async with serving() as served:
        path = image(tmp_path)
        before = copy_of(path)
        device = await served.add(path)
        shutil.copyfile(sidecar(path), sidecar(before))
        assert "somebody has closed it" in verdict(device, before)
        shutil.copyfile(before, path)
        assert "somebody has closed it" in verdict(device, path)
        assert verdict(device, path, closed_by_us=True) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 2 * SIZE}, "disk size"),
        ({"cluster_size": 128 << 10}, "cluster size"),
        ({"version": 1}, "format version"),
    ],
)
async def test_another_geometry(changes: dict[str, int], message: str, tmp_path: Path) -> None:
    async with serving() as served:
        path = image(tmp_path)
        device = await served.add(path)
        other = image(tmp_path, "other.hds", **changes)
        shutil.copyfile(sidecar(path), sidecar(other))
        assert message in verdict(device, other)


async def test_a_read_only_device_asks_for_no_in_use_word(tmp_path: Path) -> None:
    async with serving() as served:
        path = image(tmp_path)
        sidecar(path).write_text(f"{uuid.uuid4()}\n")
        options = DeviceOptions(open=OpenOptions(read_only=True))
        device = await served.add(path, options)
        assert verdict(device, path) == ""
        assert verdict(device, replica_of(path)) == ""


async def test_a_raw_disk_has_geometry_and_identity_only(tmp_path: Path) -> None:
    async with serving() as served:
        path = tmp_path / "disk.raw"
        path.write_bytes(bytes(SIZE))
        options = DeviceOptions(open=OpenOptions(format=ImageFormat.RAW))
        device = await served.add(path, options)
        assert verdict(device, replica_of(path)) == ""
        ploop = image(tmp_path, "ploop.hds", size=SIZE)
        shutil.copyfile(sidecar(path), sidecar(ploop))
        assert "ploop image" in verdict(device, ploop) or "disk size" in verdict(device, ploop)


async def test_what_is_not_there_or_does_not_answer_may_come_back(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    async with serving(faulty) as served:
        path = image(tmp_path)
        device = await served.add(path)
        with pytest.raises(NotFoundError) as missing:
            verify(device, str(tmp_path / "none"), closed_by_us=False)
        assert not is_refusal(missing.value)
        faulty.add(Fault(op="read", error=errno.EIO, count=None))
        with pytest.raises(StorageError) as failed:
            verify(device, str(path), closed_by_us=False)
        assert not is_refusal(failed.value)


# -- the whole way, on real files --------------------------------------------------------------

QUICK = {"delay": 0.05, "delay_max": 0.1}


@asynccontextmanager
async def recovering(
    layer: FaultyOs, directory: Path, path: Path, *, candidates: tuple[Path, ...] = ()
) -> AsyncIterator[tuple[Served, Device, Automation]]:
    async with serving(layer) as served, trio.open_nursery() as nursery:
        device = await served.add(path)
        recoverers = Automation(directory / "c.sock")
        names = tuple(str(each) for each in candidates)
        recoverers.add(device, RecoveryPolicy(mode="reopen", candidates=names, **QUICK))
        await nursery.start(recoverers.run)
        yield served, device, recoverers
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool], what: str) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - what is awaited has no event of its own
            await trio.sleep(0.01)


async def test_parked_writes_land_when_the_storage_answers_again(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    path = image(tmp_path)
    async with recovering(faulty, tmp_path, path) as (served, device, _):
        faulty.add(Fault(op="*", error=errno.EIO, count=None))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, device, 4096, b"w" * 4096)
            await quiet(device)
            await until(lambda: not device.volume_open, "the old files are closed")
            await trio.sleep(0.5)
            assert device.gate.standby_text == "on"
            faulty.clear()
        assert await read(device, 4096, 4096) == b"w" * 4096
        assert device.gate.state is GateState.ACTIVE
        assert EventKind.RECOVERED in [event.kind for event in served.events]


async def test_a_chain_is_opened_again_with_its_descriptor(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    descriptor = chain(tmp_path)
    before = descriptor.read_bytes()
    async with recovering(faulty, tmp_path, descriptor) as (_, device, _):
        faulty.add(Fault(op="write", error=errno.ENOTCONN, count=4))
        await write(device, 4096, b"c" * 4096)
        await flush(device)
        assert await read(device, 4096, 4096) == b"c" * 4096
        assert device.gate.state is GateState.ACTIVE
    assert descriptor.read_bytes() == before


async def test_a_candidate_that_fails_half_way_is_tried_again(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    """Its first attempt opens and closes it, so that its in-use word says nothing any more."""
    path = image(tmp_path)
    copy = tmp_path / "copy-of-disk.hds"
    async with recovering(faulty, tmp_path, path, candidates=(copy,)) as (served, device, _):
        assert replica_of(path) == copy
        faulty.add(Fault(op="*", path="disk.hds", error=errno.EIO, count=None))
        faulty.add(Fault(op="sync", path=copy.name, nth=2, error=errno.EIO, count=1))
        await write(device, 0, b"x" * 4096)
        assert device.image == str(copy)
        assert await read(device, 0, 4096) == b"x" * 4096
        kinds = [event.kind for event in served.events]
        assert EventKind.REPLACE_FAILED in kinds
        assert EventKind.CANDIDATE_REFUSED not in kinds


async def test_looks_that_hang_do_not_pile_up(
    tmp_path: Path, faulty: FaultyOs, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = image(tmp_path)
    copy = tmp_path / "copy-of-disk.hds"
    async with recovering(faulty, tmp_path, path, candidates=(copy,)) as (_, device, _):
        replica_of(path)
        faulty.add(Fault(op="*", path="disk.hds", error=errno.EIO, count=None))
        hang = faulty.add(Fault(op="open", path=copy.name, hang=True, count=None))
        monkeypatch.setattr(automation, "LOOK_SECONDS", 0.05)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, device, 0, b"x" * 4096)
            await until(lambda: hang.hits > 0, "a look hangs")
            await trio.sleep(1.0)
            assert hang.hits == 1
            faulty.clear()
            faulty.release()
        assert await read(device, 0, 4096) == b"x" * 4096


async def test_an_operator_gets_through_an_attempt_that_hangs(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    path = image(tmp_path)
    async with recovering(faulty, tmp_path, path) as (_, device, recoverers):
        copy = copy_of(path)
        faulty.add(Fault(op="write", path="disk.hds", error=errno.EIO, count=1))
        # Only the replace opens for writing and marks the image; there it hangs.
        hang = faulty.add(Fault(op="write", path="disk.hds", nth=2, hang=True, count=None))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, device, 0, b"x" * 4096)
            await until(lambda: hang.hits > 0 and device.replacing, "the attempt hangs")
            began = trio.current_time()
            async with recoverers.operator(device):
                assert not device.replacing
                await replace(device, str(copy), force=True)
            assert trio.current_time() - began < 15
        assert device.image == str(copy)
        assert await read(device, 0, 4096) == b"x" * 4096
        faulty.clear()
        faulty.release()
