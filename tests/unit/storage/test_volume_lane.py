"""The lane of a volume on a real file: what hangs, fails or is given up there.

A pipe takes the place of the file's descriptor: reading from it hangs until the test writes.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.testing

from ploopd.errors import StorageError
from ploopd.fileio import lane as file_lane
from ploopd.fileio.policy import CacheMode
from ploopd.fileio.ring_engine import RingEngine
from ploopd.storage.create import create_image
from ploopd.storage.volume import Volume
from tests.support import lane_request
from tests.support.lane_request import TestRequest
from tests.support.memory_device import pattern
from tests.support.volumes import open_disk

CLUSTER = 64 << 10
SIZE = 16 * CLUSTER
BLOCK = 4096

Answers = list[StorageError | None]


@dataclass
class Bench:
    """A volume with O_DIRECT, all of whose clusters exist, and its ring."""

    volume: Volume
    engine: RingEngine
    content: bytearray
    answers: Answers = field(default_factory=list)

    def begin(self, offset: int, data: bytes | None = None) -> TestRequest:
        view = memoryview(bytearray(BLOCK) if data is None else bytearray(data))
        request = lane_request.begin(
            self.volume.lane,
            self.engine.buffers,
            offset,
            view,
            self.answers.append,
            write=data is not None,
        )
        assert request is not None
        return request

    @property
    def direct_fd(self) -> int:
        fd = self.volume._core.top._direct_fd
        assert fd is not None
        return fd

    async def answered(self, count: int) -> None:
        with trio.fail_after(10):
            while len(self.answers) < count:
                self.volume.kick()
                await trio.sleep(0.001)

    @asynccontextmanager
    async def hanging(self) -> AsyncIterator[int]:
        """Operations that begin now hang until something is written to the descriptor given."""
        saved = os.dup(self.direct_fd)
        reader, writer = os.pipe()
        os.dup2(reader, self.direct_fd)
        os.close(reader)
        yield writer
        if self.volume._core.top._direct_fd is not None:
            os.dup2(saved, self.direct_fd)
        os.close(saved)
        os.close(writer)


@asynccontextmanager
async def bench(path: Path) -> AsyncIterator[Bench]:
    image = path / "disk.hds"
    create_image(image, size=SIZE, cluster_size=CLUSTER)
    content = bytearray(pattern(SIZE, 3))
    engine = RingEngine()
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        async with open_disk(image, engine, cache=CacheMode.NONE) as disk:
            for offset in range(0, SIZE, CLUSTER):
                await disk.write(offset, bytes(content[offset : offset + CLUSTER]))
            if not disk.volume.lane.first:
                pytest.skip(f"no O_DIRECT: {disk.volume.notes}")
            yield Bench(disk.volume, engine, content)
        nursery.cancel_scope.cancel()
    engine.close()


@pytest.mark.trio
async def test_reads_and_writes(tmp_path: Path) -> None:
    async with bench(tmp_path) as subject:
        generator = random.Random(1)
        for turn in range(20):
            blocks = generator.sample(range(SIZE // BLOCK), 30)
            requests = []
            for block in blocks:
                offset = block * BLOCK
                data = pattern(BLOCK, turn * 1000 + block) if generator.random() < 0.5 else None
                if data is not None:
                    subject.content[offset : offset + BLOCK] = data
                requests.append(subject.begin(offset, data))
                if generator.random() < 0.2:
                    requests[-1].promote()
            await subject.answered(len(blocks) * (turn + 1))
            for request in requests:
                at = request.offset
                assert bytes(request.view) == subject.content[at : at + BLOCK]
        assert not any(subject.answers)
        assert (len(subject.volume.lane), subject.volume.in_flight) == (0, 0)
        assert subject.engine.buffers.outstanding <= 1


@pytest.mark.trio
async def test_a_short_read_is_an_error_with_its_place(tmp_path: Path) -> None:
    async with bench(tmp_path) as subject:
        path = subject.volume.layers[0].path
        host = subject.volume._core.map.view[15] * CLUSTER
        os.truncate(path, host + BLOCK)
        subject.begin(15 * CLUSTER)
        subject.begin(15 * CLUSTER + BLOCK)
        await subject.answered(2)
        (error,) = (error for error in subject.answers if error is not None)
        assert (error.errno, error.op, error.offset) == (errno.EIO, "read", host + BLOCK)
        assert error.message.startswith("short read")
        assert subject.volume._core.locks.idle
        os.truncate(path, host + CLUSTER)


@pytest.mark.trio
async def test_a_failed_write_is_an_error(tmp_path: Path) -> None:
    async with bench(tmp_path) as subject:
        saved = os.dup(subject.direct_fd)
        read_only = os.open(subject.volume.layers[0].path, os.O_RDONLY)
        os.dup2(read_only, subject.direct_fd)
        subject.begin(0, pattern(BLOCK, 9))
        await subject.answered(1)
        os.dup2(saved, subject.direct_fd)
        os.close(saved)
        os.close(read_only)
        (error,) = subject.answers
        assert error is not None
        assert (error.errno, error.op) == (errno.EBADF, "write")
        assert subject.volume._core.requests.active == 0


@pytest.mark.trio
async def test_what_needs_the_cluster_waits_for_it(tmp_path: Path) -> None:
    async with bench(tmp_path) as subject, subject.hanging() as pipe:
        request = subject.begin(CLUSTER)
        subject.volume.kick()
        discarded: Answers = []
        subject.volume.discard(CLUSTER, CLUSTER, discarded.append)
        subject.volume.kick()
        await trio.sleep(0.02)
        assert (discarded, subject.answers) == ([], [])
        assert subject.volume.lane.begin(request) is False, "the cluster is to be exclusive"
        os.write(pipe, b"x" * BLOCK)
        await subject.answered(1)
        assert subject.answers == [None]
        assert bytes(request.view) == b"x" * BLOCK
        with trio.fail_after(10):
            while not discarded:  # noqa: ASYNC110 - a callback
                await trio.sleep(0.001)
        assert discarded == [None]


@pytest.mark.trio
@pytest.mark.parametrize("promoted", [False, True])
async def test_closing_waits_for_it(tmp_path: Path, promoted: bool) -> None:
    async with bench(tmp_path) as subject, subject.hanging() as pipe:
        request = subject.begin(0)
        subject.volume.kick()
        if promoted:
            request.promote()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(subject.volume.close)
            await trio.sleep(0.02)
            assert subject.answers == []
            assert subject.volume._core.top.fd >= 0
            assert lane_request_refused(subject)
            os.write(pipe, bytes(BLOCK))
        assert subject.answers == [None]


@pytest.mark.trio
async def test_closing_begins_what_nobody_has_kicked(tmp_path: Path) -> None:
    async with bench(tmp_path) as subject:
        with trio.fail_after(10):
            while subject.engine._watch.own_operations:  # noqa: ASYNC110 - its clock kicks, too
                await trio.sleep(0.01)
        await trio.testing.wait_all_tasks_blocked()
        subject.begin(0)
    assert subject.answers == [None]


def lane_request_refused(subject: Bench) -> bool:
    view = memoryview(bytearray(BLOCK))
    buffers = subject.engine.buffers
    begun = lane_request.begin(
        subject.volume.lane, buffers, 0, view, subject.answers.append, write=False
    )
    return begun is None


@pytest.mark.trio
async def test_abandoned_it_is_void(
    tmp_path: Path,
) -> None:
    engine = RingEngine()
    image = tmp_path / "disk.hds"
    create_image(image, size=SIZE, cluster_size=CLUSTER)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        async with open_disk(image, engine, cache=CacheMode.NONE) as disk:
            await disk.write(0, pattern(CLUSTER, 1))
        answers: Answers = []
        async with open_disk(image, engine, cache=CacheMode.NONE, close=False) as disk:
            if not disk.volume.lane.first:
                pytest.skip("no O_DIRECT")
            fd = disk.volume._core.top._direct_fd
            assert fd is not None
            reader, writer = os.pipe()
            os.dup2(reader, fd)
            os.close(reader)
            view = memoryview(bytearray(BLOCK))
            lane_request.begin(
                disk.volume.lane, engine.buffers, 0, view, answers.append, write=False
            )
            disk.volume.kick()
            assert (engine.outstanding, disk.volume.in_flight) == (1, 1)
            disk.volume.abandon()
            with trio.fail_after(10):
                while engine.outstanding:  # noqa: ASYNC110 - void: it tells nobody
                    await trio.sleep(0.001)
            assert disk.volume.in_flight == 0
            os.close(writer)
        assert answers == []
        assert engine.buffers.outstanding <= 1, "its memory came back with it"
        nursery.cancel_scope.cancel()
    engine.close()


@pytest.mark.trio
async def test_a_file_that_hangs_holds_so_many_and_not_more(tmp_path: Path) -> None:
    async with bench(tmp_path) as subject, subject.hanging() as pipe:
        for number in range(file_lane.MOST_OPERATIONS):
            subject.begin(number * BLOCK)
        assert lane_request_refused(subject)
        subject.volume.kick()
        for number in range(file_lane.MOST_OPERATIONS):
            os.write(pipe, bytes(BLOCK))
            await subject.answered(number + 1)
        assert not lane_request_refused(subject)


@pytest.mark.trio
async def test_what_is_not_one_piece_of_the_top_is_refused(tmp_path: Path) -> None:
    async with bench(tmp_path) as subject:
        lane, buffers = subject.volume.lane, subject.engine.buffers
        across = memoryview(bytearray(2 * BLOCK))
        done = subject.answers.append
        assert lane_request.begin(lane, buffers, CLUSTER - BLOCK, across, done, write=True) is None
        discarded: Answers = []
        subject.volume.discard(0, CLUSTER, discarded.append)
        subject.volume.kick()
        with trio.fail_after(10):
            while not discarded:  # noqa: ASYNC110 - a callback
                await trio.sleep(0.001)
        one = memoryview(bytearray(BLOCK))
        assert lane_request.begin(lane, buffers, 0, one, done, write=True) is None
        assert lane_request.begin(lane, buffers, 0, one, done, write=False) is None
