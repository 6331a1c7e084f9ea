"""Large READs beside WRITEs and UNMAPs of the same blocks, on tmpfs, many at a time.

Every block says which one it is and when it was written.  A READ may show what there was when it
was sent, or any change that was under way with it, but never another block's data, half a block, or
something older.  One initiator reads, slowly, so that the target's socket fills up; another one
makes the changes meanwhile.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ploopd.storage.create import create_image
from tests.support.cdb import read_16, write_16
from tests.support.iscsi_client import Client
from tests.support.iscsi_transport import SocketTransport
from tests.support.serve import ServedUrl, ServeProcess

pytestmark = [pytest.mark.functional, pytest.mark.timeout(120)]

SIZE = 48 << 20
PIECE = 64 << 10
BLOCKS = PIECE // 512
PIECES = SIZE // PIECE
SECONDS = 4.0
DEPTH = 24
ZERO = 0
"""The version of a piece that was never written, or unmapped."""

_STAMP = struct.Struct(">QQ")


def stamped(piece: int, version: int) -> bytes:
    first = piece * BLOCKS
    return b"".join(_STAMP.pack(first + i, version) * 32 for i in range(BLOCKS))


def unmap(piece: int, count: int) -> tuple[bytes, bytes]:
    """An UNMAP of whole pieces: its CDB and its parameter list."""
    descriptor = struct.pack(">QII", piece * BLOCKS, count * BLOCKS, 0)
    parameters = struct.pack(">HHI", 22, 16, 0) + descriptor
    return struct.pack(">BBIBHB", 0x42, 0, 0, 0, len(parameters), 0), parameters


@dataclass(slots=True)
class Change:
    """A WRITE of one piece, or an UNMAP of several."""

    pieces: range
    version: int


@dataclass(slots=True)
class Read:
    """A READ; `allowed`: the versions that each of its pieces may show."""

    pieces: range
    allowed: list[set[int]]
    data: bytearray


class Load:
    """What is under way, and what each piece holds."""

    def __init__(self, reader: Client, writer: Client, seed: int) -> None:
        self.reader = reader
        self.writer = writer
        self.random = random.Random(seed)
        self.current = [ZERO] * PIECES
        self.changing: dict[int, int] = {}
        self.reading: dict[int, Read] = {}
        self.writing: dict[int, Change] = {}
        self.version = 0
        self.reads = self.writes = self.unmaps = 0

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pdus = b"".join(self.begin_read() for _ in range(DEPTH - len(self.reading)))
            self.reader.send(pdus)
            for _ in range(self.random.randint(1, 5)):
                pdus = b"".join(self.begin_change() for _ in range(self.random.randint(1, 16)))
                self.writer.send(pdus)
                while self.writing:
                    self.receive_status()
            for _ in range(self.random.randint(1, 2 * DEPTH)):
                self.receive_data()
        while self.reading:
            self.receive_data()

    def begin_change(self) -> bytes:
        writing = self.random.random() < 0.8
        count = 1 if writing else self.random.choice((1, 4, 16))
        first = self.random.randrange(PIECES // count) * count
        pieces = range(first, first + count)
        if any(piece in self.changing for piece in pieces):
            return b""
        if writing:
            self.version += 1
            version, data = self.version, stamped(first, self.version)
            cdb = write_16(first * BLOCKS, BLOCKS)
            self.writes += 1
        else:
            version = ZERO
            cdb, data = unmap(first, count)
            self.unmaps += 1
        for piece in pieces:
            self.changing[piece] = version
        for read in self.reading.values():
            for piece in pieces:
                if piece in read.pieces:
                    read.allowed[piece - read.pieces.start].add(version)
        tag, pdu = self.writer.initiator.command(cdb, write=len(data), data=data)
        self.writing[tag] = Change(pieces, version)
        return pdu

    def begin_read(self) -> bytes:
        count = self.random.choice((1, 2, 4, 8, 16, 16))
        first = self.random.randrange(PIECES - count + 1)
        pieces = range(first, first + count)
        allowed = [{self.current[piece]} for piece in pieces]
        cdb = read_16(first * BLOCKS, count * BLOCKS)
        tag, pdu = self.reader.initiator.command(cdb, read=count * PIECE)
        self.reading[tag] = Read(pieces, allowed, bytearray())
        self.reads += 1
        return pdu

    def receive_data(self) -> None:
        if not self.reading:
            return
        pdu = self.reader.next_pdu()
        read = self.reading[pdu.tag]
        assert pdu.opcode == 0x25, pdu
        read.data += pdu.data
        if pdu.flags & 1:
            assert pdu.status == 0, pdu
            del self.reading[pdu.tag]
            self.check(read)

    def receive_status(self) -> None:
        pdu = self.writer.next_pdu()
        assert pdu.opcode == 0x21, pdu
        assert pdu.status == 0, pdu
        change = self.writing.pop(pdu.tag)
        for piece in change.pieces:
            self.current[piece] = change.version
            del self.changing[piece]

    @staticmethod
    def check(read: Read) -> None:
        for index, piece in enumerate(read.pieces):
            data = bytes(read.data[index * PIECE : (index + 1) * PIECE])
            allowed = read.allowed[index]
            if any(data == _content(piece, version) for version in allowed):
                continue
            for number in range(BLOCKS):
                block = data[number * 512 : number * 512 + 512]
                stamp = _STAMP.unpack_from(block)
                assert block == _STAMP.pack(*stamp) * 32, f"half a block in piece {piece}"
                assert stamp in {_stamp(piece, number, version) for version in allowed}, (
                    f"block {number} of piece {piece} is {stamp}, allowed: {allowed}"
                )


def _stamp(piece: int, number: int, version: int) -> tuple[int, int]:
    return (0, 0) if version == ZERO else (piece * BLOCKS + number, version)


def _content(piece: int, version: int) -> bytes:
    return bytes(PIECE) if version == ZERO else stamped(piece, version)


def resident(pid: int, path: Path) -> int:
    """Bytes of the process's mappings of the file that it has used."""
    total, ours = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def log_in(url: ServedUrl, isid: int) -> Client:
    client = Client(SocketTransport(url.host, url.port, 30.0), target=url.iqn)
    client.initiator.isid = b"\x80" + isid.to_bytes(5, "big")
    client.login()
    client.clear_attention()
    return client


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory on tmpfs."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no /dev/shm")
    directory = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="ploopd-test-"))
    yield directory
    shutil.rmtree(directory)


@pytest.mark.parametrize("cluster_size", [64 << 10, 1 << 20])
def test_every_block_is_what_it_says(cluster_size: int, memory: Path, tmp_path: Path) -> None:
    image = memory / "disk.hds"
    create_image(image, size=SIZE, cluster_size=cluster_size)
    with ServeProcess(image, directory=tmp_path) as server:
        url = server.url
        reader, writer = log_in(url, 1), log_in(url, 2)
        load = Load(reader, writer, seed=cluster_size)
        load.run(SECONDS)
        assert min(load.reads, load.writes, load.unmaps) > 20, "that was no load"
        assert resident(server.pid, image) > 0, "the page cache was not used"
        for client in (reader, writer):
            client.logout()
            client.close()
