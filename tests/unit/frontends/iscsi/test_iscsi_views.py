"""READs answered out of the page cache: in order, of one moment, copied where they must wait."""

from __future__ import annotations

import errno
import mmap
import os
import socket
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from ploopd.fileio.buffers import BufferPool
from ploopd.frontends.iscsi.config import IscsiConfig, Portal
from ploopd.frontends.iscsi.fast_path import LEAST_VIEWED, MOST_VIEWED
from ploopd.frontends.iscsi.server import IscsiServer
from ploopd.scsi.logical_unit import LogicalUnit
from ploopd.scsi.target import Target
from tests.support.cdb import read_16, write_16
from tests.support.iscsi_client import TARGET, Client
from tests.support.iscsi_transport import ConnectionClosed, SocketTransport
from tests.support.memory_device import MemoryDevice, pattern
from tests.unit.frontends.iscsi.rig import SIZE, Rig, engine_of

LENGTH = 128 << 10
BLOCKS = LENGTH // 512
TOGETHER = MOST_VIEWED // LENGTH
TEST_UNIT_READY = bytes(16)


@dataclass(eq=False)
class ViewedDevice(MemoryDevice):
    """One whose bytes lie in memory.  `viewed`: the ranges that were shown."""

    viewed: list[tuple[int, int]] = field(default_factory=list)

    def try_view(self, offset: int, length: int) -> memoryview | None:
        self.viewed.append((offset, length))
        return memoryview(self.data)[offset : offset + length].toreadonly()


class Bench:
    """A logged-in initiator whose requests arrive together, and what it is sent."""

    def __init__(self, **overrides: str) -> None:
        self.device = ViewedDevice(SIZE)
        self.device.data[:] = self.content = pattern(SIZE, 7)
        self.rig = Rig(devices=[self.device])
        overrides = {"MaxRecvDataSegmentLength": str(1 << 20), **overrides}
        self.client = self.rig.logged_in(**overrides)
        self.engine = engine_of(self.client)
        self.device.log.clear()
        self.device.viewed.clear()

    def read(self, number: int, length: int = LENGTH) -> bytes:
        """The PDU of a READ of the length's `number`th piece of the disk."""
        blocks = length // 512
        return self.client.initiator.command(read_16(number * blocks, blocks), read=length)[1]

    def write(self, number: int, data: bytes) -> bytes:
        blocks = len(data) // 512
        cdb = write_16(number * blocks, blocks)
        return self.client.initiator.command(cdb, write=len(data), data=data)[1]

    def arrive(self, *pdus: bytes) -> None:
        data = b"".join(pdus)
        self.engine.receive_buffer()[: len(data)] = data
        self.engine.received(len(data), self.rig.now)

    def take(self, count: int | None = None) -> bytes:
        """What the kernel copies of the output: all, or `count` bytes."""
        found = b"".join(self.engine.data_to_send())[:count]
        self.engine.sent(len(found))
        return found

    def rest(self) -> bytes:
        """Everything else that comes of what has arrived."""
        found = b""
        while self.engine.data_to_send() or self.engine.paused:
            found += self.take()
            if self.engine.paused:
                self.engine.process(self.rig.now)
        return found

    def expected(self, number: int) -> bytes:
        return self.content[number * LENGTH : (number + 1) * LENGTH]

    @property
    def outstanding(self) -> int:
        return self.rig.buffers.outstanding


def data_of(stream: bytes) -> list[bytes]:
    """The data segments of a stream of PDUs, the empty ones left out."""
    found, at = [], 0
    while at < len(stream):
        length = int.from_bytes(stream[at + 5 : at + 8], "big")
        if length:
            found.append(stream[at + 48 : at + 48 + length])
        at += 48 + (length + 3 & ~3)
    return found


def test_several_reads_leave_together_without_being_copied() -> None:
    bench = Bench()
    bench.arrive(*(bench.read(number) for number in range(TOGETHER + 2)))
    assert len(bench.device.viewed) == TOGETHER
    assert sum(len(piece) for piece in bench.engine.data_to_send()) == TOGETHER * (LENGTH + 48)
    found = data_of(bench.rest())
    assert found == [bench.expected(number) for number in range(TOGETHER + 2)]
    assert not bench.device.log, "something was read, that is: copied"
    assert bench.outstanding == 0


def test_a_read_of_several_pdus() -> None:
    bench = Bench(MaxRecvDataSegmentLength=str(LEAST_VIEWED), MaxBurstLength=str(LENGTH))
    bench.arrive(bench.read(1, 4 * LENGTH))
    stream = bench.rest()
    assert b"".join(data_of(stream)) == bench.content[4 * LENGTH : 8 * LENGTH]
    flags = [stream[at + 1] for at in range(0, len(stream), LEAST_VIEWED + 48)]
    assert flags == [0x00, 0x80] * 3 + [0x00, 0x81]
    assert not bench.device.log


@pytest.mark.parametrize("later", ["write", "unmap", "test unit ready"])
def test_what_comes_after_waits_until_they_have_been_sent(later: str) -> None:
    bench = Bench()
    initiator = bench.client.initiator
    first = bench.read(0)
    match later:
        case "write":
            pdu = bench.write(0, bytes(4096))
        case "unmap":
            parameters = (22).to_bytes(2, "big") + (16).to_bytes(2, "big") + bytes(4)
            parameters += bytes(8) + BLOCKS.to_bytes(4, "big") + bytes(4)
            cdb = bytes([0x42, 0, 0, 0, 0, 0, 0, 0, len(parameters), 0])
            pdu = initiator.command(cdb, write=len(parameters), data=parameters)[1]
        case _:
            pdu = initiator.command(TEST_UNIT_READY)[1]
    bench.arrive(first, pdu, bench.read(0))
    assert sum(len(piece) for piece in bench.engine.data_to_send()) == LENGTH + 48
    assert not bench.device.log
    old = bench.take()
    assert data_of(old) == [bench.expected(0)]
    new = data_of(bench.rest())
    assert new == [bytes(bench.device.data[:LENGTH])]
    assert (new[0] == bench.expected(0)) == (later == "test unit ready")


def test_a_small_read_after_them_keeps_its_place() -> None:
    bench = Bench()
    bench.arrive(bench.read(0), bench.read(3, 4096), bench.read(1))
    found = data_of(bench.rest())
    assert found == [bench.expected(0), bench.content[3 * 4096 : 4 * 4096], bench.expected(1)]


@pytest.mark.parametrize("taken", [0, 20, 48, 49, 560, 1000, LENGTH + 47, LENGTH + 48 + 700])
def test_what_the_kernel_does_not_take_is_of_the_same_moment(taken: int) -> None:
    bench = Bench()
    bench.arrive(*(bench.read(number) for number in range(TOGETHER)))
    stream = bench.take(taken)
    assert bench.engine.keep_views()
    assert bench.outstanding > 0
    bench.device.data[:] = bytes(SIZE)
    stream += bench.rest()
    assert data_of(stream) == [bench.expected(number) for number in range(TOGETHER)]
    assert bench.outstanding == 0


def test_there_are_no_views_in_output_that_waits() -> None:
    bench = Bench()
    bench.arrive(bench.read(0))
    bench.engine.keep_views()
    bench.device.viewed.clear()
    bench.arrive(bench.read(1))
    assert not bench.device.viewed
    bench.device.data[:] = bytes(SIZE)
    assert data_of(bench.rest()) == [bench.expected(0), bench.expected(1)]
    bench.arrive(bench.read(2))
    assert bench.device.viewed, "when all has been sent, there are views again"


def test_what_was_begun_before_them_is_handed_over_when_they_have_to_wait() -> None:
    bench = Bench()
    bench.device.inline = False
    pdus = [bench.read(0, 4096), bench.read(1)]
    before = bench.device.kicks
    bench.arrive(*pdus)
    assert bench.device.kicks == before, "what completes may change what is in the views"
    bench.device.inline = True
    assert bench.engine.keep_views()
    assert bench.device.kicks > before


def test_what_can_neither_be_sent_nor_read_ends_the_connection() -> None:
    bench = Bench()
    bench.arrive(bench.read(0), bench.read(1))
    bench.take(100)
    bench.device.fail("read", errno.EIO, start=LENGTH)
    assert not bench.engine.keep_views()
    assert bench.engine.wants_close
    assert bench.engine.aborted
    assert not bench.engine.data_to_send()
    bench.engine.lost("it was closed")
    assert bench.outstanding == 0


@pytest.mark.parametrize(
    "key", ["HeaderDigest=CRC32C", "DataDigest=CRC32C", "MaxRecvDataSegmentLength=8192"]
)
def test_others_are_copied(key: str) -> None:
    name, value = key.split("=")
    bench = Bench(**{name: value})
    assert bench.client.read(BLOCKS, BLOCKS) == bench.expected(1)
    assert not bench.device.viewed
    assert bench.device.log


def test_short_reads_are_copied() -> None:
    bench = Bench()
    length = LEAST_VIEWED - 512
    bench.arrive(bench.read(1, length))
    assert data_of(bench.rest()) == [bench.content[length : 2 * length]]
    assert not bench.device.viewed


# -- with sockets


async def serve(device: MemoryDevice, nursery: trio.Nursery) -> tuple[IscsiServer, int]:
    target = Target(TARGET)
    buffers = BufferPool()
    unit = LogicalUnit(device, identity=uuid.UUID(int=1), buffers=buffers, clock=trio.current_time)
    target.add_unit(0, unit)
    config = IscsiConfig(iqn=TARGET, portals=(Portal(port=0),))
    server = IscsiServer(config, {TARGET: target})
    addresses = await nursery.start(server.serve)
    return server, addresses[0][1]


def log_in(port: int) -> Client:
    client = Client(SocketTransport("127.0.0.1", port, 10.0))
    client.login()
    client.clear_attention()
    return client


@pytest.mark.trio
async def test_an_initiator_that_reads_slowly_gets_no_mixture() -> None:
    """The socket takes a part of the views, and the storage changes before the rest is sent."""
    device = ViewedDevice(64 << 20)
    device.data[:] = b"\x01" * device.size
    count = 48
    async with trio.open_nursery() as nursery:
        server, port = await serve(device, nursery)
        client = await trio.to_thread.run_sync(log_in, port)
        pdus = b""
        for number in range(count):
            pdus += client.initiator.command(read_16(number * 2048, 2048), read=1 << 20)[1]
        client.send(pdus)
        with trio.fail_after(10):
            while not any(  # noqa: ASYNC110 - there is no event for it
                link.blocked for link in server._links.values()
            ):
                await trio.sleep(0.001)
        device.data[:] = b"\x02" * device.size

        def receive() -> list[bytes]:
            found = []
            while len(found) < count:
                data = b""
                while True:
                    pdu = client.next_pdu()
                    data += pdu.data
                    if pdu.flags & 1:
                        break
                found.append(data)
            return found

        found = await trio.to_thread.run_sync(receive)
        assert {len(data) for data in found} == {1 << 20}
        values = [sorted(set(data)) for data in found]
        assert all(len(value) == 1 for value in values), "a READ shows two moments"
        assert values == sorted(values)
        assert values[0] == [1]
        assert values[-1] == [2]
        assert device.viewed
        nursery.cancel_scope.cancel()


@dataclass(eq=False)
class CutShort(ViewedDevice):
    """Its views are of a file of which there is only a part; what it reads is all right."""

    memory: memoryview = field(default_factory=lambda: memoryview(b""))

    def try_view(self, offset: int, length: int) -> memoryview | None:
        self.viewed.append((offset, length))
        return self.memory[offset : offset + length]


def cut_short(path: Path) -> CutShort:
    device = CutShort(SIZE)
    device.data[:] = pattern(SIZE, 9)
    path.write_bytes(device.data)
    with path.open("rb") as file:
        device.memory = memoryview(mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ))
    os.truncate(path, LENGTH + LENGTH // 2)
    return device


@pytest.mark.trio
async def test_a_file_that_was_cut_short_is_read_instead() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        device = cut_short(Path(directory, "image"))
        async with trio.open_nursery() as nursery:
            _, port = await serve(device, nursery)
            client = await trio.to_thread.run_sync(log_in, port)
            for number in (0, 1, 5):
                found = await trio.to_thread.run_sync(client.read, number * BLOCKS, BLOCKS)
                assert found == bytes(device.data[number * LENGTH : (number + 1) * LENGTH])
            assert len(device.viewed) == 3
            nursery.cancel_scope.cancel()
        del device.memory


@pytest.mark.trio
async def test_a_file_that_cannot_be_read_either_costs_the_connection() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        device = cut_short(Path(directory, "image"))
        device.fail("read", errno.EIO, times=None)
        async with trio.open_nursery() as nursery:
            _, port = await serve(device, nursery)
            client = await trio.to_thread.run_sync(log_in, port)

            def read() -> None:
                with pytest.raises((ConnectionClosed, ConnectionResetError)):
                    client.read(5 * BLOCKS, BLOCKS)

            await trio.to_thread.run_sync(read)
            again = await trio.to_thread.run_sync(log_in, port)  # the server goes on
            again.close()
            nursery.cancel_scope.cancel()
        del device.memory


def test_a_socket_pair_shows_what_is_relied_on() -> None:
    """The kernel's own promise: what was sent of a view is what was there then."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    memory = mmap.mmap(-1, 8192)
    memory[:] = b"a" * 8192
    with ours, theirs:
        assert ours.send(memoryview(memory)) == 8192
        memory[:] = b"b" * 8192
        assert theirs.recv(8192, socket.MSG_WAITALL) == b"a" * 8192
