"""What a volume promises beyond plain bytes: races, order, space, chains, QEMU."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import trio

from ploopd.errors import StorageError
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.storage.check import check_image
from ploopd.storage.device import ExtentKind
from tests.support import images, oracles
from tests.support.volumes import open_disk, running_engine
from tests.unit.storage.small_images import CLUSTER, CLUSTERS, SIZE, chain, empty, table

# Races.


@pytest.mark.parametrize("kind", ["empty", "chain"])
def test_many_writers_into_one_cluster_make_one_allocation(shm: Path, kind: str) -> None:
    path = empty(shm) if kind == "empty" else chain(shm)
    top = path if kind == "empty" else shm / "1.hds"

    async def run() -> None:
        async with (
            running_engine() as engine,
            open_disk(path, engine, inline=False, io="io_uring") as disk,
        ):
            async with trio.open_nursery() as nursery:
                for number in range(32):
                    data = bytes([100 + number]) * 2048
                    nursery.start_soon(disk.write, 3 * CLUSTER + number * 2048, data)
            found = await disk.read(3 * CLUSTER, CLUSTER)
            assert found == b"".join(bytes([100 + n]) * 2048 for n in range(32))
            assert disk.volume.allocated_bytes() == CLUSTER

    trio.run(run)
    assert sum(map(bool, table(top))) == 1
    assert check_image(str(top), repair=None).corruptions == 0


def test_readers_during_a_copy_see_old_or_new(shm: Path) -> None:
    path = chain(shm)

    async def run() -> None:
        async with (
            running_engine() as engine,
            open_disk(path, engine, inline=False, io="io_uring") as disk,
        ):
            seen: set[bytes] = set()

            async def read() -> None:
                found = await disk.read(5 * CLUSTER, CLUSTER)
                assert found[4096:] == b"\x06" * (CLUSTER - 4096)
                seen.add(found[:4096])

            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(read)
                nursery.start_soon(disk.write, 5 * CLUSTER, b"\xff" * 4096)
                for _ in range(10):
                    nursery.start_soon(read)
            assert seen <= {b"\x06" * 4096, b"\xff" * 4096}
            assert await disk.read(5 * CLUSTER, 512) == b"\xff" * 512

    trio.run(run)


def test_discards_and_writes_of_the_same_clusters(shm: Path) -> None:
    """Every cluster ends as one of its writers left it, and no two share a place."""
    path = empty(shm)

    async def run() -> None:
        generator = random.Random(3)
        async with (
            running_engine() as engine,
            open_disk(path, engine, inline=False, io="io_uring") as disk,
        ):
            for _ in range(20):
                async with trio.open_nursery() as nursery:
                    for cluster in generator.sample(range(CLUSTERS), 8):
                        fill = bytes([generator.randrange(1, 256)]) * CLUSTER
                        nursery.start_soon(disk.write, cluster * CLUSTER, fill)
                        nursery.start_soon(disk.discard, cluster * CLUSTER, CLUSTER)
                    nursery.start_soon(disk.discard, 0, SIZE // 2)
                    nursery.start_soon(disk.flush)
                for cluster in range(CLUSTERS):
                    assert len(set(await disk.read(cluster * CLUSTER, CLUSTER))) == 1
            entries = [entry for entry in table(path) if entry]
            assert len(set(entries)) == len(entries)

    trio.run(run)
    assert check_image(str(path), repair=None).corruptions == 0


def test_a_waiting_request_can_be_cancelled_and_then_never_happens(shm: Path) -> None:
    path = chain(shm)

    async def run() -> None:
        layer = FaultyOs()
        async with (
            running_engine() as engine,
            open_disk(path, engine, layer=layer, inline=False) as disk,
        ):
            layer.add(Fault(op="fdatasync", hang=True))
            called: list[StorageError | None] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(disk.write, 0, b"\x01" * 512)
                await trio.sleep(0.05)
                view = memoryview(b"\x02" * 512)
                pending = disk.volume.write(512, view, called.append)
                assert not disk.volume.try_write(512, view)
                assert pending.cancel()
                assert not pending.cancel()
                layer.release()
            assert await disk.read(0, 1024) == b"\x01" * 512 + b"\x01" * 512
            assert called == []

    # Cluster 0 of the base is filled with ones, too: only the cancelled write would show.
    trio.run(run)


# Order and space.


def test_an_allocation_costs_one_write_of_data_and_one_of_its_entry(shm: Path) -> None:
    path = empty(shm)
    sizes: list[int] = []

    class Watching(FaultyOs):
        def pwritev(self, fd, buffers, offset, flags=0, /):  # type: ignore[no-untyped-def]
            sizes.append(sum(map(len, buffers)))
            return super().pwritev(fd, buffers, offset, flags)

    async def run() -> None:
        layer = Watching()
        async with running_engine() as engine, open_disk(path, engine, layer=layer) as disk:
            await disk.write(0, b"\x01" * 4096)
            sizes.clear()
            layer.calls.clear()
            await disk.write(CLUSTER, b"\x01" * 4096)
            assert sizes == [4096, 4]
            assert [op for op, _ in layer.calls] == ["write", "write"]

    trio.run(run)


def test_zeros_are_not_allocated_and_preallocation_is_given_back(shm: Path) -> None:
    path = empty(shm)

    async def run() -> None:
        async with running_engine() as engine, open_disk(path, engine) as disk:
            await disk.write(0, bytes(3 * CLUSTER))
            await disk.zero(4 * CLUSTER, 4 * CLUSTER)
            assert path.stat().st_size == CLUSTER
            await disk.write(7 * CLUSTER, b"\x01" * 512)
            assert path.stat().st_size > 2 * CLUSTER

    trio.run(run)
    assert path.stat().st_size == 2 * CLUSTER
    assert path.read_bytes()[44:48] == bytes(4)


def test_discarded_clusters_are_reused_only_after_a_flush(shm: Path) -> None:
    path = empty(shm)

    async def run() -> None:
        async with (
            running_engine() as engine,
            open_disk(path, engine, preallocation=2 * CLUSTER) as disk,
        ):
            await disk.write(0, b"\x01" * (4 * CLUSTER))
            places = table(path)[:4]
            await disk.discard(0, 4 * CLUSTER)
            assert table(path)[:4] == [0, 0, 0, 0]
            assert disk.volume.allocated_bytes() == 0
            await disk.flush()
            await disk.write(8 * CLUSTER, b"\x02" * CLUSTER)
            await disk.write(9 * CLUSTER, b"\x02" * 512)
            assert set(table(path)[8:10]) <= set(places)
            assert await disk.read(9 * CLUSTER, CLUSTER) == b"\x02" * 512 + bytes(CLUSTER - 512)

    trio.run(run)


def test_a_file_that_ends_inside_a_cluster_is_completed_and_used(shm: Path) -> None:
    path = empty(shm)
    with path.open("ab") as file:
        file.write(b"\xa5" * 1536)

    async def run() -> None:
        async with running_engine() as engine:
            async with open_disk(path, engine):
                pass
            assert path.stat().st_size == CLUSTER
            with path.open("ab") as file:
                file.write(b"\xa5" * 1536)
            async with open_disk(path, engine, preallocation=CLUSTER) as disk:
                for cluster in range(3):
                    await disk.write(cluster * CLUSTER + 4096, b"\x01" * 512)
                    expected = bytes(4096) + b"\x01" * 512 + bytes(CLUSTER - 4608)
                    assert await disk.read(cluster * CLUSTER, CLUSTER) == expected

    trio.run(run)
    assert table(path)[:4] == [1, 2, 3, 0]
    assert path.stat().st_size == 4 * CLUSTER


def test_flushes_share_syncs(shm: Path) -> None:
    path = empty(shm)

    async def run() -> None:
        layer = FaultyOs(Fault(op="fdatasync", count=None, delay=0.02))
        async with running_engine() as engine, open_disk(path, engine, layer=layer) as disk:
            await disk.write(0, b"\x01" * 512)
            layer.calls.clear()
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(disk.flush)
            assert 1 <= [op for op, _ in layer.calls].count("fdatasync") <= 3

    trio.run(run)


# Chains.


def test_discard_never_brings_lower_data_back(shm: Path) -> None:
    path = chain(shm)
    base = oracles.digest(shm / "0.hds")

    async def run() -> None:
        async with running_engine() as engine:
            async with open_disk(path, engine) as disk:
                await disk.write(0, b"\xaa" * CLUSTER)
                await disk.discard(0, 3 * CLUSTER)
                await disk.zero(4 * CLUSTER + 512, 1024, unmap=True)
                await disk.discard(6 * CLUSTER - 512, CLUSTER + 1024)
            async with open_disk(path, engine, read_only=True) as disk:
                assert await disk.read(0, 3 * CLUSTER) == bytes(3 * CLUSTER)
                assert await disk.read(3 * CLUSTER, 512) == b"\x04" * 512
                found = await disk.read(4 * CLUSTER, 2048)
                assert found == b"\x05" * 512 + bytes(1024) + b"\x05" * 512
                found = await disk.read(6 * CLUSTER - 1024, CLUSTER + 2048)
                assert found == b"\x06" * 512 + bytes(CLUSTER + 1024) + b"\x08" * 512

    trio.run(run)
    assert oracles.digest(shm / "0.hds") == base


@pytest.mark.parametrize("version", [1, 2])
def test_128_deltas(shm: Path, version: int) -> None:
    path = chain(shm, 128, version=version)
    for number in range(1, 127):
        data = {number % CLUSTERS: bytes([number]) * CLUSTER}
        images.write_delta(shm / f"{number}.hds", SIZE, data, cluster_size=CLUSTER, version=version)

    async def run() -> None:
        async with running_engine() as engine, open_disk(path, engine) as disk:
            assert len(disk.volume.layers) == 128
            for cluster in range(CLUSTERS):
                newest = max(n for n in range(1, 127) if n % CLUSTERS == cluster)
                assert await disk.read(cluster * CLUSTER, 512) == bytes([newest]) * 512
            extent = next(disk.volume.extents(0, 512))
            assert extent.path == str(shm / "112.hds")
            assert extent.depth == 127 - 112
            await disk.write(0, b"\xee" * 512)
            assert await disk.read(0, 1024) == b"\xee" * 512 + bytes([112]) * 512

    trio.run(run)


def test_extents_say_where_the_bytes_are(shm: Path) -> None:
    path = chain(shm)

    async def run() -> None:
        async with running_engine() as engine, open_disk(path, engine) as disk:
            await disk.write(2 * CLUSTER, b"\xaa" * CLUSTER)
            extents = list(disk.volume.extents(512, SIZE - 512))
            assert sum(extent.length for extent in extents) == SIZE - 512
            assert extents[0].offset == 512
            for extent in extents:
                assert extent.kind is ExtentKind.DATA
                assert extent.path is not None
                assert extent.host_offset is not None
                with open(extent.path, "rb") as file:  # noqa: ASYNC230
                    file.seek(extent.host_offset)
                    assert file.read(extent.length) == await disk.read(extent.offset, extent.length)
            assert {extent.depth for extent in extents} == {0, 1}

    trio.run(run)


# Others.


def test_qemu_goes_on_with_what_we_leave_and_we_with_what_qemu_leaves(shm: Path) -> None:
    path = shm / "disk.hds"
    oracles.run(
        "qemu-img", "create", "-q", "-f", "parallels", "-o", "cluster_size=64k", str(path), "4M"
    )

    async def run() -> None:
        async with running_engine() as engine:
            for turn in range(3):
                mine, theirs = 0x10 + turn, 0x20 + turn
                async with open_disk(path, engine) as disk:
                    await disk.write(turn * CLUSTER + 512, bytes([mine]) * 4096)
                    await disk.discard((turn + 20) * CLUSTER, CLUSTER)
                await trio.to_thread.run_sync(
                    lambda turn=turn, mine=mine, theirs=theirs: oracles.qemu_io(
                        str(path),
                        f"read -P {mine:#x} {turn * 64 * 1024 + 512} 4k",
                        f"write -P {theirs:#x} {(turn + 20) * 64}k 64k",
                        driver="parallels",
                    )
                )
                async with open_disk(path, engine) as disk:
                    found = await disk.read((turn + 20) * CLUSTER, CLUSTER)
                    assert found == bytes([theirs]) * CLUSTER

    trio.run(run)
    oracles.run("qemu-img", "check", "-q", "-f", "parallels", str(path))


def test_raw_disk_in_place(shm: Path) -> None:
    path = shm / "disk.img"
    content = bytearray(os.urandom(3 << 20) + os.urandom(1536))
    path.write_bytes(content)

    async def run() -> None:
        async with running_engine() as engine, open_disk(path, engine) as disk:
            await disk.write(4096, b"\x01" * 512)
            await disk.discard(len(content) - 1024, 1024)
            await disk.zero(1 << 20, 1 << 20, unmap=True)
            await disk.flush()

    trio.run(run)
    content[4096 : 4096 + 512] = b"\x01" * 512
    content[-1024:] = bytes(1024)
    content[1 << 20 : 2 << 20] = bytes(1 << 20)
    assert path.read_bytes() == content


def test_read_only_refuses_writes(shm: Path) -> None:
    path = empty(shm)

    async def run() -> None:
        async with (
            running_engine() as engine,
            open_disk(path, engine, read_only=True) as disk,
        ):
            for operation in (disk.write(0, b"\x01" * 512), disk.discard(0, 512)):
                with pytest.raises(StorageError) as caught:
                    await operation
                assert caught.value.errno == 30
            await disk.flush()

    trio.run(run)
