"""The page cache as memory: what it shows, when there is none, and what it costs."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from ploopd.fileio import view as view_module
from ploopd.fileio.file import File
from ploopd.fileio.oslayer import RealOs
from ploopd.fileio.view import CHUNK, PIECE
from tests.support.volumes import running_engine

CONTENT = bytes(range(256)) * 256
LENGTH = len(CONTENT)
AROUND = 64 << 10  # what the kernel maps besides the page that was asked for


@pytest.fixture
def image() -> Iterator[Path]:
    """A file in memory."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no /dev/shm")
    directory = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="ploopd-test-"))
    path = directory / "image"
    path.write_bytes(CONTENT)
    yield path
    shutil.rmtree(directory)


def opened(path: Path, **options: object) -> File:
    return File.open(path, read_only=False, engine=None, **options)  # type: ignore[arg-type]


def seen(file: File, offset: int, length: int) -> bytes | None:
    view = file.try_view(offset, length)
    return None if view is None else bytes(view)


def mappings(path: Path) -> list[int]:
    """The resident bytes of this process's mappings of the file."""
    resident: list[int] = []
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            resident.append(int(line.split()[1]) * 1024)
    return resident


def descriptors(path: Path) -> int:
    """How many descriptors of the file this process has: they hold its locks."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{name}") == str(path)
    return count


def through_socket(view: memoryview) -> bytes:
    """What the kernel takes out of a view: this process does not touch it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * len(view))
        count = ours.send(view)
        assert count == len(view)
        ours.shutdown(socket.SHUT_WR)
        found = b""
        while data := theirs.recv(1 << 20):
            found += data
        assert len(found) == count
        return found


def into_socket(data: bytes, view: memoryview) -> int:
    """Let the kernel put `data` into a view; how much of it was."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * len(data))
        assert theirs.send(data) == len(data)
        return ours.recv_into(view)


def test_it_shows_what_the_file_has_now(image: Path) -> None:
    file = opened(image)
    assert seen(file, 1000, 5000) == CONTENT[1000:6000]
    file.pwrite(b"new", 2000)
    assert seen(file, 2000, 4) == b"new" + CONTENT[2003:2004]
    assert seen(file, LENGTH - 1, 1) == CONTENT[-1:]
    file.close()


def test_it_cannot_be_written_to(image: Path) -> None:
    file = opened(image)
    view = file.try_view(0, 10)
    assert view is not None
    assert view.readonly
    del view
    file.close()


def test_there_is_none_beyond_the_end_and_it_follows_the_file(image: Path) -> None:
    file = opened(image)
    assert seen(file, LENGTH - 1, 2) is None
    assert seen(file, 0, 1) is not None
    assert seen(file, LENGTH, 1) is None
    file.pwrite(bytes(100), LENGTH)
    assert seen(file, LENGTH - 1, 2) == CONTENT[-1:] + b"\0"
    file.truncate(1000)
    assert seen(file, 0, 1000) == CONTENT[:1000]
    assert seen(file, 0, 1001) is None
    file.truncate(0)
    assert seen(file, 0, 1) is None
    file.close()


def test_a_file_that_shrinks_meanwhile_is_an_error_of_the_system_call(image: Path) -> None:
    """Not a signal, which would be the end of the process."""
    file = opened(image)
    view = file.try_view(0, LENGTH)
    assert view is not None
    os.truncate(image, 8192)
    assert through_socket(view[:8192]) == CONTENT[:8192]
    for part in (view, view[8192:]):
        with pytest.raises(OSError) as caught:
            through_socket(part)
        assert caught.value.errno == errno.EFAULT
    del part
    del view
    file.close()


def test_a_closed_file_has_none_and_keeps_no_mapping(image: Path) -> None:
    file = opened(image)
    try_view = file.try_view
    assert try_view(0, 100) is not None
    assert mappings(image)
    assert descriptors(image)
    file.close()
    assert try_view(0, 100) is None
    assert not mappings(image)
    assert not descriptors(image)


def test_an_abandoned_file_has_none(image: Path) -> None:
    file = opened(image)
    assert file.try_view(0, 100) is not None
    file.abandon()
    assert file.try_view(0, 100) is None
    assert not mappings(image)


def test_what_is_resident_is_bounded(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "MOST_CHUNKS", 2)
    count = 8
    os.truncate(image, count * CHUNK)
    file = opened(image)
    for number in range(count):
        file.pwrite(bytes([number + 1]) * CHUNK, number * CHUNK)
    for turn in range(2):
        for number in range(count):
            for offset in range(number * CHUNK, (number + 1) * CHUNK, CHUNK // 8):
                view = file.try_view(offset, CHUNK // 8)
                assert view is not None
                assert through_socket(view) == bytes([number + 1]) * (CHUNK // 8), turn
            del view
            assert sum(mappings(image)) <= 2 * CHUNK + AROUND
    assert sum(mappings(image)) > CHUNK, "nothing was in use, so nothing was bounded"
    file.close()


def test_one_view_may_be_longer_than_the_bound(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_module, "MOST_CHUNKS", 2)
    os.truncate(image, 5 * CHUNK)
    file = opened(image)
    rest = os.urandom(5 * CHUNK - LENGTH)
    file.pwrite(rest, LENGTH)
    assert seen(file, 100, 5 * CHUNK - 100) == CONTENT[100:] + rest
    file.close()


def test_there_is_none_of_a_hole_which_stays_one(image: Path) -> None:
    """A mapping would fill it with pages of zeros, of a memory that may be full."""
    os.truncate(image, 4 * CHUNK)
    file = opened(image)
    before = image.stat().st_blocks
    for offset, length in ((0, LENGTH + 1), (LENGTH, 512), (2 * CHUNK, CHUNK), (0, 4 * CHUNK)):
        assert file.try_view(offset, length) is None
        assert file.try_write_view(offset, length) is None
    assert seen(file, 0, LENGTH) == CONTENT
    assert image.stat().st_blocks == before
    file.pwrite(b"x" * PIECE, 2 * CHUNK)
    assert seen(file, 2 * CHUNK, PIECE) == b"x" * PIECE
    assert file.try_view(2 * CHUNK, PIECE + 1) is None
    file.close()


def test_a_hole_that_was_made_later_stays_one(image: Path) -> None:
    file = opened(image)
    assert seen(file, 0, LENGTH) == CONTENT
    file.punch_now(0, LENGTH)
    assert file.try_view(0, LENGTH) is None
    assert image.stat().st_blocks == 0
    file.close()


@pytest.mark.trio
async def test_a_hole_that_is_made_while_it_is_in_use_stays_one(image: Path) -> None:
    async with running_engine() as engine:
        file = File.open(image, read_only=False, engine=engine)
        assert seen(file, 0, LENGTH) == CONTENT
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.async_punch, 0, LENGTH)
            await trio.lowlevel.checkpoint()
            seen(file, 0, 512)  # a neighbour of what is being punched asks, and sees it is there
            engine.kick()
        assert file.try_view(0, LENGTH) is None
        assert os.fstat(file.fd).st_blocks == 0
        file.close()


def test_what_is_received_into_it_is_in_the_file(image: Path) -> None:
    file = opened(image)
    view = file.try_write_view(1000, 5000)
    assert view is not None
    data = os.urandom(5000)
    assert into_socket(data, view) == len(data)
    del view
    assert image.read_bytes() == CONTENT[:1000] + data + CONTENT[6000:]
    assert seen(file, 0, LENGTH) == image.read_bytes()
    file.close()


def test_it_is_mapped_before_it_is_used(image: Path) -> None:
    """A page that is written to first takes a fault of its own."""
    file = opened(image)
    assert file.try_write_view(0, LENGTH) is not None
    assert sum(mappings(image)) >= LENGTH
    file.close()


def test_a_file_that_is_open_read_only_has_none_to_write_to(image: Path) -> None:
    file = File.open(image, read_only=True, engine=None)
    assert file.try_write_view(0, 512) is None
    assert seen(file, 0, LENGTH) == CONTENT
    file.close()


def test_a_file_that_shrinks_cannot_be_written_to_either(image: Path) -> None:
    file = opened(image)
    view = file.try_write_view(0, LENGTH)
    assert view is not None
    os.truncate(image, 8192)
    with pytest.raises(OSError) as caught:
        into_socket(bytes(LENGTH), view[8192:])
    assert caught.value.errno == errno.EFAULT
    del view
    assert file.try_write_view(0, LENGTH) is None
    assert file.size() == 8192
    file.close()


def test_there_is_none_where_the_kernel_gives_no_mapping(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    file = opened(image)
    with monkeypatch.context() as patch:
        patch.setattr(view_module.mmap, "mmap", refused)
        assert file.try_view(0, 100) is None
    assert seen(file, 0, 100) == CONTENT[:100]
    file.close()


def test_only_files_in_memory_have_one(tmp_path: Path) -> None:
    """A page that is not there would have to be waited for."""
    path = tmp_path / "image"
    path.write_bytes(CONTENT)
    file = opened(path)
    if file.filesystem == "tmpfs":
        pytest.skip("temporary files are in memory here")
    assert file.try_view(0, 100) is None
    file.close()


def test_a_layer_in_front_sees_every_read(image: Path) -> None:
    file = opened(image, layer=RealOs())
    assert file.try_view(0, 100) is None
    file.close()
