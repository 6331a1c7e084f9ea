"""WRITEs whose data goes from the socket to where the storage keeps it."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from ploopd.fileio.file import File
from ploopd.frontends.iscsi.direct import LEAST_DIRECT, LEAST_MISSING
from ploopd.frontends.iscsi.server import IscsiServer
from tests.support.cdb import read_16, write_16
from tests.support.iscsi_client import TARGET, Client
from tests.support.memory_device import Executed, MemoryDevice, pattern
from tests.unit.frontends.iscsi.rig import SIZE, Rig, engine_of
from tests.unit.frontends.iscsi.server_rig import CONFIG, in_thread, logged_in, make_target

LENGTH = 256 << 10
BLOCKS = LENGTH // 512
HEADER = 48


@dataclass(eq=False)
class DirectDevice(MemoryDevice):
    """One whose bytes lie in memory.  `shown`: the ranges that were to be written to."""

    shown: list[tuple[int, int]] = field(default_factory=list)
    hidden: bool = False

    def try_write_view(self, offset: int, length: int) -> memoryview | None:
        self.shown.append((offset, length))
        return None if self.hidden else memoryview(self.data)[offset : offset + length]


class Bench:
    """A logged-in initiator and the engine, between which the test is the network."""

    def __init__(self, **overrides: str) -> None:
        self.device = DirectDevice(SIZE)
        self.rig = Rig(devices=[self.device])
        self.client = self.rig.logged_in(**overrides)
        self.engine = engine_of(self.client)
        self.device.log.clear()

    def write(self, number: int, data: bytes) -> tuple[int, bytes]:
        """Tag and PDU of a WRITE at the length's `number`th piece."""
        cdb = write_16(number * BLOCKS, len(data) // 512)
        return self.client.initiator.command(cdb, write=len(data), data=data)

    def arrive(self, data: bytes) -> None:
        self.engine.receive_buffer()[: len(data)] = data
        self.engine.received(len(data), self.rig.now)

    def arrive_directly(self, data: bytes, *, less: int = 0) -> bool:
        """As one system call does it, which stops `less` bytes before the end of the data."""
        buffers = self.engine.direct_buffers()
        assert buffers, "there is nowhere to receive it directly"
        place, rest = buffers
        missing = self.engine.missing
        assert len(place) == missing
        assert len(rest) == HEADER
        data = data[: missing - less] if less else data[: missing + HEADER]
        place[: min(missing, len(data))] = data[:missing]
        rest[: max(0, len(data) - missing)] = data[missing:]
        return self.engine.received_direct(len(data), self.rig.now)

    def answers(self) -> list[tuple[int, int]]:
        """(tag, SCSI status) of the responses that wait to be sent."""
        found = b"".join(self.engine.data_to_send())
        self.engine.sent(len(found))
        pdus = self.client.initiator.feed(found)
        assert all(pdu.opcode == 0x21 for pdu in pdus)
        return [(pdu.tag, pdu.status) for pdu in pdus]

    def stored(self, number: int, length: int = LENGTH) -> bytes:
        return bytes(self.device.data[number * LENGTH : number * LENGTH + length])


@pytest.mark.parametrize("here", [0, 1, 512, 1000, LENGTH - LEAST_MISSING])
def test_the_rest_goes_where_the_storage_keeps_it(here: int) -> None:
    bench = Bench()
    data = pattern(LENGTH, 1)
    tag, pdu = bench.write(3, data)
    bench.arrive(pdu[: HEADER + here])
    assert bench.engine.missing == LENGTH - here
    assert bench.stored(3) == bytes(LENGTH)
    assert bench.arrive_directly(pdu[HEADER + here :])
    assert bench.stored(3) == data
    assert bench.answers() == [(tag, 0)]
    written = [row for row in bench.device.log if row.op == "write"]
    first = Executed("write", 3 * LENGTH, here, inline=True)
    assert written == ([first] if here else []), "what was in the buffer, and nothing else"
    stats = bench.rig.target.units[0].stats
    assert (stats.writes, stats.written_bytes) == (1, LENGTH)
    assert bench.client.read(3 * BLOCKS, BLOCKS) == data


def test_one_after_the_other() -> None:
    """The header of the next one comes with the data of this one."""
    bench = Bench()
    contents = [pattern(LENGTH, number) for number in range(5)]
    pairs = [bench.write(number, data) for number, data in enumerate(contents)]
    stream = b"".join(pdu for _, pdu in pairs)
    bench.arrive(stream[:HEADER])
    at = HEADER
    while at < len(stream):
        end = at + LENGTH + HEADER
        assert bench.arrive_directly(stream[at:end])
        at = end
    assert bench.answers() == [(tag, 0) for tag, _ in pairs]
    assert [bench.stored(number) for number in range(5)] == contents
    assert bench.engine.missing == 0
    assert len(bench.engine.receive_buffer()) == HEADER, "what follows may belong elsewhere again"
    bench.arrive(bench.client.initiator.command(bytes(16))[1][:20])
    assert len(bench.engine.receive_buffer()) > HEADER


def test_another_command_in_between() -> None:
    bench = Bench()
    bench.device.data[:LENGTH] = content = pattern(LENGTH, 5)
    tag, pdu = bench.write(1, pattern(LENGTH, 1))
    _, read = bench.client.initiator.command(read_16(0, 8), read=4096)
    bench.arrive(pdu[:HEADER])
    assert bench.arrive_directly(pdu[HEADER:] + read)
    found = b"".join(bench.engine.data_to_send())
    assert int.from_bytes(found[16:20], "big") == tag
    assert found[2 * HEADER :] == content[:4096]


@pytest.mark.parametrize("less", [1, 512, LENGTH // 2, LENGTH - 1])
def test_what_cannot_be_had_directly_is_received_as_usual(less: int) -> None:
    """The file has become shorter, or its file system is full."""
    bench = Bench()
    data = pattern(LENGTH, 1)
    tag, pdu = bench.write(3, data)
    bench.arrive(pdu[:HEADER])
    assert not bench.arrive_directly(pdu[HEADER:], less=less)
    assert bench.answers() == []
    bench.arrive(pdu[-less:])
    assert bench.answers() == [(tag, 0)]
    assert bench.stored(3) == data
    assert Executed("write", 3 * LENGTH, LENGTH, inline=True) in bench.device.log
    assert bench.rig.target.units[0].stats.writes == 1


def test_what_cannot_be_read_again_ends_the_connection() -> None:
    bench = Bench()
    _, pdu = bench.write(3, pattern(LENGTH, 1))
    bench.arrive(pdu[:HEADER])
    bench.device.fail("read", errno.EIO, times=None)
    assert not bench.arrive_directly(pdu[HEADER:], less=512)
    assert bench.engine.aborted
    assert bench.engine.missing == 0


def test_a_storage_that_has_changed_meanwhile() -> None:
    bench = Bench()
    data = pattern(LENGTH, 1)
    tag, pdu = bench.write(3, data)
    bench.arrive(pdu[: HEADER + 512])
    assert bench.engine.missing
    bench.device.hidden = True
    assert bench.engine.direct_buffers() == []
    assert not bench.device.log, "a part of it has been written, and others may look"
    bench.arrive(pdu[HEADER + 512 :])
    assert bench.answers() == [(tag, 0)]
    assert bench.stored(3) == data


def test_a_unit_that_has_something_to_say_meanwhile() -> None:
    bench = Bench()
    tag, pdu = bench.write(3, pattern(LENGTH, 1))
    bench.arrive(pdu[:HEADER])
    bench.rig.target.units[0].capacity_changed()
    assert bench.engine.direct_buffers() == []
    bench.arrive(pdu[HEADER:])
    assert bench.answers() == [(tag, 2)]
    assert bench.stored(3) == bytes(LENGTH)


@pytest.mark.parametrize(
    "case", ["short", "nearly all there", "FUA", "not all immediate", "no views", "digests"]
)
def test_others_are_received_as_usual(case: str) -> None:
    overrides = {"DataDigest": "CRC32C"} if case == "digests" else {}
    overrides |= {"FirstBurstLength": str(LENGTH // 2)} if case == "not all immediate" else {}
    bench = Bench(**overrides)
    length = LEAST_DIRECT - 512 if case == "short" else LENGTH
    bench.device.hidden = case == "no views"
    cdb = bytearray(write_16(0, length // 512))
    cdb[1] |= 8 if case == "FUA" else 0
    data = pattern(length, 1)
    immediate = data[: length // 2] if case == "not all immediate" else data
    _, pdu = bench.client.initiator.command(bytes(cdb), write=length, data=immediate)
    here = length - LEAST_MISSING + 1 if case == "nearly all there" else 100
    bench.arrive(pdu[: HEADER + here])
    assert bench.engine.missing == 0
    assert bench.engine.direct_buffers() == []


# -- with sockets and a file


class FileDevice(MemoryDevice):
    """The disk is a file in memory; what it takes directly is counted."""

    def __init__(self, path: Path) -> None:
        super().__init__(SIZE)
        path.write_bytes(bytes(SIZE))
        self.file = File.open(path, read_only=False, engine=None)
        self.direct = 0
        self.cut_to: int | None = None

    def try_write(self, offset: int, buffer: memoryview) -> bool:
        return self.file.try_write(buffer, offset)

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        return self.file.try_read(buffer, offset)

    def try_write_view(self, offset: int, length: int) -> memoryview | None:
        view = self.file.try_write_view(offset, length)
        if view is not None:
            self.direct += 1
            if self.cut_to is not None and self.direct > 1:  # the first one is only a question
                os.truncate(self.file.path, self.cut_to)
                self.cut_to = None
        return view


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[FileDevice, Path, Client]]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        path = Path(directory, "image")
        device = FileDevice(path)
        server = IscsiServer(CONFIG, {TARGET: make_target(device)})
        async with trio.open_nursery() as nursery:
            addresses = await nursery.start(server.serve)
            client = await in_thread(logged_in, addresses[0][1])
            assert isinstance(client, Client)
            yield device, path, client
            await in_thread(client.close)
            nursery.cancel_scope.cancel()
        device.file.close()


@pytest.mark.trio
async def test_a_stream_of_writes_arrives_in_the_file() -> None:
    content = b"".join(pattern(LENGTH, number) for number in range(SIZE // LENGTH))

    def write(client: Client) -> None:
        pairs = []
        for number in range(SIZE // LENGTH):
            data = content[number * LENGTH : (number + 1) * LENGTH]
            cdb = write_16(number * BLOCKS, BLOCKS)
            pairs.append(client.initiator.command(cdb, write=LENGTH, data=data))
        client.send(b"".join(pdu for _, pdu in pairs))
        for tag, _ in pairs:
            assert client.finish(tag)[0].status == 0

    async with serving() as (device, path, client):
        await in_thread(write, client)
        assert path.read_bytes() == content
        assert device.direct


@pytest.mark.trio
async def test_data_that_comes_slowly() -> None:
    data = pattern(LENGTH, 1)

    async with serving() as (_, path, client):
        tag, pdu = client.initiator.command(write_16(0, BLOCKS), write=LENGTH, data=data)
        for at in range(0, len(pdu), 10_000):
            await in_thread(client.send, pdu[at : at + 10_000])
            await trio.sleep(0.002)
        answer = await in_thread(client.finish, tag)
        assert isinstance(answer, tuple)
        assert answer[0].status == 0
        assert path.read_bytes()[:LENGTH] == data


@pytest.mark.trio
@pytest.mark.parametrize("kept", [0, LENGTH // 2])
async def test_a_file_that_is_cut_short_between_the_look_and_the_call(kept: int) -> None:
    """The kernel says EFAULT, or takes a part; the data is written in the ordinary way."""
    data = pattern(LENGTH, 1)
    async with serving() as (device, path, client):
        device.cut_to = kept
        tag, pdu = client.initiator.command(write_16(0, BLOCKS), write=LENGTH, data=data)
        await in_thread(client.send, pdu)
        answer = await in_thread(client.finish, tag)
        assert isinstance(answer, tuple)
        assert answer[0].status == 0
        assert path.read_bytes()[:LENGTH] == data
        assert device.cut_to is None, "it has not been cut"


@pytest.mark.trio
async def test_an_initiator_that_leaves_in_the_middle() -> None:
    async with serving() as (_, path, client):
        _, pdu = client.initiator.command(
            write_16(0, BLOCKS), write=LENGTH, data=pattern(LENGTH, 1)
        )
        await in_thread(client.send, pdu[: LENGTH // 2])
        await in_thread(client.close)
        await trio.sleep(0.05)
        assert path.read_bytes()[:LENGTH] == bytes(LENGTH)
