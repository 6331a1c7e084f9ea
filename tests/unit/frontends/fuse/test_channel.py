"""The kernel's messages: who answers which, and what the answers look like."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence

import pytest

from ploopd.frontends.fuse import wire
from ploopd.frontends.fuse.channel import DISK_HANDLE, OUTSTANDING, Channel, Handles
from ploopd.frontends.fuse.disk import Disk
from tests.support.memory_device import Completion
from tests.unit.frontends.fuse.harness import FakeDevice

NODE = 77


def message(opcode: int, body: bytes = b"", *, unique: int = 2) -> memoryview:
    head = wire.IN_HEADER.pack(40 + len(body), opcode, unique, NODE, 0, 0, 1, 0, 0)
    return memoryview(bytearray(head + body))


def reading(handle: int, offset: int, size: int) -> bytes:
    return struct.pack("=QQIIQII", handle, offset, size, 0, 0, 0, 0)


def writing(handle: int, offset: int, data: bytes, flags: int = 0) -> bytes:
    return struct.pack("=QQIIQII", handle, offset, len(data), 0, 0, flags, 0) + data


class Kernel:
    """What has been sent to the kernel: (unique, errno, data)."""

    def __init__(self) -> None:
        self.got: list[tuple[int, int, bytes]] = []

    def __call__(self, pieces: Sequence[bytes | bytearray | memoryview]) -> None:
        whole = b"".join(bytes(piece) for piece in pieces)
        length, error, unique = wire.OUT_HEADER.unpack_from(whole)
        assert length == len(whole)
        self.got.append((unique, -error, whole[16:]))


class Session:
    def __init__(self, device: FakeDevice | None = None) -> None:
        self.device = device or FakeDevice()
        self.handles = Handles()
        self.kernel = Kernel()
        self.channel = Channel(handles=self.handles, to_kernel=self.kernel)
        self.disk = Disk(self.device, later=lambda after, call: None)
        self.handle = self.handles.open(self.disk)

    def ask(self, opcode: int, body: bytes, unique: int = 2) -> None:
        self.channel.from_kernel(message(opcode, body, unique=unique))


def test_data_is_answered_here() -> None:
    session = Session()
    session.ask(wire.Opcode.WRITE, writing(session.handle, 5, b"hello"), 2)
    session.ask(wire.Opcode.READ, reading(session.handle, 4, 7), 4)
    session.ask(wire.Opcode.FSYNC, struct.pack("=QII", session.handle, 1, 0), 6)
    session.ask(wire.Opcode.FALLOCATE, struct.pack("=QQQII", session.handle, 5, 2, 0x03, 0), 8)
    session.ask(wire.Opcode.READ, reading(session.handle, 4, 7), 10)
    session.ask(wire.Opcode.LSEEK, struct.pack("=QQII", session.handle, 0, os.SEEK_DATA, 0), 12)
    assert session.kernel.got == [
        (2, 0, struct.pack("=II", 5, 0)),
        (4, 0, b"\0hello\0"),
        (6, 0, b""),
        (8, 0, b""),
        (10, 0, b"\0\0\0llo\0"),
        (12, 0, struct.pack("=Q", 0)),
    ]
    assert session.channel.queue == []


@pytest.mark.parametrize("flag", [os.O_DSYNC, os.O_SYNC])
def test_a_file_opened_for_synchronous_writes_gets_them(flag: int) -> None:
    session = Session()
    session.ask(wire.Opcode.WRITE, writing(session.handle, 0, bytes(512), flag | os.O_WRONLY))
    assert session.device.memory.log[-1].fua


def test_the_tree_is_the_librarys() -> None:
    session = Session()
    lookup = message(1, b"block\0", unique=2)
    session.channel.from_kernel(lookup)
    session.ask(wire.Opcode.READ, reading(5, 0, 4096), 4)  # of an attribute
    assert [wire.header(memoryview(each)).unique for each in session.channel.queue] == [2, 4]
    assert session.kernel.got == []
    assert session.channel.sent() == bytes(lookup)


def test_the_library_gets_no_more_than_its_socket_can_hold() -> None:
    session = Session()
    for number in range(OUTSTANDING + 2):
        session.ask(3, b"", 2 * number + 2)
    session.ask(wire.Opcode.FORGET, bytes(8), 1000)
    sent = []
    while session.channel.may_send():
        sent.append(wire.header(memoryview(session.channel.sent())).unique)
    assert len(sent) == OUTSTANDING
    session.channel.from_library(bytearray(wire.error_reply(sent[0], errno.ENOENT)))
    assert session.kernel.got == [(2, errno.ENOENT, b"")]
    assert session.channel.may_send()


def test_notifications_pass() -> None:
    session = Session()
    notify = wire.OUT_HEADER.pack(24, 1, 0) + bytes(8)  # FUSE_NOTIFY_POLL
    session.channel.from_library(bytearray(notify))
    assert session.kernel.got == [(0, -1, bytes(8))]


def test_fallocate_and_lseek_of_attributes_leave_them_on_for_disks() -> None:
    session = Session()
    session.ask(wire.Opcode.FALLOCATE, struct.pack("=QQQII", 5, 0, 1, 3, 0), 2)
    session.ask(wire.Opcode.LSEEK, struct.pack("=QQII", 5, 0, os.SEEK_DATA, 0), 4)
    assert [(unique, number) for unique, number, _ in session.kernel.got] == [
        (2, errno.EOPNOTSUPP),
        (4, errno.EINVAL),
    ], "ENOSYS would turn them off for the whole mount"


def test_an_interrupt_finds_its_request() -> None:
    session = Session(FakeDevice())
    session.device.gate.enter_standby("test")
    session.ask(wire.Opcode.READ, reading(session.handle, 0, 512), 2)
    session.ask(wire.Opcode.READ, reading(session.handle, 0, 512), 4)
    assert session.channel.operations == 2
    session.ask(wire.Opcode.INTERRUPT, struct.pack("=Q", 4), 5)
    session.ask(wire.Opcode.INTERRUPT, struct.pack("=Q", 444), 445)
    assert session.kernel.got == [(4, errno.EINTR, b"")]
    session.device.gate.leave_standby()
    assert session.kernel.got[1:] == [(2, 0, bytes(512))]
    assert session.channel.operations == 0


def test_closing_drops_what_is_parked_and_refuses_what_comes() -> None:
    session = Session()
    session.device.gate.enter_standby("test")
    session.ask(wire.Opcode.WRITE, writing(session.handle, 0, b"x" * 512), 2)
    session.channel.close()
    session.ask(wire.Opcode.READ, reading(session.handle, 0, 512), 4)
    assert session.kernel.got == [(2, errno.EINTR, b""), (4, errno.ENODEV, b"")]
    assert session.device.gate.parked_count == 0


def test_an_unknown_handle() -> None:
    session = Session()
    session.handles.close(session.handle)
    session.ask(wire.Opcode.READ, reading(session.handle, 0, 512))
    session.ask(wire.Opcode.READ, reading(DISK_HANDLE | 999, 0, 512), 4)
    assert [number for _, number, _ in session.kernel.got] == [errno.EBADF, errno.EBADF]


def test_devices_are_started_once_per_batch() -> None:
    session = Session(FakeDevice(completion=Completion.ON_KICK))
    session.device.memory.inline = False
    for number in range(5):
        session.ask(wire.Opcode.READ, reading(session.handle, number * 512, 512), 2 * number + 2)
    assert session.kernel.got == []
    session.channel.kick()
    assert len(session.kernel.got) == 5
    assert session.device.memory.kicks == 1


# -- INIT and OPEN -------------------------------------------------------------------------


def init_request(minor: int, flags: int, flags2: int) -> memoryview:
    return message(
        wire.Opcode.INIT, struct.pack("=IIIII", 7, minor, 131072, flags, flags2) + bytes(44)
    )


def init_answer(flags: int) -> bytearray:
    body = struct.pack("=IIIIHHIIHHI", 7, 31, 131072, flags, 12, 9, 1 << 20, 1, 256, 0, 0)
    return bytearray(wire.reply(2, 64) + body.ljust(64, b"\0"))


def test_splicing_is_never_offered() -> None:
    session = Session()
    session.channel.from_kernel(init_request(31, 0xFFFF, 0))
    flags = struct.unpack_from("=I", session.channel.queue[0], 52)[0]
    assert flags == 0xFFFF & ~0x380


@pytest.mark.parametrize(
    ("minor", "flags", "flags2", "shared"),
    [(45, 1 << 30, 1 << 4, True), (45, 1 << 30, 0, False), (31, 1, 0, False), (36, 0, 16, False)],
)
def test_shared_mappings_where_the_kernel_offers_them(
    minor: int, flags: int, flags2: int, shared: bool
) -> None:
    session = Session()
    session.channel.from_kernel(init_request(minor, flags, flags2))
    session.channel.sent()
    session.channel.from_library(init_answer(0x21))
    body = session.kernel.got[0][2]
    _, _, _, out, background, congestion, *_, out2 = struct.unpack_from("=IIIIHHIIHHI", body)
    assert (background, congestion) == (128, 96)
    assert (out, out2) == ((0x21 | 1 << 30, 16) if shared else (0x21, 0))


def test_disks_may_be_written_in_parallel() -> None:
    session = Session()
    for handle, flags in ((session.handle, 1 | 64), (3, 1)):
        session.ask(wire.Opcode.OPEN, struct.pack("=II", os.O_RDWR, 0), 2)
        session.channel.sent()
        session.channel.from_library(
            bytearray(wire.reply(2, 16) + struct.pack("=QII", handle, 1, 0))
        )
        assert struct.unpack("=QII", session.kernel.got.pop()[2])[1] == flags


def test_the_file_of_a_device_that_has_gone_fails_until_it_is_closed() -> None:
    session = Session()
    assert session.handles.count(session.disk) == 1
    session.handles.forget(session.disk)
    assert session.handles.count(session.disk) == 0
    session.ask(wire.Opcode.WRITE, writing(session.handle, 0, b"hello"), 2)
    session.ask(wire.Opcode.FSYNC, struct.pack("=QII", session.handle, 1, 0), 4)
    assert session.kernel.got == [(2, errno.ENODEV, b""), (4, errno.ENODEV, b"")]
    assert session.device.memory.log == []
    session.handles.close(session.handle)
    session.ask(wire.Opcode.FSYNC, struct.pack("=QII", session.handle, 1, 0), 6)
    assert session.kernel.got[-1] == (6, errno.EBADF, b"")
