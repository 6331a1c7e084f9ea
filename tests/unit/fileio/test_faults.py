"""The scripted faults, and what a power cut leaves."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from ploopd.errors import StorageError
from ploopd.fileio.crash_log import CrashLog
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.fileio.file import File


def open_file(path: Path, layer: FaultyOs) -> File:
    return File.open(path, read_only=False, engine=None, layer=layer)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "delta.hdd"
    path.write_bytes(bytes(8192))
    return path


def outcomes(file: File, count: int, offset: int = 0) -> str:
    """One letter per write: . for success, ! for an error."""
    found = ""
    for _ in range(count):
        try:
            file.pwrite(b"x", offset)
            found += "."
        except StorageError:
            found += "!"
    return found


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault(op="write", error=errno.EIO), "!....."),
        (Fault(op="write", nth=3, error=errno.EIO), "..!..."),
        (Fault(op="write", nth=2, count=3, error=errno.EIO), ".!!!.."),
        (Fault(op="write", nth=4, count=None, error=errno.EIO), "...!!!"),
        (Fault(op="write", path="*.hdd", error=errno.EIO), "!....."),
        (Fault(op="write", path="*.hds", error=errno.EIO), "......"),
        (Fault(op="write", start=0, end=1, error=errno.EIO), "!....."),
        (Fault(op="write", start=1, error=errno.EIO), "......"),
        (Fault(op="read", error=errno.EIO), "......"),
    ],
)
def test_which_calls_a_fault_strikes(path: Path, fault: Fault, expected: str) -> None:
    file = open_file(path, FaultyOs(fault))
    assert outcomes(file, 6) == expected
    assert fault.hits == expected.count("!")
    file.close()


def test_sync_means_both_and_star_means_all(path: Path) -> None:
    layer = FaultyOs(Fault(op="sync", error=errno.EBUSY))
    file = open_file(path, layer)
    with pytest.raises(StorageError) as caught:
        file.fsync()
    assert caught.value.errno == errno.EBUSY
    layer.add(Fault(op="*", count=None, error=errno.ENOTCONN))
    for call in (file.fsync, file.size, lambda: file.pread(1, 0), lambda: file.truncate(1)):
        with pytest.raises(StorageError) as caught:
            call()
        assert caught.value.errno == errno.ENOTCONN
    layer.clear()
    assert file.size() == 8192
    file.close()


def test_an_unknown_operation_is_refused() -> None:
    with pytest.raises(ValueError, match="wirte"):
        Fault(op="wirte", error=errno.EIO)


def test_a_torn_write_leaves_its_beginning(path: Path) -> None:
    file = open_file(path, FaultyOs(Fault(op="write", torn=700)))
    with pytest.raises(StorageError):
        file.pwrite(b"x" * 4096, 0)
    assert path.read_bytes() == b"x" * 700 + bytes(8192 - 700)
    file.close()


def test_delays_use_the_clock_that_is_given(path: Path) -> None:
    waits: list[float] = []
    layer = FaultyOs(Fault(op="write", delay=30.0), sleep=waits.append)
    file = open_file(path, layer)
    assert outcomes(file, 2) == ".."
    assert waits == [30.0]
    file.close()


def test_what_hangs_goes_on_when_it_is_released(path: Path) -> None:
    layer = FaultyOs(Fault(op="write", hang=True))
    file = open_file(path, layer)
    thread = threading.Thread(target=file.pwrite, args=(b"late", 0))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    assert path.read_bytes()[:4] == bytes(4)
    layer.release()
    thread.join(10)
    assert path.read_bytes()[:4] == b"late"
    file.close()


def test_calls_are_recorded_in_order(path: Path) -> None:
    layer = FaultyOs()
    file = open_file(path, layer)
    file.pwrite(b"x", 0)
    file.fsync()
    file.close()
    assert [op for op, _ in layer.calls] == ["open", "fstat", "write", "fsync", "close"]
    assert {name for _, name in layer.calls} == {str(path)}


# Power cuts.


def test_only_what_was_synced_is_sure_to_survive(path: Path) -> None:
    layer = FaultyOs(record=True)
    file = open_file(path, layer)
    file.pwrite(b"a" * 512, 0)
    file.fsync()
    file.pwrite(b"b" * 1024, 512)
    file.pwrite(b"c" * 512, 0)
    log = layer.log(path)
    assert log.durable() == b"a" * 512 + bytes(8192 - 512)
    assert [record.number for record in log.unsynced] == [1, 2]
    assert log.state(keep=[2]) == b"c" * 512 + bytes(8192 - 512)
    assert log.state(keep=lambda record: True) == path.read_bytes()
    torn = log.state(keep=[1], torn={1: 600})
    assert torn == b"a" * 512 + b"b" * 512 + bytes(8192 - 1024)
    layer.power_cut()
    for call in (file.fsync, lambda: file.pwrite(b"d", 0)):
        with pytest.raises(StorageError):
            call()
    assert log.durable() == b"a" * 512 + bytes(8192 - 512)


def test_a_failed_sync_makes_nothing_durable(path: Path) -> None:
    layer = FaultyOs(Fault(op="fsync", error=errno.EIO), record=True)
    file = open_file(path, layer)
    file.pwrite(b"a", 0)
    with pytest.raises(StorageError):
        file.fsync()
    assert layer.log(path).durable() == bytes(8192)
    file.close()


def test_a_sync_covers_what_had_completed_when_it_began() -> None:
    log = CrashLog(bytes(4))
    log.wrote(0, b"a")
    mark = log.sync_began()
    log.wrote(1, b"b")
    log.synced(mark)
    assert log.durable() == b"a\0\0\0"


def test_growth_and_holes_are_recorded(path: Path) -> None:
    layer = FaultyOs(record=True)
    file = open_file(path, layer)
    file.pwrite(b"a" * 8192, 0)
    file.allocate_now(8192, 4096)
    file.punch_now(4096, 1 << 20)
    file.truncate(20_000)
    log = layer.log(path)
    assert log.durable() == bytes(8192)
    assert log.state(keep=lambda record: True) == path.read_bytes()
    file.fsync()
    assert log.durable() == path.read_bytes()
    assert log.unsynced == []
    file.close()


def test_opening_again_keeps_the_record(path: Path) -> None:
    layer = FaultyOs(record=True)
    for letter in (b"a", b"b"):
        file = open_file(path, layer)
        file.pwrite(letter, 0)
        file.close()
    assert layer.log(path).durable()[:1] == b"\0"
    assert layer.log(os.path.relpath(path)).state(keep=[0])[:1] == b"a"
