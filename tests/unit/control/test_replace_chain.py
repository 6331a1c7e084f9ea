"""Which delta of a chain is replaced, and how the new file becomes the one that is opened next."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import trio

from image_format import parse_descriptor
from ploopd.control.recovery import Step, StepRecord, replace
from ploopd.control.steps import RECOVERY_STEPS
from ploopd.devices import Device, DeviceOptions
from ploopd.errors import (
    BusyError,
    DescriptorError,
    NotFoundError,
    PloopError,
    StorageError,
    UncleanImageError,
    UsageError,
)
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.gate.state import GateState
from ploopd.storage.opener import OpenOptions
from tests.support.images import guid, write_delta, write_descriptor
from tests.support.served import copy_of, flush, read, serving, write
from tests.unit.control.recovery_rig import CLUSTER, SHORT, SIZE, chain, image

CONTENT = b"".join(bytes([index % 251 + 1]) * 16 for index in range(SIZE // CLUSTER))


async def content(device: Device) -> bytes:
    """The first bytes of every cluster."""
    parts = [await read(device, offset, 16) for offset in range(0, SIZE, CLUSTER)]
    return b"".join(parts)


def names(descriptor: Path) -> list[str]:
    """The files that a descriptor names, base first."""
    return [each.file for each in parse_descriptor(descriptor.read_bytes()).storages[0].images]


def listing(directory: Path) -> dict[str, bytes]:
    """Everything in a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.mark.trio
async def test_the_descriptor_names_the_new_top_before_the_first_request_runs(
    tmp_path: Path,
) -> None:
    descriptor = chain(tmp_path)
    before = descriptor.read_bytes()
    copy = copy_of(tmp_path / "top.hds")
    seen: dict[Step, list[str]] = {}
    async with serving() as served:
        device = await served.add(descriptor)
        identity = device.identity
        device.gate.enter_standby("test")

        def on_step(record: StepRecord) -> None:
            seen[record.step] = names(descriptor)

        report = await replace(device, str(copy), on_step=on_step)
        assert (report.level, report.guid, report.previous) == (
            0,
            guid(2),
            str(tmp_path / "top.hds"),
        )
        assert seen[Step.PROBE] == ["base.hds", "top.hds"]
        assert seen[Step.RECORD] == seen[Step.SWAP] == ["base.hds", "copy-of-top.hds"]
        assert descriptor.read_bytes() == before.replace(b"top.hds", b"copy-of-top.hds")
        await write(device, CLUSTER, b"n" * 16)
        await flush(device)
    async with serving() as served:
        again = await served.add(descriptor)
        assert again.identity == identity
        assert await read(again, CLUSTER, 16) == b"n" * 16
    assert not (tmp_path / "DiskDescriptor.xml.tmp").exists()
    assert (tmp_path / "top.hds").read_bytes()[44:48] == bytes(4)


@pytest.mark.trio
@pytest.mark.parametrize("by", ["level", "guid"])
async def test_a_lower_delta_is_replaced_and_never_written(by: str, tmp_path: Path) -> None:
    descriptor = chain(tmp_path)
    new = copy_of(tmp_path / "base.hds")
    before = new.read_bytes()
    async with serving() as served:
        device = await served.add(descriptor)
        await write(device, 0, b"top" + bytes(13))
        device.gate.enter_standby("test")
        if by == "level":
            report = await replace(device, str(new), level=1)
        else:
            report = await replace(device, str(new), guid=guid(1).strip("{}").upper())
        assert (report.level, report.guid) == (1, guid(1))
        assert [each.path for each in device.volume.layers] == [
            str(tmp_path / "top.hds"),
            str(new),
        ]
        assert (await content(device))[16:] == CONTENT[16:]
        assert await read(device, 0, 3) == b"top"
        await write(device, CLUSTER, b"copied up")
    assert names(descriptor) == ["copy-of-base.hds", "top.hds"]
    assert new.read_bytes() == before


@pytest.mark.trio
async def test_a_level_or_guid_that_the_chain_does_not_have(tmp_path: Path) -> None:
    descriptor, single = chain(tmp_path), image(tmp_path)
    copy = copy_of(tmp_path / "top.hds")
    async with serving() as served:
        device, other = await served.add(descriptor), await served.add(single)
        with pytest.raises(NotFoundError, match=r"levels 0 \(the top\) to 1"):
            await replace(device, str(copy), level=2)
        with pytest.raises(NotFoundError, match=guid(1)):
            await replace(device, str(copy), guid=guid(9))
        with pytest.raises(NotFoundError, match="no descriptor"):
            await replace(other, str(single), guid=guid(1))
        with pytest.raises(UsageError, match="not both"):
            await replace(device, str(copy), guid=guid(1), level=1)
        with pytest.raises(UsageError, match="no change"):
            await replace(device, str(copy), keep_name=True, keep_descriptor=True)
        assert device.gate.state is other.gate.state is GateState.ACTIVE
        assert not device.replacing


def _shorter(path: Path) -> Path:
    return write_delta(path / "n.hds", SIZE // 2, {}, cluster_size=CLUSTER)


def _dirty(path: Path) -> Path:
    found = copy_of(path / "base.hds")
    with found.open("r+b") as file:
        file.seek(44)
        file.write((0x746F6E59).to_bytes(4, "little"))
    return found


@pytest.mark.trio
async def test_a_lower_delta_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    descriptor = chain(tmp_path)
    async with serving() as served:
        device = await served.add(descriptor)
        for wrong, error, words in (
            (_shorter(tmp_path), UsageError, "disk_size"),
            (_dirty(tmp_path), UncleanImageError, "--force"),
            (tmp_path / "top.hds", UsageError, "delta of level 0"),
        ):
            with pytest.raises(error, match=words):
                await replace(device, str(wrong), level=1)
            assert device.gate.state is GateState.ACTIVE
        assert await content(device) == CONTENT


@pytest.mark.trio
async def test_a_raw_base_is_replaced_by_a_raw_file_only(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"r" * SIZE)
    write_delta(tmp_path / "top.hds", SIZE, {}, cluster_size=CLUSTER)
    rows = [(guid(1), "Plain", "base.raw"), (guid(2), "Compressed", "top.hds")]
    write_descriptor(tmp_path, SIZE, rows, cluster_size=CLUSTER, top_guid=guid(2))
    copy, header = copy_of(tmp_path / "base.raw"), image(tmp_path, "delta.raw")
    os.truncate(header, SIZE)
    (tmp_path / "short.raw").write_bytes(b"r" * (SIZE - 512))
    async with serving() as served:
        device = await served.add(tmp_path)
        await write(device, 0, b"top")
        with pytest.raises(UsageError, match="is a ploop image"):
            await replace(device, str(header), level=1)
        with pytest.raises(UsageError, match="disk_size"):
            await replace(device, str(tmp_path / "short.raw"), level=1)
        with pytest.raises(PloopError, match="copy-of-base"):
            await replace(device, str(copy))
        await replace(device, str(copy), level=1)
        assert await read(device, 0, 6) == b"toprrr"
        assert device.gate.state is GateState.ACTIVE
    assert names(tmp_path / "DiskDescriptor.xml") == ["copy-of-base.raw", "top.hds"]


# -- a delta of another chain --------------------------------------------------------------


def other_disk(directory: Path, first: int) -> Path:
    """A disk of the same geometry whose chain has other GUIDs."""
    directory.mkdir()
    write_delta(directory / "base.hds", SIZE, {}, cluster_size=CLUSTER)
    write_delta(directory / "top.hds", SIZE, {}, cluster_size=CLUSTER)
    rows = [(guid(first), "Compressed", "base.hds"), (guid(2), "Compressed", "top.hds")]
    write_descriptor(directory, SIZE, rows, cluster_size=CLUSTER, top_guid=guid(2))
    return directory


@pytest.mark.trio
async def test_a_delta_that_its_descriptor_gives_to_another_chain_is_refused(
    tmp_path: Path,
) -> None:
    descriptor = chain(tmp_path)
    other = other_disk(tmp_path / "other", 5)
    single = image(tmp_path)
    before = listing(other)
    async with serving() as served:
        device, alone = await served.add(descriptor), await served.add(single)
        for name in ("top.hds", "base.hds"):
            with pytest.raises(UsageError, match=r"another chain.*other/DiskDescriptor\.xml"):
                await replace(device, str(other / name), force=True)
        with pytest.raises(UsageError, match="over other deltas"):
            await replace(alone, str(other / "top.hds"))
        with pytest.raises(UsageError, match="has another delta over it"):
            await replace(alone, str(other / "base.hds"))
        assert device.gate.state is alone.gate.state is GateState.ACTIVE
    assert listing(other) == before


@pytest.mark.trio
async def test_the_delta_of_a_copied_directory_is_the_same_place_in_the_chain(
    tmp_path: Path,
) -> None:
    (tmp_path / "disk").mkdir()
    descriptor = chain(tmp_path / "disk")
    shutil.copytree(tmp_path / "disk", tmp_path / "disk" / "copy")
    async with serving() as served:
        device = await served.add(descriptor)
        await replace(device, str(tmp_path / "disk/copy/top.hds"))
        assert await content(device) == CONTENT
    assert names(descriptor) == ["base.hds", "copy/top.hds"]


@pytest.mark.trio
async def test_the_image_of_another_snapshot_of_the_same_disk_is_refused(tmp_path: Path) -> None:
    chain(tmp_path)
    write_delta(tmp_path / "branch.hds", SIZE, {}, cluster_size=CLUSTER)
    text = (tmp_path / "DiskDescriptor.xml").read_text()
    more_image = (
        f"<Image><GUID>{guid(3)}</GUID><Type>Compressed</Type><File>branch.hds</File></Image>"
    )
    more_shot = f"<Shot><GUID>{guid(3)}</GUID><ParentGUID>{guid(1)}</ParentGUID></Shot>"
    text = text.replace("</Storage>", f"{more_image}</Storage>", 1)
    text = text.replace("</Snapshots>", f"{more_shot}</Snapshots>")
    (tmp_path / "DiskDescriptor.xml").write_text(text)
    async with serving() as served:
        device = await served.add(tmp_path / "DiskDescriptor.xml")
        with pytest.raises(UsageError, match="another snapshot"):
            await replace(device, str(tmp_path / "branch.hds"))


# -- names ---------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_file_outside_of_the_directory_needs_a_decision(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    descriptor = chain(tmp_path / "disk")
    outside = tmp_path / "copy.hds"
    shutil.copyfile(tmp_path / "disk/top.hds", outside)
    (tmp_path / "disk/link.hds").symlink_to(outside)
    before = descriptor.read_bytes()
    async with serving() as served:
        device = await served.add(descriptor)
        with pytest.raises(DescriptorError, match="--keep-descriptor"):
            await replace(device, str(outside))
        with pytest.raises(DescriptorError, match="symbolic link"):
            await replace(device, str(tmp_path / "disk/link.hds"))
        assert device.gate.state is GateState.ACTIVE
        await replace(device, str(outside), keep_descriptor=True)
        await write(device, 0, b"outside")
        await flush(device)
        assert descriptor.read_bytes() == before
        assert device.substitutes == {guid(2): str(outside)}
        lower = copy_of(tmp_path / "disk/base.hds")
        await replace(device, str(lower), level=1)
        assert [each.path for each in device.volume.layers] == [str(outside), str(lower)]
        assert await read(device, 0, 7) == b"outside"
        back = tmp_path / "disk/back.hds"
        shutil.copyfile(outside, back)
        await replace(device, str(back), force=True)
        assert device.substitutes == {}
    assert names(descriptor) == ["copy-of-base.hds", "back.hds"]


@pytest.mark.trio
async def test_an_image_root_lets_the_descriptor_name_a_file_outside_of_its_directory(
    tmp_path: Path,
) -> None:
    (tmp_path / "disk").mkdir()
    descriptor = chain(tmp_path / "disk")
    outside = tmp_path / "copy.hds"
    shutil.copyfile(tmp_path / "disk/top.hds", outside)
    options = DeviceOptions(open=OpenOptions(image_root=tmp_path))
    async with serving() as served:
        device = await served.add(descriptor, options)
        await replace(device, str(outside))
        await write(device, 0, b"outside")
    assert names(descriptor) == ["base.hds", "../copy.hds"]
    async with serving() as served:
        again = await served.add(descriptor, options)
        assert await read(again, 0, 7) == b"outside"


@pytest.mark.trio
@pytest.mark.parametrize("kind", ["chain", "single"])
async def test_the_new_file_gets_the_old_name(kind: str, tmp_path: Path) -> None:
    served_path = chain(tmp_path) if kind == "chain" else image(tmp_path)
    old = tmp_path / ("top.hds" if kind == "chain" else "disk.hds")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    new = elsewhere / "new.hds"
    shutil.copyfile(old, new)
    before = (tmp_path / "DiskDescriptor.xml").read_bytes() if kind == "chain" else b""
    inode = new.stat().st_ino
    async with serving() as served:
        device = await served.add(served_path)
        identity = device.identity
        device.gate.enter_standby("test")
        report = await replace(device, str(new), keep_name=True)
        assert report.image == report.previous == str(old)
        assert not new.exists()
        assert old.stat().st_ino == inode
        assert device.volume.layers[0].path == str(old)
        assert (device.image, device.substitutes) == (str(served_path), {})
        await write(device, 0, b"kept")
        await replace(device, str(old))  # by its new name it is our own
    if kind == "chain":
        assert (tmp_path / "DiskDescriptor.xml").read_bytes() == before
    async with serving() as served:
        again = await served.add(served_path)
        assert again.identity == identity
        assert await read(again, 0, 4) == b"kept"
    assert list(elsewhere.iterdir()) == []


@pytest.mark.trio
async def test_a_name_that_cannot_be_kept_is_refused_first(tmp_path: Path) -> None:
    path = image(tmp_path)
    new = image(tmp_path, "new.hds")
    link = tmp_path / "link.hds"
    link.symlink_to(new)
    foreign = image(Path("/dev/shm"), f"ploopd-test-{os.getpid()}.hds")
    try:
        async with serving() as served:
            device = await served.add(path)
            with pytest.raises(UsageError, match="symbolic link"):
                await replace(device, str(link), keep_name=True)
            if foreign.stat().st_dev != path.stat().st_dev:
                with pytest.raises(UsageError, match="another file system"):
                    await replace(device, str(foreign), keep_name=True)
            assert device.gate.state is GateState.ACTIVE
            reading = await served.add(
                image(tmp_path, "r.hds"), DeviceOptions(open=OpenOptions(read_only=True))
            )
            with pytest.raises(UsageError, match="read-only device"):
                await replace(reading, str(new), keep_name=True)
    finally:
        foreign.unlink()


# -- failures of the record ----------------------------------------------------------------


@pytest.mark.trio
@pytest.mark.parametrize("began", [GateState.ACTIVE, GateState.STANDBY])
async def test_a_full_disk_at_the_descriptor_is_found_before_anything_is_touched(
    began: GateState, tmp_path: Path, faulty: FaultyOs
) -> None:
    descriptor = chain(tmp_path)
    copy = copy_of(tmp_path / "top.hds")
    async with serving(faulty) as served:
        device = await served.add(descriptor)
        if began is GateState.STANDBY:
            device.gate.enter_standby("test")
        before = listing(tmp_path)
        faulty.add(Fault(op="write", path="*.xml.tmp", count=None, error=errno.ENOSPC))
        with pytest.raises(StorageError, match="No space left"):
            await replace(device, str(copy))
        assert device.gate.state is began
        assert device.volume_open
        assert listing(tmp_path) == before
        faulty.clear()
        await replace(device, str(copy))
    assert names(descriptor) == ["base.hds", "copy-of-top.hds"]


@pytest.mark.trio
@pytest.mark.parametrize("failing", ["rename", "last sync"])
async def test_a_record_that_fails_leaves_standby_and_the_old_or_the_new_one(
    failing: str, tmp_path: Path, faulty: FaultyOs, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor = chain(tmp_path)
    copy = copy_of(tmp_path / "top.hds")
    async with serving(faulty) as served:
        device = await served.add(descriptor)
        device.gate.enter_standby("test")
        if failing == "rename":
            monkeypatch.setattr(os, "rename", _refusing)
        else:
            faulty.add(Fault(op="fsync", path="descriptor *", error=errno.EIO))
        with pytest.raises(StorageError):
            await replace(device, str(copy), deadlines=SHORT)
        monkeypatch.undo()
        assert device.gate.standby_text == "on"
        assert not device.volume_open
        assert copy.read_bytes()[44:48] == bytes(4)
        new = "top.hds" if failing == "rename" else "copy-of-top.hds"
        assert names(descriptor) == ["base.hds", new]
        assert not (tmp_path / "DiskDescriptor.xml.tmp").exists()
        await replace(device, str(copy))
        assert await content(device) == CONTENT
    assert names(descriptor) == ["base.hds", "copy-of-top.hds"]


def _refusing(_old: str, _new: str) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.trio
async def test_a_record_that_hangs_keeps_every_other_recovery_away(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    descriptor = chain(tmp_path)
    copy = copy_of(tmp_path / "top.hds")
    async with serving(faulty) as served:
        device = await served.add(descriptor)
        device.gate.enter_standby("test")
        faulty.add(Fault(op="fsync", path="descriptor *", hang=True))
        with pytest.raises(PloopError, match="took longer"):
            await replace(device, str(copy), deadlines=SHORT)
        with pytest.raises(BusyError, match="still hangs"):
            await replace(device, str(tmp_path / "top.hds"), deadlines=SHORT)
        assert device.gate.standby_text == "on"
        faulty.release()
        for _ in range(500):
            if not device.recording.locked():
                break
            await trio.sleep(0.01)
        await replace(device, str(copy))
        assert device.gate.standby_text == "off"


# -- dry run -------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_dry_run_touches_nothing_and_tells_everything(
    tmp_path: Path, faulty: FaultyOs
) -> None:
    descriptor = chain(tmp_path)
    copy = copy_of(tmp_path / "top.hds")
    async with serving(faulty) as served:
        device = await served.add(descriptor)
        device.gate.enter_standby("test")
        before, events = listing(tmp_path), len(served.events)
        faulty.calls.clear()
        report = await replace(device, str(copy), dry_run=True)
        assert report.dry_run
        assert [each.step for each in report.steps] == list(RECOVERY_STEPS)
        planned = {each.step: each.detail for each in report.steps if each.planned}
        assert Step.CHECK not in planned
        assert "would open " + str(copy) in planned[Step.OPEN]
        assert "DiskDescriptor.xml names copy-of-top.hds" in planned[Step.RECORD]
        changing = {"write", "fsync", "fdatasync", "truncate", "fallocate"}
        assert not changing & {name for name, _ in faulty.calls}
        assert listing(tmp_path) == before
        assert device.gate.standby_text == "on"
        assert [each.kind.value for each in served.events[events:]] == ["replace-step"]
        with pytest.raises(NotFoundError):
            await replace(device, str(tmp_path / "missing"), dry_run=True)
        with pytest.raises(UncleanImageError):
            await replace(device, str(_dirty_top(tmp_path)), dry_run=True)
        assert not device.replacing


def _dirty_top(path: Path) -> Path:
    found = path / "dirty.hds"
    shutil.copyfile(path / "top.hds", found)
    return found
