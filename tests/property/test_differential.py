"""Random operations on volumes against a plain byte model, and in the end against QEMU.

Every format version, cluster size and kind of chain; alone through the fast path, and in batches of
operations that run at the same time.  The number of operations is printed at the end.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import trio

from ploopd.fileio.policy import CacheMode
from ploopd.storage.check import check_image
from tests.support import images, oracles
from tests.support.volumes import Disk, open_disk, running_engine

KIB = 1024
CLUSTERS = 24
SINGLE_OPERATIONS = 7_400
BATCHES = 130
BATCH = 8
REOPEN = 900
SEED = int(os.environ.get("PLOOPD_TEST_SEED", "20261122"))
MINIMUM = 200_000


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is made and run."""

    version: int
    cluster_size: int
    layout: str

    def __str__(self) -> str:
        return f"v{self.version}-{self.cluster_size // KIB}k-{self.layout}"


CASES = [
    Case(version=version, cluster_size=size * KIB, layout=layout)
    for version, size, layout in product(
        (1, 2), (32, 64, 256, 1024), ("single", "chain", "raw-base")
    )
]


class Counter:
    """Operations done in this run of the tests."""

    operations = 0


@dataclass
class Subject:
    """A disk on files, and what it must hold."""

    path: Path
    top: Path
    layers: list[oracles.Layer]
    model: bytearray


def make(case: Case, directory: Path, generator: random.Random) -> Subject:
    """The files of a case; lower layers are shorter than the disk, and the disk may end inside a
    cluster when it is alone."""
    size = case.cluster_size
    disk = CLUSTERS * size
    model = bytearray(disk)
    layers: list[oracles.Layer] = []
    entries: list[tuple[str, str, str]] = []

    def overlay(data: bytes, offset: int) -> None:
        model[offset : offset + len(data)] = data

    def add_delta(name: str, length: int, filled: list[int]) -> Path:
        clusters = {index: generator.randbytes(size) for index in filled}
        for index, data in clusters.items():
            overlay(data, index * size)
        path = images.write_delta(
            directory / name, length, clusters, cluster_size=size, version=case.version
        )
        layers.append(("parallels", path))
        entries.append((images.guid(len(entries)), "Compressed", name))
        return path

    if case.layout == "single":
        disk -= 5 * 512
        del model[disk:]
        top = add_delta("disk.hds", disk, [])
        return Subject(top, top, layers, model)
    if case.layout == "raw-base":
        base = directory / "base.raw"
        base.write_bytes(generator.randbytes(CLUSTERS * size * 3 // 4 + 3 * 512))
        overlay(base.read_bytes(), 0)
        layers.append(("raw", base))
        entries.append((images.guid(0), "Plain", base.name))
    else:
        add_delta("base.hds", (CLUSTERS - 5) * size, generator.sample(range(CLUSTERS - 5), 9))
        add_delta("middle.hds", disk, generator.sample(range(CLUSTERS), 6))
    top = add_delta("top.hds", disk, generator.sample(range(CLUSTERS), 3))
    path = images.write_descriptor(
        directory, disk, entries, cluster_size=size, top_guid=entries[-1][0]
    )
    return Subject(path, top, layers, model)


def some_range(generator: random.Random, subject: Subject, case: Case) -> tuple[int, int]:
    """Mostly small, sometimes around a cluster border, sometimes several clusters."""
    sectors = len(subject.model) // 512
    in_cluster = case.cluster_size // 512
    kind = generator.random()
    if kind < 0.75:
        length = generator.choice((1, 2, 7, 8, 16))
    elif kind < 0.97:
        length = generator.randint(1, 96)
    else:
        length = generator.randint(1, in_cluster * 3 // (1 if case.cluster_size < 1 << 20 else 2))
    start = generator.randrange(sectors)
    if kind > 0.9:
        start = start // in_cluster * in_cluster
        length = generator.choice((length, in_cluster, in_cluster))
    length = min(length, sectors - start)
    return start * 512, length * 512


class Player:
    """Plays random operations on a disk and checks every read against the model."""

    def __init__(self, case: Case, subject: Subject, generator: random.Random) -> None:
        self.case = case
        self.subject = subject
        self.random = generator
        self.data = generator.randbytes(5 << 20)

    def payload(self, length: int) -> bytes:
        if self.random.random() < 0.05:
            return bytes(length)
        start = self.random.randrange(len(self.data) - length)
        return self.data[start : start + length]

    async def one(self, disk: Disk, offset: int, length: int) -> None:
        model = self.subject.model
        kind = self.random.random()
        if kind < 0.42:
            data = self.payload(length)
            await disk.write(offset, data, fua=kind < 0.005)
            model[offset : offset + length] = data
        elif kind < 0.88:
            found = await disk.read(offset, length)
            assert found == model[offset : offset + length], f"read {offset}+{length}"
        elif kind < 0.92:
            await disk.zero(offset, length, unmap=kind < 0.90)
            model[offset : offset + length] = bytes(length)
        elif kind < 0.975:
            await disk.discard(offset, length)
            model[offset : offset + length] = bytes(length)
        else:
            await disk.flush()
        Counter.operations += 1

    async def alone(self, disk: Disk, count: int) -> None:
        for _ in range(count):
            await self.one(disk, *some_range(self.random, self.subject, self.case))

    async def together(self, disk: Disk, batches: int) -> None:
        """Operations on ranges that do not overlap, all at the same time, in the same clusters."""
        for _ in range(batches):
            chosen: list[tuple[int, int]] = []
            while len(chosen) < BATCH:
                offset, length = some_range(self.random, self.subject, self.case)
                if chosen and self.random.random() < 0.7:
                    near = chosen[-1][0] // self.case.cluster_size * self.case.cluster_size
                    offset = near + offset % self.case.cluster_size
                    length = min(length, len(self.subject.model) - offset)
                if length > 0 and all(
                    offset + length <= at or at + size <= offset for at, size in chosen
                ):
                    chosen.append((offset, length))
            async with trio.open_nursery() as nursery:
                for offset, length in chosen:
                    nursery.start_soon(self.one, disk, offset, length)


async def play(case: Case, subject: Subject, generator: random.Random) -> None:
    player = Player(case, subject, generator)
    async with running_engine() as engine:
        left = SINGLE_OPERATIONS
        while left:
            count = min(left, generator.randint(REOPEN // 2, REOPEN))
            async with open_disk(subject.path, engine, preallocation=4 << 20) as disk:
                await player.alone(disk, count)
            left -= count
        async with open_disk(subject.path, engine, inline=False, io="io_uring") as disk:
            await player.together(disk, BATCHES)
        async with open_disk(subject.path, engine, read_only=True) as disk:
            assert await disk.read(0, disk.size) == subject.model


@pytest.mark.parametrize("case", CASES, ids=str)
def test_volume_behaves_as_bytes(case: Case, shm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = random.Random(f"{SEED} {case}")
    subject = make(case, shm, generator)
    before = {path: oracles.digest(path) for _, path in subject.layers[:-1]}
    trio.run(play, case, subject, generator)
    report = check_image(str(subject.top), repair=None)
    assert report.corruptions == 0, report.details
    for path, digest in before.items():
        assert oracles.digest(path) == digest, "a lower layer was written to"
    expected = shm / "model.raw"
    expected.write_bytes(subject.model)
    through_qemu = oracles.read_through_qemu(subject.layers, shm / "qemu.raw")
    oracles.assert_same_content(through_qemu, expected)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("threads", {}),
        ("auto", {"io": "nowait"}),
        ("auto", {"io": "io_uring"}),
        ("auto", {"cache": CacheMode.NONE}),
    ],
    ids=["threads", "nowait", "io_uring", "direct"],
)
@pytest.mark.parametrize("layout", ["single", "raw-base"])
def test_every_way_of_io(
    tmp_path: Path, layout: str, kind: str, options: dict[str, object]
) -> None:
    """The same on a disk's file system, by the engines that need not be asked for elsewhere."""
    case = Case(version=2, cluster_size=32 * KIB, layout=layout)
    generator = random.Random(f"{SEED} {layout} {kind} {options}")
    subject = make(case, tmp_path, generator)
    player = Player(case, subject, generator)

    async def run() -> None:
        async with running_engine(kind) as engine:
            for _ in range(2):
                async with open_disk(subject.path, engine, **options) as disk:
                    await player.alone(disk, 200)
                    await player.together(disk, 12)
                    used = options.get("io") == "io_uring" or "cache" in options
                    assert disk.in_lane or not used, "nothing has been in the lane"

    trio.run(run)
    expected = tmp_path / "model.raw"
    expected.write_bytes(subject.model)
    through_qemu = oracles.read_through_qemu(subject.layers, tmp_path / "qemu.raw")
    oracles.assert_same_content(through_qemu, expected)


def test_enough_operations_were_done(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {item.name for item in request.session.items}
    everything = all(f"test_volume_behaves_as_bytes[{case}]" in names for case in CASES)
    with capsys.disabled():
        print(f"\n{Counter.operations:,} differential operations, seed {SEED}, 0 differences")
    if everything:
        assert Counter.operations >= MINIMUM
