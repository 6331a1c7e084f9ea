"""Growing images offline: what is kept, what is moved, what is refused."""

from __future__ import annotations

import errno
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import trio

from image_format import PvdHeader, parse_descriptor
from ploopd.errors import (
    DescriptorError,
    LockedError,
    PloopError,
    ReadOnlyError,
    StorageError,
    UncleanImageError,
    UsageError,
)
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.fileio.file import File
from ploopd.fileio.locks import lock_image
from ploopd.storage.check import check_all
from ploopd.storage.grow import grow_image
from tests.support import images
from tests.support.volumes import open_disk, running_engine
from tests.unit.storage.broken_images import IN_USE, append, set_entry, set_word

CLUSTER = 32 << 10
PER_CLUSTER = CLUSTER // 4
"""BAT entries of a cluster, 16 more than in the first one."""
ENTRIES = 40
SIZE = ENTRIES * CLUSTER
LARGE = 3 * PER_CLUSTER * CLUSTER
"""A disk whose header and BAT take four clusters instead of one."""


def content_of(path: Path, length: int) -> tuple[int, bytes]:
    """The disk's size and its first `length` bytes."""

    async def read() -> tuple[int, bytes]:
        async with running_engine() as engine, open_disk(path, engine, read_only=True) as disk:
            pieces = [
                await disk.read(at, min(1 << 20, length - at)) for at in range(0, length, 1 << 20)
            ]
            return disk.size, b"".join(pieces)

    return trio.run(read)


def header_of(path: Path) -> PvdHeader:
    return PvdHeader.parse(path.read_bytes()[:64], file=str(path))


def entries_of(path: Path) -> list[int]:
    header = header_of(path)
    data = path.read_bytes()[64 : 64 + 4 * header.bat_entries]
    return [entry // header.entry_scale for (entry,) in struct.iter_unpack("<I", data)]


def some_clusters(seed: int, numbers: range | tuple[int, ...]) -> dict[int, bytes]:
    generator = random.Random(seed)
    return {number: generator.randbytes(CLUSTER) for number in numbers}


def flat(size: int, *layers: dict[int, bytes]) -> bytes:
    content = bytearray(-(-size // CLUSTER) * CLUSTER)
    for clusters in layers:
        for number, data in clusters.items():
            content[number * CLUSTER : (number + 1) * CLUSTER] = data
    return bytes(content[:size])


def require_clean(path: Path, leaks: int = 0) -> None:
    for report in check_all(path):
        assert (report.corruptions, report.leaks) == (0, leaks), report.details


@pytest.mark.parametrize("version", [1, 2])
def test_what_is_in_the_way_of_the_bat_is_moved(tmp_path: Path, version: int) -> None:
    clusters = some_clusters(1, (7, 0, 3, 20, 39))
    path = images.write_delta(
        tmp_path / "a.hds",
        SIZE,
        clusters,
        cluster_size=CLUSTER,
        version=version,
        order=tuple(clusters),
    )
    grown = grow_image(path, LARGE)
    assert (grown.size, grown.previous, grown.moved) == (LARGE, SIZE, 3)
    header = header_of(path)
    assert (header.header_clusters, header.bat_entries) == (4, LARGE // CLUSTER)
    assert (header.in_use, header.flags, header.ext_offset_sectors) == (0, 0, 0)
    assert [entries_of(path)[number] for number in clusters] == [6, 7, 8, 4, 5]
    require_clean(path)
    size, content = content_of(path, 2 * SIZE)
    assert (size, content) == (LARGE, flat(SIZE, clusters) + bytes(SIZE))


def test_nothing_is_moved_where_the_bat_has_room(tmp_path: Path) -> None:
    clusters = some_clusters(2, range(5))
    path = images.write_delta(tmp_path / "a.hds", SIZE, clusters, cluster_size=CLUSTER)
    before = path.read_bytes()
    assert grow_image(path, SIZE + 1).size == SIZE + CLUSTER
    after = path.read_bytes()
    assert after[CLUSTER:] == before[CLUSTER:]
    assert after[64 : 64 + 4 * ENTRIES] == before[64 : 64 + 4 * ENTRIES]
    require_clean(path)


def test_an_empty_image_gets_the_clusters_that_its_bat_needs(tmp_path: Path) -> None:
    path = images.write_delta(tmp_path / "a.hds", SIZE, {}, cluster_size=CLUSTER)
    assert grow_image(path, LARGE).moved == 0
    assert path.stat().st_size == 4 * CLUSTER
    require_clean(path)


def test_free_clusters_behind_the_bat_are_used_before_the_file_grows(tmp_path: Path) -> None:
    clusters = some_clusters(3, (0, 1, 2))
    path = images.write_delta(
        tmp_path / "a.hds", SIZE, clusters, cluster_size=CLUSTER, order=(0, 1, 2)
    )
    append(path, 5 * CLUSTER)  # leaks, full of something else
    grow_image(path, LARGE)
    assert entries_of(path)[:3] == [4, 5, 6]
    assert path.stat().st_size == 7 * CLUSTER
    assert content_of(path, SIZE)[1] == flat(SIZE, clusters)


def test_garbage_behind_the_bat_does_not_become_entries(tmp_path: Path) -> None:
    path = images.write_delta(tmp_path / "a.hds", SIZE, {}, cluster_size=CLUSTER)
    set_word(path, 64 + 4 * ENTRIES, 1)
    grow_image(path, 2 * SIZE)
    require_clean(path)


def test_the_same_size_changes_nothing(tmp_path: Path) -> None:
    path = images.write_delta(tmp_path / "a.hds", SIZE, {}, cluster_size=CLUSTER)
    before = path.read_bytes()
    assert grow_image(path, SIZE).moved == 0
    assert grow_image(path, SIZE - 1).size == SIZE, "that is rounded up to the same"
    assert path.read_bytes() == before


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [SIZE - CLUSTER, 0, -1, 1 << 70])
def test_impossible_sizes_are_refused_and_nothing_is_changed(
    tmp_path: Path, version: int, size: int
) -> None:
    path = images.write_delta(tmp_path / "a.hds", SIZE, {}, cluster_size=CLUSTER, version=version)
    before = path.read_bytes()
    with pytest.raises(UsageError) as caught:
        grow_image(path, size)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


def test_a_disk_that_ends_inside_a_cluster_continues_with_zeros(tmp_path: Path) -> None:
    size = SIZE - CLUSTER // 2
    last = ENTRIES - 1
    clusters = some_clusters(4, (0, last))  # its second half is not the disk's
    path = images.write_delta(
        tmp_path / "a.hds", size, clusters, cluster_size=CLUSTER, order=(0, last)
    )
    copy = Path(shutil.copy(path, tmp_path / "b.hds"))
    for subject, wanted in ((path, 2 * SIZE), (copy, LARGE)):  # in its place, and moved
        grow_image(subject, wanted)
        assert content_of(subject, 2 * SIZE)[1] == flat(size, clusters) + bytes(2 * SIZE - size)
        require_clean(subject)


def make_chain(directory: Path, size: int, lower: dict[int, bytes], top: dict[int, bytes]) -> Path:
    images.write_delta(directory / "base.hds", size, lower, cluster_size=CLUSTER)
    images.write_delta(
        directory / "top.hds", size, top, cluster_size=CLUSTER, order=tuple(sorted(top))
    )
    rows = [
        (images.guid(1), "Compressed", "base.hds"),
        (images.TOP_GUID, "Compressed", "top.hds"),
    ]
    return images.write_descriptor(directory, size, rows, cluster_size=CLUSTER)


def test_only_the_top_of_a_chain_grows_and_the_descriptor_with_it(tmp_path: Path) -> None:
    lower, top = some_clusters(5, (0, 1, 39)), some_clusters(6, (1, 2, 3, 4))
    descriptor = make_chain(tmp_path, SIZE, lower, top)
    descriptor.write_bytes(descriptor.read_bytes().replace(b"<Disk_P", b"<!-- mine --><Disk_P"))
    os.chmod(descriptor, 0o640)
    base = (tmp_path / "base.hds").read_bytes()
    grown = grow_image(tmp_path, LARGE)
    assert (grown.path, grown.moved) == (str(tmp_path), 3)
    assert (tmp_path / "base.hds").read_bytes() == base
    document = descriptor.read_bytes()
    said = parse_descriptor(document)
    assert (said.disk_size_sectors, said.storages[0].end_sectors) == (LARGE // 512, LARGE // 512)
    assert said.cylinders * said.heads * said.sectors <= LARGE // 512
    assert b"<!-- mine -->" in document
    assert descriptor.stat().st_mode & 0o777 == 0o640
    assert not (tmp_path / "DiskDescriptor.xml.resize").exists()
    require_clean(tmp_path)
    assert content_of(tmp_path, 2 * SIZE)[1] == flat(SIZE, lower, top) + bytes(SIZE)


def test_a_lower_delta_does_not_show_more_than_the_disk_had(tmp_path: Path) -> None:
    size = SIZE - CLUSTER // 2
    lower = some_clusters(7, (0, ENTRIES - 1))
    make_chain(tmp_path, size, lower, {})
    grow_image(tmp_path, 2 * SIZE)
    assert content_of(tmp_path, 2 * SIZE)[1] == flat(size, lower) + bytes(2 * SIZE - size)
    require_clean(tmp_path)


def test_entries_of_a_lower_delta_behind_its_own_end_are_none(tmp_path: Path) -> None:
    """Of a disk that was shrunk: libploop leaves the table as long as it was."""
    lower = some_clusters(8, (0, ENTRIES - 1))
    make_chain(tmp_path, SIZE, lower, {})
    for name in ("base.hds", "top.hds"):
        set_word(tmp_path / name, 36, (SIZE - CLUSTER) // 512)
    set_word(tmp_path / "top.hds", 32, ENTRIES - 1)
    descriptor = tmp_path / "DiskDescriptor.xml"
    text = descriptor.read_text().replace(str(SIZE // 512), str((SIZE - CLUSTER) // 512))
    descriptor.write_text(text)
    grow_image(tmp_path, SIZE)
    assert content_of(tmp_path, SIZE)[1] == flat(SIZE, {0: lower[0]})


def test_a_raw_file_grows_by_zeros(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"\x5a" * 4096)
    assert grow_image(path, 10_000).size == 10_240
    assert path.read_bytes() == b"\x5a" * 4096 + bytes(10_240 - 4096)
    with pytest.raises(UsageError):
        grow_image(path, 512)
    with pytest.raises(UsageError):
        grow_image(path, 1 << 64)


def test_a_raw_disk_with_a_descriptor_grows_by_whole_clusters(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(b"\x5a" * SIZE)
    rows = [(images.TOP_GUID, "Plain", "disk.raw")]
    descriptor = images.write_descriptor(tmp_path, SIZE, rows, cluster_size=CLUSTER)
    assert grow_image(tmp_path, SIZE + 512).size == SIZE + CLUSTER
    assert (tmp_path / "disk.raw").stat().st_size == SIZE + CLUSTER
    assert parse_descriptor(descriptor.read_bytes()).disk_size_sectors == (SIZE + CLUSTER) // 512


def test_a_raw_base_stays_as_it_is(tmp_path: Path) -> None:
    raw = random.Random(9).randbytes(SIZE - 512)
    (tmp_path / "base.raw").write_bytes(raw)
    images.write_delta(tmp_path / "top.hds", SIZE - 512, {}, cluster_size=CLUSTER)
    rows = [(images.guid(1), "Plain", "base.raw"), (images.TOP_GUID, "Compressed", "top.hds")]
    images.write_descriptor(tmp_path, SIZE - 512, rows, cluster_size=CLUSTER)
    grow_image(tmp_path, LARGE)
    assert (tmp_path / "base.raw").read_bytes() == raw
    assert content_of(tmp_path, 2 * SIZE)[1] == raw + bytes(2 * SIZE - len(raw))


# -- what keeps it from growing ---------------------------------------------------------------


def test_an_image_in_use_is_refused(tmp_path: Path) -> None:
    path = images.write_delta(tmp_path / "a.hds", SIZE, {}, cluster_size=CLUSTER)
    holder = File.open(path, read_only=False, engine=None)
    lock_image(holder.fd, path=str(path), writer=True)
    try:
        with pytest.raises(LockedError):
            grow_image(path, LARGE)
    finally:
        holder.close()


def test_an_unclean_image_grows_if_it_is_sound(tmp_path: Path) -> None:
    clusters = some_clusters(10, (0, 1))
    path = images.write_delta(tmp_path / "a.hds", SIZE, clusters, cluster_size=CLUSTER)
    set_word(path, 44, IN_USE)
    damaged = Path(shutil.copy(path, tmp_path / "b.hds"))
    grow_image(path, LARGE)
    require_clean(path)
    set_entry(damaged, 5, 99)
    before = damaged.read_bytes()
    with pytest.raises(UncleanImageError):
        grow_image(damaged, LARGE)
    assert damaged.read_bytes() == before


def test_another_disks_descriptor_is_refused(tmp_path: Path) -> None:
    descriptor = make_chain(tmp_path, SIZE, {}, {})
    text = descriptor.read_text()
    descriptor.write_text(text.replace(str(SIZE // 512), str(SIZE // 1024)))
    with pytest.raises(DescriptorError, match="Disk_size"):
        grow_image(tmp_path, LARGE)


def test_a_top_that_the_descriptor_does_not_name_is_refused(tmp_path: Path) -> None:
    make_chain(tmp_path, SIZE, {}, {})
    copy = str(tmp_path / "copy.hds")
    shutil.copy(tmp_path / "top.hds", copy)
    with pytest.raises(UsageError, match="keep-descriptor"):
        grow_image(tmp_path, LARGE, substitutes={images.TOP_GUID: copy})
    assert header_of(tmp_path / "top.hds").size == SIZE


WAYS_TO_HAVE_NO_ROOM = {
    "for the moved clusters": Fault(op="fallocate", nth=2, error=errno.ENOSPC),
    "for the longer table": Fault(op="fallocate", error=errno.ENOSPC),
    "for the copies": Fault(op="write", path="*.hds", nth=3, error=errno.ENOSPC),
    "when the copies are synced": Fault(op="fsync", path="*.hds", nth=2, error=errno.ENOSPC),
    "for the zeros": Fault(op="write", path="*.hds", nth=6, error=errno.EDQUOT),
    "for the descriptor": Fault(op="write", path="*.resize", error=errno.ENOSPC),
}


@pytest.mark.parametrize("way", WAYS_TO_HAVE_NO_ROOM)
def test_without_room_the_image_is_closed_sound_and_grows_later(tmp_path: Path, way: str) -> None:
    top = some_clusters(11, (0, 1, 2, 5))
    make_chain(tmp_path, SIZE, {}, top)
    layer = FaultyOs(WAYS_TO_HAVE_NO_ROOM[way])
    with pytest.raises(StorageError) as caught:
        grow_image(tmp_path, LARGE, layer=layer)
    assert WAYS_TO_HAVE_NO_ROOM[way].hits == 1
    assert caught.value.errno in (errno.ENOSPC, errno.EDQUOT)
    assert not header_of(tmp_path / "top.hds").unclean
    assert not (tmp_path / "DiskDescriptor.xml.resize").exists()
    assert all(not report.corruptions for report in check_all(tmp_path))
    assert content_of(tmp_path, SIZE) == (SIZE, flat(SIZE, top))
    grow_image(tmp_path, LARGE)
    require_clean(tmp_path)
    assert content_of(tmp_path, SIZE) == (LARGE, flat(SIZE, top))


@pytest.mark.parametrize("nth", range(1, 12))
@pytest.mark.parametrize("op", ["write", "fsync"])
def test_a_storage_that_fails_leaves_a_sound_image_marked_as_in_use(
    tmp_path: Path, op: str, nth: int
) -> None:
    top = some_clusters(12, (0, 1, 2, 5))
    make_chain(tmp_path, SIZE, {}, top)
    fault = Fault(op=op, path="*.hds", nth=nth, count=None, error=errno.EIO)
    failed = False
    try:
        grow_image(tmp_path, LARGE, layer=FaultyOs(fault))
    except PloopError:
        failed = True
    assert failed == bool(fault.hits)
    if failed and (op, nth) != ("write", 1):
        assert header_of(tmp_path / "top.hds").unclean
    size, content = content_of(tmp_path, SIZE)
    assert content == flat(SIZE, top)
    assert size in (SIZE, LARGE)
    assert grow_image(tmp_path, LARGE + CLUSTER).size == LARGE + CLUSTER
    require_clean(tmp_path)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    make_chain(tmp_path, SIZE, {}, {})
    layer = FaultyOs(Fault(op="open", path="*.resize", error=errno.EROFS))
    with pytest.raises(ReadOnlyError, match="DiskDescriptor"):
        grow_image(tmp_path, LARGE, layer=layer)
    assert not header_of(tmp_path / "top.hds").unclean
