"""Views through the gate: only while it is open, and never of a storage that has failed."""

from __future__ import annotations

import errno

import pytest

from ploopd.errors import StorageError
from ploopd.gate.filter import Gate
from scst_shim import QueueFlags, StandbyCheck
from tests.support.memory_device import Completion, MemoryDevice

SIZE = 1 << 20


class ViewedDevice(MemoryDevice):
    """One whose bytes lie in memory."""

    def try_view(self, offset: int, length: int) -> memoryview | None:
        return memoryview(self.data)[offset : offset + length]

    def try_write_view(self, offset: int, length: int) -> memoryview | None:
        return memoryview(self.data)[offset : offset + length]


def gate_of(device: MemoryDevice) -> Gate:
    check = StandbyCheck()
    check.enable()
    gate = Gate(
        device,
        name="disk",
        fuses=QueueFlags("disk", check, warn=lambda _: None),
        clock=lambda: 0.0,
        on_event=lambda _: None,
    )
    gate.bind()
    return gate


def test_while_it_is_open() -> None:
    device = ViewedDevice(SIZE)
    device.data[512:1024] = b"x" * 512
    gate = gate_of(device)
    view = gate.try_view(512, 512)
    assert view is not None
    assert bytes(view) == b"x" * 512


def test_a_device_without_views() -> None:
    gate = gate_of(MemoryDevice(SIZE))
    assert gate.try_view(0, 512) is None
    assert gate.try_write_view(0, 512) is None


def test_none_in_standby_and_those_of_the_new_device_afterwards() -> None:
    gate = gate_of(ViewedDevice(SIZE))
    gate.enter_standby("a test")
    assert gate.try_view(0, 512) is None
    assert gate.try_write_view(0, 512) is None
    gate.begin_recovery()
    assert gate.try_view(0, 512) is None
    assert gate.try_write_view(0, 512) is None
    new = ViewedDevice(SIZE)
    new.data[:512] = b"n" * 512
    gate.swap(new)
    assert gate.try_view(0, 512) is None
    gate.leave_standby()
    view = gate.try_view(0, 512)
    assert view is not None
    assert bytes(view) == b"n" * 512
    written = gate.try_write_view(0, 512)
    assert written is not None
    written[:] = b"w" * 512
    assert new.data[:512] == b"w" * 512


def test_none_of_what_is_being_changed() -> None:
    device = ViewedDevice(SIZE, completion=Completion.MANUAL)
    gate = gate_of(device)
    gate.write(4096, memoryview(bytearray(4096)), lambda error: None)
    assert gate.try_write_view(0, 4096) is not None
    assert gate.try_write_view(0, 8192) is None
    device.complete()
    assert gate.try_write_view(0, 8192) is not None


def test_none_to_write_to_while_there_is_no_room() -> None:
    """A view would not tell that there is some again."""
    device = ViewedDevice(SIZE)
    gate = gate_of(device)
    device.fail("write", errno.ENOSPC)
    gate.write(0, memoryview(bytearray(512)), lambda error: None)
    assert gate.full is not None
    assert gate.try_write_view(4096, 512) is None
    assert gate.try_view(4096, 512) is not None
    gate.write(0, memoryview(bytearray(512)), lambda error: None)
    assert gate.full is None
    assert gate.try_write_view(4096, 512) is not None


def test_none_once_the_storage_has_failed() -> None:
    """It is `read` that says how; a view would say nothing for ever."""
    device = ViewedDevice(SIZE)
    gate = gate_of(device)
    gate.set_standby_errnos({errno.EIO})
    device.fail("read", errno.ENODEV)
    with pytest.raises(StorageError):
        gate.try_read(0, memoryview(bytearray(512)))
    assert gate.latched is not None
    assert gate.try_view(0, 512) is None
    assert gate.try_write_view(0, 512) is None
