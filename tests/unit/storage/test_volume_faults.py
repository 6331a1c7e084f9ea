"""Every single I/O of a workload fails once: the error is reported, the metadata stay sound."""

from __future__ import annotations

import errno
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from ploopd.errors import StorageError
from ploopd.fileio.engine import IoEngine
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.storage.check import check_image
from tests.support import images, oracles
from tests.support.volumes import Disk, open_disk, running_engine

CLUSTER = 32 << 10
CLUSTERS = 8
SIZE = CLUSTER * CLUSTERS
OPERATIONS = ("write", "sync", "fallocate", "read")
HEADER = slice(44, 48)


class Script:
    """A fixed workload that knows, sector by sector, what may be on the disk."""

    def __init__(self, content: bytes) -> None:
        self.maybe = {at: [content[at : at + 512]] for at in range(0, len(content), 512)}
        self.errors: list[StorageError] = []

    async def change(self, offset: int, data: bytes, operation: Awaitable[None]) -> None:
        failed = await self.attempt(operation)
        for at in range(0, len(data), 512):
            known = self.maybe[offset + at]
            if not failed:
                known.clear()
            known.append(data[at : at + 512])

    async def attempt(self, operation: Awaitable[None]) -> bool:
        try:
            await operation
        except StorageError as error:
            self.errors.append(error)
            return True
        return False

    async def run(self, disk: Disk) -> None:
        generator = random.Random(11)

        async def write(offset: int, length: int, *, fua: bool = False) -> None:
            data = generator.randbytes(length)
            await self.change(offset, data, disk.write(offset, data, fua=fua))

        await write(0, 4096)
        await write(4096, 4096)
        await write(2 * CLUSTER + 512, 1024, fua=True)
        await write(3 * CLUSTER - 1024, CLUSTER + 2048)
        await self.attempt(disk.flush())
        await self.change(0, bytes(CLUSTER), disk.discard(0, CLUSTER))
        await write(5 * CLUSTER, CLUSTER)
        await self.change(CLUSTER, bytes(2048), disk.zero(CLUSTER, 2048))
        await self.change(6 * CLUSTER, bytes(CLUSTER), disk.zero(6 * CLUSTER, CLUSTER))
        await self.attempt(disk.flush())
        await write(0, 512)
        await write(7 * CLUSTER + 4096, 4096)
        await write(6 * CLUSTER, 4096)
        await self.change(3 * CLUSTER, bytes(CLUSTER), disk.discard(3 * CLUSTER, CLUSTER))
        await self.attempt(disk.flush())
        await write(3 * CLUSTER, 2 * CLUSTER)

    def check(self, content: bytes) -> None:
        for at, known in self.maybe.items():
            assert content[at : at + 512] in known, f"sector {at // 512}"


def single(directory: Path) -> tuple[Path, Path, bytes]:
    path = images.write_delta(directory / "disk.hds", SIZE, {}, cluster_size=CLUSTER)
    return path, path, bytes(SIZE)


def chain(directory: Path) -> tuple[Path, Path, bytes]:
    generator = random.Random(5)
    content = bytearray(SIZE)
    base = {index: generator.randbytes(CLUSTER) for index in (0, 2, 3, 6, 7)}
    for index, data in base.items():
        content[index * CLUSTER : (index + 1) * CLUSTER] = data
    images.write_delta(directory / "base.hds", SIZE, base, cluster_size=CLUSTER)
    top = images.write_delta(directory / "top.hds", SIZE, {}, cluster_size=CLUSTER)
    names = [(images.guid(0), "Compressed", "base.hds"), (images.guid(1), "Compressed", "top.hds")]
    path = images.write_descriptor(
        directory, SIZE, names, cluster_size=CLUSTER, top_guid=names[-1][0]
    )
    return path, top, bytes(content)


async def fail_once(
    engine: IoEngine,
    directory: Path,
    make: Callable[[Path], tuple[Path, Path, bytes]],
    fault: Fault,
    *,
    inline: bool,
) -> int:
    """Run the script with one fault; returns how often it struck."""
    path, top, content = make(directory)
    script = Script(content)
    layer = FaultyOs()
    closing: StorageError | None = None
    try:
        async with open_disk(
            path, engine, layer=layer, inline=inline, preallocation=3 * CLUSTER
        ) as disk:
            layer.add(fault)
            await script.run(disk)
            struck, reported = fault.hits, len(script.errors)
    except* StorageError as group:
        closing = group.exceptions[0] if isinstance(group.exceptions[0], StorageError) else None
        assert closing is not None
    layer.clear()
    for error in script.errors:
        assert error.errno == fault.error
    # Space that is short, and a hole for which there is no room, are made up for.
    if struck and not (fault.op == "fallocate" and fault.error == errno.ENOSPC):
        assert reported, "the error was not reported"
    if closing is not None:
        assert top.read_bytes()[HEADER] == b"Ynot", "an image with an error was marked as clean"
    async with open_disk(path, engine) as disk:
        script.check(await disk.read(0, disk.size))
        await disk.write(CLUSTER + 4096, b"\x11" * 512)
        await disk.flush()
    assert check_image(str(top), repair=None).corruptions == 0
    assert top.read_bytes()[HEADER] == bytes(4)
    return fault.hits


@pytest.mark.parametrize("make", [single, chain])
@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EBUSY])
def test_each_io_fails_once(
    shm: Path, make: Callable[[Path], tuple[Path, Path, bytes]], op: str, number: int
) -> None:
    async def run() -> int:
        nth = 0
        async with running_engine() as engine:
            while True:
                nth += 1
                fault = Fault(op=op, nth=nth, error=number, path="*.hds")
                if not await fail_once(engine, shm, make, fault, inline=bool(nth % 2)):
                    return nth - 1

    struck = trio.run(run)
    assert struck > 2 or op == "read"


@pytest.mark.parametrize("torn", [0, 512, 4096])
def test_each_write_is_torn_once(shm: Path, torn: int) -> None:
    async def run() -> None:
        nth = 0
        async with running_engine() as engine:
            while True:
                nth += 1
                fault = Fault(op="write", nth=nth, torn=torn, error=errno.EIO, path="*.hds")
                if not await fail_once(engine, shm, single, fault, inline=False):
                    return

    trio.run(run)


def test_a_failed_sync_is_never_forgotten(shm: Path) -> None:
    """After a failed fsync the page cache lies: no later flush may succeed."""
    path, top, _ = single(shm)

    async def run() -> None:
        layer = FaultyOs()
        async with (
            running_engine() as engine,
            open_disk(path, engine, layer=layer, close=False) as disk,
        ):
            await disk.write(0, b"\x01" * 512)
            layer.add(Fault(op="fdatasync", error=errno.EIO))
            for _ in range(3):
                with pytest.raises(StorageError) as caught:
                    await disk.flush()
                assert caught.value.errno == errno.EIO
            with pytest.raises(StorageError):
                await disk.write(0, b"\x02" * 512, fua=True)
            assert await disk.read(0, 512) == b"\x02" * 512
            with pytest.raises(StorageError):
                await disk.volume.close()

    trio.run(run)
    assert top.read_bytes()[HEADER] == b"Ynot"


@pytest.mark.parametrize("number", [errno.EIO, errno.EOPNOTSUPP, errno.ENOSPC])
def test_a_hole_that_the_storage_fails_to_punch_is_reported(shm: Path, number: int) -> None:
    """Its error may be that of an older write; one that only says "no holes" is made up for."""
    path, top, _ = single(shm)

    async def run() -> None:
        layer = FaultyOs()
        async with running_engine() as engine, open_disk(path, engine, layer=layer) as disk:
            await disk.write(0, b"\x01" * CLUSTER)
            await disk.flush()
            layer.add(Fault(op="fallocate", count=1, error=number))
            if number == errno.EIO:
                with pytest.raises(StorageError, match="EIO"):
                    await disk.discard(0, CLUSTER)
            else:
                await disk.discard(0, CLUSTER)
            assert await disk.read(0, CLUSTER) == bytes(CLUSTER)
            await disk.flush()
            for cluster in range(CLUSTERS):
                await disk.write(cluster * CLUSTER, b"\x02" * 512)
                assert await disk.read(cluster * CLUSTER + 512, 512) == bytes(512)

    trio.run(run)
    assert check_image(str(top), repair=None).corruptions == 0


def test_full_disk_goes_on_cluster_by_cluster(shm: Path) -> None:
    path, top, _ = single(shm)

    async def run() -> None:
        layer = FaultyOs(Fault(op="fallocate", nth=1, count=1, error=errno.ENOSPC))
        async with running_engine() as engine, open_disk(path, engine, layer=layer) as disk:
            await disk.write(0, b"\x01" * 512)
            assert top.stat().st_size == 2 * CLUSTER
            layer.add(Fault(op="fallocate", nth=1, count=2, error=errno.ENOSPC))
            with pytest.raises(StorageError) as caught:
                await disk.write(2 * CLUSTER, b"\x02" * CLUSTER * 3)
            assert caught.value.errno == errno.ENOSPC
            assert caught.value.exit_code.name == "NO_SPACE"
            layer.clear()
            await disk.write(2 * CLUSTER, b"\x03" * CLUSTER * 3)
            assert await disk.read(2 * CLUSTER, CLUSTER * 3) == b"\x03" * CLUSTER * 3

    trio.run(run)
    oracles.run("qemu-img", "check", "-q", "-f", "parallels", str(top))


def test_an_entry_that_may_have_been_written_is_settled_by_a_flush(shm: Path) -> None:
    """The BAT write fails but lands: the disk must not show its data after a later flush."""
    path, top, _ = single(shm)

    async def run() -> None:
        layer = FaultyOs()
        async with running_engine() as engine:
            async with open_disk(path, engine, layer=layer, inline=False, close=False) as disk:
                await disk.write(CLUSTER, b"\x01" * 512)
                layer.add(Fault(op="write", start=64, end=68, torn=4, error=errno.EIO))
                with pytest.raises(StorageError):
                    await disk.write(0, b"\x02" * 512)
                assert top.read_bytes()[64:68] != bytes(4)
                assert await disk.read(0, 512) == bytes(512)
                await disk.flush()
                assert top.read_bytes()[64:68] == bytes(4)
            async with open_disk(path, engine) as disk:
                assert await disk.read(0, 512) == bytes(512)

    trio.run(run)


def test_a_cluster_of_a_doubtful_entry_is_not_given_to_another(shm: Path) -> None:
    path, top, _ = single(shm)

    async def run() -> None:
        layer = FaultyOs()
        async with running_engine() as engine:
            async with open_disk(path, engine, layer=layer, close=False) as disk:
                layer.add(Fault(op="write", start=64, end=68, torn=4, error=errno.EIO))
                with pytest.raises(StorageError):
                    await disk.write(0, b"\x02" * 512)
                for cluster in range(1, CLUSTERS):
                    await disk.write(cluster * CLUSTER, b"\x03" * 512)
            assert check_image(str(top), repair=None).corruptions <= 1  # the in-use word
            async with open_disk(path, engine) as disk:
                for cluster in range(1, CLUSTERS):
                    assert await disk.read(cluster * CLUSTER, 512) == b"\x03" * 512

    trio.run(run)
