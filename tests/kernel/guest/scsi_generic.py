"""SCSI commands from user space, without anybody who repeats them: ioctl SG_IO (scsi/sg.h)."""

from __future__ import annotations

import ctypes
import fcntl
import os
import threading
from dataclasses import dataclass
from pathlib import Path

_SG_IO = 0x2285
_SG_SCSI_RESET = 0x2284
_RESET_DEVICE = 1
_NONE, _TO_DEVICE, _FROM_DEVICE = -1, -2, -3


class _Header(ctypes.Structure):
    _fields_ = (
        ("interface_id", ctypes.c_int),
        ("dxfer_direction", ctypes.c_int),
        ("cmd_len", ctypes.c_ubyte),
        ("mx_sb_len", ctypes.c_ubyte),
        ("iovec_count", ctypes.c_ushort),
        ("dxfer_len", ctypes.c_uint),
        ("dxferp", ctypes.c_void_p),
        ("cmdp", ctypes.c_void_p),
        ("sbp", ctypes.c_void_p),
        ("timeout", ctypes.c_uint),
        ("flags", ctypes.c_uint),
        ("pack_id", ctypes.c_int),
        ("usr_ptr", ctypes.c_void_p),
        ("status", ctypes.c_ubyte),
        ("masked_status", ctypes.c_ubyte),
        ("msg_status", ctypes.c_ubyte),
        ("sb_len_wr", ctypes.c_ubyte),
        ("host_status", ctypes.c_ushort),
        ("driver_status", ctypes.c_ushort),
        ("resid", ctypes.c_int),
        ("duration", ctypes.c_uint),
        ("info", ctypes.c_uint),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """`status`: SAM's; `host`: Linux' DID_*, 3 if it gave up waiting; `data`: all of the buffer,
    of which the target says that `residual` bytes were not transferred."""

    status: int
    host: int
    sense: bytes
    data: bytes
    residual: int


def execute(
    disk: Path, cdb: bytes, *, out: bytes = b"", expect: int = 0, seconds: float = 30
) -> Answer:
    """One command; Linux aborts it after `seconds` and does not repeat it."""
    data = ctypes.create_string_buffer(out or b"\xaa" * expect, len(out) or expect or 1)
    command = ctypes.create_string_buffer(cdb, len(cdb))
    sense = ctypes.create_string_buffer(96)
    header = _Header(
        interface_id=ord("S"),
        dxfer_direction=_TO_DEVICE if out else _FROM_DEVICE if expect else _NONE,
        cmd_len=len(cdb),
        mx_sb_len=96,
        dxfer_len=len(out) or expect,
        dxferp=ctypes.addressof(data),
        cmdp=ctypes.addressof(command),
        sbp=ctypes.addressof(sense),
        timeout=int(seconds * 1000),
    )
    descriptor = os.open(disk, os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(descriptor, _SG_IO, header)
    finally:
        os.close(descriptor)
    return Answer(
        status=header.status,
        host=header.host_status,
        sense=sense.raw[: header.sb_len_wr],
        data=data.raw[:expect],
        residual=header.resid,
    )


def read(disk: Path, block: int, *, seconds: float = 30) -> bytes:
    """4 KiB, past every cache of the initiator."""
    answer = execute(disk, _cdb(0x28, block), expect=4096, seconds=seconds)
    assert (answer.status, answer.host) == (0, 0), answer
    return answer.data


def write(disk: Path, block: int, data: bytes, *, seconds: float = 30) -> Answer:
    assert len(data) == 4096
    return execute(disk, _cdb(0x2A, block), out=data, seconds=seconds)


def _cdb(opcode: int, block: int) -> bytes:
    lba = (block * 8).to_bytes(4, "big")
    return bytes([opcode, 0]) + lba + b"\0\0\x08\0"


def reset_unit(disk: Path) -> None:
    """LOGICAL UNIT RESET; raises OSError when the target does not do it."""
    descriptor = os.open(disk, os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(descriptor, _SG_SCSI_RESET, ctypes.c_int(_RESET_DEVICE))
    finally:
        os.close(descriptor)


class Waiting:
    """A WRITE in a thread of its own, which has not been answered yet."""

    def __init__(self, disk: Path, block: int, data: bytes, *, seconds: float) -> None:
        self.answers: list[Answer] = []
        self._thread = threading.Thread(
            target=lambda: self.answers.append(write(disk, block, data, seconds=seconds)),
            daemon=True,
        )
        self._thread.start()

    def wait(self, seconds: float) -> Answer:
        self._thread.join(seconds)
        assert self.answers, f"not answered within {seconds} s"
        return self.answers[0]
