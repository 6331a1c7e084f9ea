"""What a power cut leaves of an image opens, checks clean and holds everything that was flushed.

All writes to the top file are recorded; a state is the file with everything that was synced and any
subset of the rest, some of it torn.  Every sector must hold what it held at the last flush, or
something written to it since.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from ploopd.fileio.crash_log import CrashLog, Record, WriteRecord
from ploopd.fileio.engine import IoEngine
from ploopd.fileio.faults import FaultyOs
from ploopd.storage.check import check_image
from tests.support import images
from tests.support.volumes import Disk, open_disk, running_engine

CLUSTER = 32 << 10
CLUSTERS = 10
SIZE = CLUSTER * CLUSTERS
STEPS = 60
STATES_PER_CUT = 3


class Promises:
    """What every sector may hold after a cut."""

    def __init__(self, content: bytes) -> None:
        self.flushed = bytearray(content)
        self.current = bytearray(content)
        self.since: dict[int, list[bytes]] = {}

    def changed(self, offset: int, data: bytes) -> None:
        self.current[offset : offset + len(data)] = data
        for at in range(0, len(data), 512):
            self.since.setdefault((offset + at) // 512, []).append(data[at : at + 512])

    def was_flushed(self) -> None:
        self.flushed[:] = self.current
        self.since.clear()

    def check(self, content: bytes) -> None:
        assert len(content) == len(self.flushed)
        for sector in range(len(content) // 512):
            found = content[sector * 512 : sector * 512 + 512]
            if found != self.flushed[sector * 512 : sector * 512 + 512]:
                assert found in self.since.get(sector, ()), f"sector {sector} was lost or invented"


def subsets(log: CrashLog, generator: random.Random) -> Callable[[Record], bool]:
    """One way to lose unsynced changes: none, all, a prefix's end, or any of them."""
    numbers = [record.number for record in log.unsynced]
    kind = generator.randrange(5)
    if kind == 0 or not numbers:
        chosen = set()
    elif kind == 1:
        chosen = set(numbers[: generator.randrange(len(numbers) + 1)])
    elif kind == 2:
        # Metadata outrun data: only small writes and sizes arrive.
        small = (r for r in log.unsynced if not isinstance(r, WriteRecord) or len(r.data) <= 64)
        chosen = {record.number for record in small}
    elif kind == 3:
        chosen = {r.number for r in log.unsynced if isinstance(r, WriteRecord) and len(r.data) > 64}
    else:
        chosen = {number for number in numbers if generator.random() < 0.5}
    return lambda record: record.number in chosen


async def check_state(engine: IoEngine, path: Path, state: bytes, promises: Promises) -> None:
    top = path if path.suffix == ".hds" else path.parent / "top.hds"
    saved = top.read_bytes()
    top.write_bytes(state)
    try:
        async with open_disk(path, engine) as disk:
            promises.check(await disk.read(0, disk.size))
        report = check_image(str(top), repair=None)
        assert report.corruptions == 0, report.details
    finally:
        top.write_bytes(saved)


def add_holes(path: Path) -> None:
    """Clusters that no entry names, full of somebody's old data."""
    with path.open("ab") as file:
        file.write(b"\xa5" * (4 * CLUSTER))


def single(directory: Path) -> tuple[Path, Path, bytes]:
    path = images.write_delta(directory / "disk.hds", SIZE, {}, cluster_size=CLUSTER)
    add_holes(path)
    return path, path, bytes(SIZE)


def chain(directory: Path) -> tuple[Path, Path, bytes]:
    generator = random.Random(5)
    content = bytearray(SIZE)
    base = {index: generator.randbytes(CLUSTER) for index in (0, 1, 4, 5, 9)}
    for index, data in base.items():
        content[index * CLUSTER : (index + 1) * CLUSTER] = data
    images.write_delta(directory / "base.hds", SIZE, base, cluster_size=CLUSTER)
    top = images.write_delta(directory / "top.hds", SIZE, {}, cluster_size=CLUSTER)
    entries = [
        (images.guid(0), "Compressed", "base.hds"),
        (images.guid(1), "Compressed", "top.hds"),
    ]
    path = images.write_descriptor(
        directory, SIZE, entries, cluster_size=CLUSTER, top_guid=entries[-1][0]
    )
    return path, top, bytes(content)


async def one_step(disk: Disk, promises: Promises, generator: random.Random) -> None:
    sectors = SIZE // 512
    length = generator.choice((1, 8, 8, 64, 100)) * 512
    offset = generator.randrange(sectors - length // 512) * 512
    if generator.random() < 0.3:
        offset, length = offset // CLUSTER * CLUSTER, CLUSTER
    kind = generator.random()
    if kind < 0.55:
        data = generator.randbytes(length)
        promises.changed(offset, data)
        await disk.write(offset, data)
    elif kind < 0.65:
        promises.changed(offset, bytes(length))
        await disk.zero(offset, length)
    elif kind < 0.85:
        promises.changed(offset, bytes(length))
        await disk.discard(offset, length)
    else:
        await disk.flush()
        promises.was_flushed()


async def run(directory: Path, seed: int, make: Callable[[Path], tuple[Path, Path, bytes]]) -> int:
    generator = random.Random(seed)
    work, cuts = directory / "work", directory / "cuts"
    work.mkdir(parents=True)
    cuts.mkdir()
    path, top, content = make(work)
    cut_path, _, _ = make(cuts)
    layer = FaultyOs(record=True)
    promises = Promises(content)
    states = 0
    async with running_engine() as engine:
        async with open_disk(
            path,
            engine,
            layer=layer,
            inline=bool(seed % 2),
            preallocation=3 * CLUSTER,
            close=bool(seed % 3),
        ) as disk:
            log = layer.log(top)
            for _ in range(STEPS):
                await one_step(disk, promises, generator)
                for _ in range(STATES_PER_CUT):
                    records = [r.number for r in log.unsynced if isinstance(r, WriteRecord)]
                    torn = {n: generator.randrange(CLUSTER) for n in records if n % 7 == 0}
                    state = log.state(subsets(log, generator), torn)
                    await check_state(engine, cut_path, state, promises)
                    states += 1
        for _ in range(STATES_PER_CUT):
            state = log.state(subsets(log, generator))
            await check_state(engine, cut_path, state, promises)
            states += 1
    return states


@pytest.mark.parametrize("make", [single, chain])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_cut_keeps_what_was_flushed(
    shm: Path, seed: int, make: Callable[[Path], tuple[Path, Path, bytes]]
) -> None:
    assert trio.run(run, shm, seed, make) > STEPS


@pytest.mark.parametrize("make", [single, chain])
def test_a_cut_in_the_middle_of_concurrent_writes(
    shm: Path, make: Callable[[Path], tuple[Path, Path, bytes]]
) -> None:
    """Cuts while allocations and copies are under way, wherever the scheduler left them."""

    async def run_concurrently() -> None:
        generator = random.Random(7)
        work, cuts = shm / "work", shm / "cuts"
        work.mkdir()
        cuts.mkdir()
        path, top, content = make(work)
        cut_path, _, _ = make(cuts)
        layer = FaultyOs(record=True)
        promises = Promises(content)
        async with (
            running_engine() as engine,
            open_disk(path, engine, layer=layer, inline=False, preallocation=2 * CLUSTER) as disk,
        ):
            log = layer.log(top)
            for _ in range(8):
                async with trio.open_nursery() as nursery:
                    for cluster in generator.sample(range(CLUSTERS), 5):
                        data = generator.randbytes(4096)
                        offset = cluster * CLUSTER + generator.randrange(7) * 4096
                        promises.changed(offset, data)
                        nursery.start_soon(disk.write, offset, data)
                    for _ in range(4):
                        await trio.sleep(0.0004)
                        state = log.state(subsets(log, generator))
                        await check_state(engine, cut_path, state, promises)
                await disk.flush()
                promises.was_flushed()

    trio.run(run_concurrently)
