"""What a power cut or a kill leaves of an image that was being grown: one of the old or new size.

The cut comes at every system call that changes a file; of the delta it leaves everything that was
synced and any subset of the rest, some of it torn.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import trio

from image_format import parse_descriptor
from ploopd.errors import PloopError
from ploopd.fileio.crash_log import Record
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.storage.check import check_all
from ploopd.storage.grow import grow_image
from tests.support import images
from tests.support.volumes import open_disk, running_engine

CLUSTER = 32 << 10
SIZE = 40 * CLUSTER - CLUSTER // 2
LARGE = 3 * (CLUSTER // 4) * CLUSTER
STATES = 3
CHANGING = ("write", "fallocate", "truncate", "fsync")


def make(directory: Path, version: int) -> bytes:
    """A chain whose top has clusters in the way, holes, and a cluster that the disk's end cuts."""
    generator = random.Random(version)
    content = bytearray(40 * CLUSTER)
    rows = []
    for name, numbers in (("base.hds", (0, 1, 20, 39)), ("top.hds", (1, 2, 3, 4))):
        clusters = {number: generator.randbytes(CLUSTER) for number in numbers}
        images.write_delta(
            directory / name, SIZE, clusters, cluster_size=CLUSTER, version=version, order=numbers
        )
        for number, data in clusters.items():
            content[number * CLUSTER : (number + 1) * CLUSTER] = data
        guid = images.TOP_GUID if name == "top.hds" else images.guid(1)
        rows.append((guid, "Compressed", name))
    with (directory / "top.hds").open("ab") as file:
        file.write(b"\xa5" * (2 * CLUSTER))
    images.write_descriptor(directory, SIZE, rows, cluster_size=CLUSTER)
    return bytes(content[:SIZE])


def cut_at(directory: Path, number: int) -> FaultyOs | None:
    """Grow, and let the power go before changing call `number` of a file; None if it ended."""
    layer = FaultyOs(record=True)
    seen = 0
    strike = layer._strike

    def counting(
        op: str, path: str, offset: int = 0, length: int = 0
    ) -> tuple[int | None, int | None]:
        nonlocal seen
        if op in CHANGING:
            seen += 1
            if seen == number:
                layer.power_cut()
        return strike(op, path, offset, length)

    layer._strike = counting  # type: ignore[method-assign]
    try:
        grow_image(directory, LARGE, layer=layer)
    except PloopError:
        return layer
    return None


def states(layer: FaultyOs, top: Path, generator: random.Random) -> list[bytes]:
    """Everything arrived (a kill), only what was synced, and some mixtures."""
    log = layer.log(top)
    found = [log.state(lambda _: True), log.durable()]
    for _ in range(STATES):
        numbers = [record.number for record in log.unsynced]
        kept = {number for number in numbers if generator.random() < 0.5}
        torn = {number: generator.randrange(CLUSTER) for number in kept if number % 3 == 0}

        def wanted(record: Record, kept: set[int] = kept) -> bool:
            return record.number in kept

        found.append(log.state(wanted, torn))
    return list(dict.fromkeys(found))


async def require_whole(directory: Path, content: bytes) -> int:
    """The disk opens as it is, holds what it held, is larger by zeros or not at all, and can be
    written to and closed; then everything about it is in order.  Returns its size."""
    async with running_engine() as engine:
        async with open_disk(directory, engine, read_only=True) as disk:
            before = disk.size
            assert await disk.read(0, SIZE) == content
        async with open_disk(directory, engine) as disk:
            assert disk.size == before
            assert disk.size in (SIZE, LARGE)
            end = min(disk.size, 60 * CLUSTER)
            assert await disk.read(SIZE, end - SIZE) == bytes(end - SIZE)
            await disk.write(disk.size - 512, b"\x77" * 512)
    for report in check_all(directory):
        assert report.corruptions == 0, report.details
    assert not (directory / "DiskDescriptor.xml.resize").exists()
    said = parse_descriptor((directory / "DiskDescriptor.xml").read_bytes())
    assert said.disk_size_sectors == said.storages[0].end_sectors == before // 512
    return before


@pytest.mark.parametrize("version", [1, 2])
def test_every_cut_leaves_the_old_or_the_new_size(shm: Path, version: int) -> None:
    generator = random.Random(version)
    sizes: list[set[int]] = []
    for number in range(1, 200):
        work = shm / f"work{number}"
        work.mkdir()
        content = make(work, version)
        layer = cut_at(work, number)
        if layer is None:
            break
        sizes.append(set())
        for state in states(layer, work / "top.hds", generator):
            cut = shm / "cut"
            shutil.copytree(work, cut)
            (cut / "top.hds").write_bytes(state)
            sizes[-1].add(trio.run(require_whole, cut, content))
            grow_image(cut, LARGE)
            grow_image(cut, LARGE + CLUSTER)
            shutil.rmtree(cut)
        shutil.rmtree(work)
    assert len(sizes) > 12
    assert sizes[0] == {SIZE}
    assert sizes[-1] == {LARGE}
    turns = [index for index, found in enumerate(sizes) if len(found) > 1]
    assert len(turns) == 1, "one single sync decides about the size"


def test_a_document_that_says_something_else_does_not_excuse_the_old_one(tmp_path: Path) -> None:
    """Only what growing the image has left beside the descriptor is taken for that."""
    make(tmp_path, 2)
    descriptor = tmp_path / "DiskDescriptor.xml"
    old = descriptor.read_bytes()
    grow_image(tmp_path, LARGE)
    descriptor.rename(tmp_path / "DiskDescriptor.xml.resize")
    descriptor.write_bytes(old.replace(b"base.hds", b"top2.hds"))
    with pytest.raises(PloopError):
        grow_image(tmp_path, 2 * LARGE)


def test_what_was_interrupted_is_finished_by_the_next_growth(tmp_path: Path) -> None:
    make(tmp_path, 2)
    descriptor = tmp_path / "DiskDescriptor.xml"
    old = descriptor.read_bytes()
    grow_image(tmp_path, LARGE)
    descriptor.rename(tmp_path / "DiskDescriptor.xml.resize")
    descriptor.write_bytes(old)
    assert grow_image(tmp_path, LARGE).previous == LARGE
    assert parse_descriptor(descriptor.read_bytes()).disk_size_sectors == LARGE // 512
    assert not (tmp_path / "DiskDescriptor.xml.resize").exists()


def test_a_lock_is_held_while_an_image_grows(tmp_path: Path) -> None:
    """Two at once: the second is refused, and the first is not disturbed."""
    make(tmp_path, 2)
    layer = FaultyOs(Fault(op="fallocate", delay=1.0))
    refused: list[PloopError] = []

    def second(_seconds: float) -> None:
        with pytest.raises(PloopError) as caught:
            grow_image(tmp_path, LARGE)
        refused.append(caught.value)

    layer._sleep = second
    assert grow_image(tmp_path, LARGE, layer=layer).size == LARGE
    assert len(refused) == 1
