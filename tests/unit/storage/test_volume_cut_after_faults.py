"""Power cuts after writes that failed: what was flushed, or written with FUA, is still there.

Every write may fail, and may have happened all the same, wholly or in part.  A sector may then hold
either content until it is written again; after a cut it must hold one that it could have had at
the last flush or FUA, or one written since.
"""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from ploopd.errors import StorageError
from ploopd.fileio.crash_log import CrashLog, WriteRecord
from ploopd.fileio.engine import IoEngine
from ploopd.fileio.faults import Fault, FaultyOs
from tests.support.volumes import Disk, open_disk, running_engine
from tests.unit.storage.test_volume_power_cut import CLUSTER, SIZE, chain, single, subsets

STEPS = 50
Make = Callable[[Path], tuple[Path, Path, bytes]]


class Possible:
    """What every sector may hold now, and what after a cut."""

    def __init__(self, content: bytes) -> None:
        self.now = [[content[at : at + 512]] for at in range(0, len(content), 512)]
        self.after_cut = [list(each) for each in self.now]

    async def change(
        self, offset: int, data: bytes, operation: Awaitable[None], *, fua: bool
    ) -> None:
        parts = [((offset + at) // 512, data[at : at + 512]) for at in range(0, len(data), 512)]
        for sector, part in parts:
            self.now[sector].append(part)
            self.after_cut[sector].append(part)
        await operation
        for sector, part in parts:
            self.now[sector] = [part]
            if fua:
                self.after_cut[sector] = [part]

    def flushed(self) -> None:
        self.after_cut = [list(each) for each in self.now]

    def check(self, content: bytes, possible: list[list[bytes]], first: int = 0) -> None:
        for at in range(0, len(content), 512):
            sector = first + at // 512
            assert content[at : at + 512] in possible[sector], f"sector {sector}"


def random_fault(generator: random.Random) -> Fault:
    """One I/O fails; a write may have been done in part, in whole entries and sectors."""
    table = generator.random() < 0.5
    return Fault(
        op=generator.choice(("write", "write", "write", "fallocate", "read")),
        start=0 if table else CLUSTER,
        end=CLUSTER if table else None,
        nth=generator.choice((1, 1, 2)),
        torn=generator.choice((None, 4) if table else (None, 512, 1024, CLUSTER)),
        error=generator.choice((errno.EIO, errno.ENOSPC)),
    )


async def one_step(disk: Disk, possible: Possible, generator: random.Random) -> None:
    if generator.random() < 0.4:
        offset = generator.randrange(SIZE // CLUSTER) * CLUSTER
        length = CLUSTER * generator.choice((1, 1, 2, 3))
    else:
        offset = generator.randrange(SIZE // 512) * 512
        length = generator.choice((1, 8, 8, 64, 100)) * 512
    length = min(length, SIZE - offset)
    fua = generator.random() < 0.3
    kind = generator.random()
    if kind < 0.5:
        data = bytes(length) if kind < 0.1 else generator.randbytes(length)
        await possible.change(offset, data, disk.write(offset, data, fua=fua), fua=fua)
    elif kind < 0.75:
        operation = disk.zero(offset, length, unmap=kind < 0.7, fua=fua)
        await possible.change(offset, bytes(length), operation, fua=fua)
    elif kind < 0.9:
        possible.check(await disk.read(offset, length), possible.now, offset // 512)
    else:
        await disk.flush()
        possible.flushed()


async def cut(
    engine: IoEngine, log: CrashLog, files: tuple[Path, Path], generator: random.Random
) -> bytes:
    """The content of the disk when its top is what a power cut may leave of `log`; `files` are
    the disk and its top."""
    path, top = files
    writes = [record.number for record in log.unsynced if isinstance(record, WriteRecord)]
    torn = {number: generator.randrange(CLUSTER) for number in writes if number % 7 == 0}
    saved = top.read_bytes()
    top.write_bytes(log.state(subsets(log, generator), torn))
    async with open_disk(path, engine) as disk:
        content = await disk.read(0, disk.size)
    top.write_bytes(saved)
    return content


async def run(directory: Path, seed: int, make: Make) -> int:
    """Returns how many faults struck."""
    generator = random.Random(seed)
    work, cuts = directory / "work", directory / "cuts"
    work.mkdir()
    cuts.mkdir()
    path, top, content = make(work)
    cut_path, cut_top, _ = make(cuts)
    layer, possible, hits = FaultyOs(record=True), Possible(content), 0
    async with (
        running_engine() as engine,
        open_disk(
            path,
            engine,
            layer=layer,
            inline=bool(seed % 2),
            preallocation=generator.choice((1, 3)) * CLUSTER,
            close=False,
        ) as disk,
    ):
        log = layer.log(top)
        for _ in range(STEPS):
            layer.clear()
            if generator.random() < 0.35:
                layer.add(random_fault(generator))
            with contextlib.suppress(StorageError):
                await one_step(disk, possible, generator)
            hits += sum(fault.hits for fault in layer.faults)
            after = await cut(engine, log, (cut_path, cut_top), generator)
            possible.check(after, possible.after_cut)
    return hits


@pytest.mark.parametrize("make", [single, chain])
@pytest.mark.parametrize("seed", [10, 16, 19, 30, 33])
def test_a_cut_after_faults_keeps_what_was_made_durable(shm: Path, seed: int, make: Make) -> None:
    assert trio.run(run, shm, seed, make) > 0
