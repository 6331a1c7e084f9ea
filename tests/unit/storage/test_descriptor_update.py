"""A DiskDescriptor.xml is exchanged whole: the old or the new one, with its owner and mode."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from image_format import parse_descriptor
from ploopd.errors import DescriptorError, NotFoundError, StorageError
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.storage.descriptor_update import DescriptorUpdate, descriptor_name
from tests.support import images

MIB = 1 << 20


def disk(directory: Path) -> Path:
    images.write_delta(directory / "root.hds", MIB, {}, cluster_size=65536)
    rows = [(images.TOP_GUID, "Compressed", "root.hds")]
    return images.write_descriptor(directory, MIB, rows, cluster_size=65536)


def named(descriptor: Path) -> str:
    return parse_descriptor(descriptor.read_bytes()).storages[0].images[0].file


def test_the_new_document_is_put_in_place_with_owner_and_mode(tmp_path: Path) -> None:
    descriptor = disk(tmp_path)
    descriptor.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(descriptor, 12, 34)
    before = descriptor.stat()
    update = DescriptorUpdate(str(descriptor), images.TOP_GUID, "new.hds")
    assert update.prepare()
    assert named(descriptor) == "root.hds"
    update.commit()
    assert named(descriptor) == "new.hds"
    after = descriptor.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )
    assert sorted(each.name for each in tmp_path.iterdir()) == [descriptor.name, "root.hds"]


def test_the_order_is_write_sync_rename_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor = disk(tmp_path)
    layer = FaultyOs()
    rename = os.rename

    def traced(old: str, new: str) -> None:
        layer.calls.append(("rename", old))
        rename(old, new)

    monkeypatch.setattr(os, "rename", traced)
    update = DescriptorUpdate(str(descriptor), images.TOP_GUID, "new.hds", layer=layer)
    update.prepare()
    update.commit()
    temporary = f"{descriptor}.tmp"
    steps = [name for name, path in layer.calls if name in ("write", "fsync", "rename")]
    assert steps == ["write", "fsync", "rename", "fsync"]
    assert ("rename", temporary) in layer.calls


@pytest.mark.parametrize("op", ["write", "fsync", "open"])
def test_a_new_document_that_cannot_be_written_leaves_the_old_one(op: str, tmp_path: Path) -> None:
    descriptor = disk(tmp_path)
    before = descriptor.read_bytes()
    layer = FaultyOs()
    layer.add(Fault(op=op, path="*.tmp", error=errno.ENOSPC))
    update = DescriptorUpdate(str(descriptor), images.TOP_GUID, "new.hds", layer=layer)
    with pytest.raises(StorageError) as caught:
        update.prepare()
    assert caught.value.errno == errno.ENOSPC
    assert str(descriptor) in str(caught.value)
    assert "--keep-name" in str(caught.value)
    assert descriptor.read_bytes() == before
    assert not descriptor.with_name("DiskDescriptor.xml.tmp").exists()


def test_what_a_crash_has_left_is_written_over(tmp_path: Path) -> None:
    descriptor = disk(tmp_path)
    left = descriptor.with_name("DiskDescriptor.xml.tmp")
    left.write_bytes(b"half a docu")
    update = DescriptorUpdate(str(descriptor), images.TOP_GUID, "new.hds")
    update.prepare()
    update.commit()
    assert named(descriptor) == "new.hds"
    assert not left.exists()


def test_a_document_that_somebody_changed_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    descriptor = disk(tmp_path)
    update = DescriptorUpdate(str(descriptor), images.TOP_GUID, "new.hds")
    update.prepare()
    changed = descriptor.read_bytes() + b"<!-- by hand -->\n"
    descriptor.write_bytes(changed)
    with pytest.raises(DescriptorError, match="changed by somebody else"):
        update.commit()
    update.discard()
    assert descriptor.read_bytes() == changed
    assert not descriptor.with_name("DiskDescriptor.xml.tmp").exists()


def test_a_descriptor_behind_a_link_is_changed_where_it_is(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    real = disk(place)
    link = tmp_path / "DiskDescriptor.xml"
    link.symlink_to(real)
    update = DescriptorUpdate(str(link), images.TOP_GUID, "new.hds")
    update.commit()
    assert link.is_symlink()
    assert named(real) == "new.hds"


def test_checking_and_the_same_name_write_nothing(tmp_path: Path) -> None:
    descriptor = disk(tmp_path)
    before = os.stat(tmp_path).st_mtime_ns
    assert DescriptorUpdate(str(descriptor), images.TOP_GUID, "new.hds").check()
    same = DescriptorUpdate(str(descriptor), images.TOP_GUID, "root.hds")
    assert not same.check()
    same.prepare()
    same.commit()
    assert os.stat(tmp_path).st_mtime_ns == before
    with pytest.raises(DescriptorError, match="GUID"):
        DescriptorUpdate(str(descriptor), images.guid(7), "new.hds").check()
    with pytest.raises(NotFoundError):
        DescriptorUpdate(str(tmp_path / "no.xml"), images.TOP_GUID, "new.hds").check()


def test_names_that_a_descriptor_can_give(tmp_path: Path) -> None:
    inside = tmp_path / "disk"
    (inside / "deltas").mkdir(parents=True)
    descriptor = disk(inside)
    (inside / "deltas" / "new.hds").write_bytes(b"x")
    (tmp_path / "outside.hds").write_bytes(b"x")
    (inside / "link.hds").symlink_to(tmp_path / "outside.hds")
    (tmp_path / "way").symlink_to(inside)
    assert (
        descriptor_name(str(descriptor), str(inside / "deltas/new.hds"), None) == "deltas/new.hds"
    )
    assert descriptor_name(str(tmp_path / "way" / descriptor.name), str(inside / "root.hds"), None)
    assert descriptor_name(str(descriptor), str(tmp_path / "way/root.hds"), None) == "root.hds"
    with pytest.raises(DescriptorError, match="lies outside of"):
        descriptor_name(str(descriptor), str(tmp_path / "outside.hds"), None)
    with pytest.raises(DescriptorError, match="symbolic link"):
        descriptor_name(str(descriptor), str(inside / "link.hds"), None)
    outside = str(tmp_path / "outside.hds")
    assert descriptor_name(str(descriptor), outside, tmp_path) == "../outside.hds"
    with pytest.raises(DescriptorError, match="outside of the image root"):
        descriptor_name(str(descriptor), outside, inside)
