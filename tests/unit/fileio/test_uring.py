"""The ring itself: full rings, overflow, errors, the refusal of a kernel."""

from __future__ import annotations

import errno
import os
import platform
from pathlib import Path

import pytest

from ploopd.errors import UnsupportedError, UsageError
from ploopd.fileio import uring
from ploopd.fileio.buffers import BufferPool
from ploopd.fileio.engine import make_engine
from ploopd.fileio.uring import Opcode, Ring

pytestmark = pytest.mark.skipif(uring.probe() is not None, reason=f"{uring.probe()}")


def test_results_carry_the_tag_and_the_byte_count(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(8192))
    ring, buffer = Ring(8, 16), BufferPool().take(8192)
    with path.open("rb") as file:
        ring.push(Opcode.READ, file.fileno(), buffer.address, 4096, 4096, 7)
        ring.push(Opcode.READ, file.fileno(), buffer.address + 4096, 4096, 6000, 1 << 63)
        ring.submit(wait=2)
        assert sorted(ring.reap()) == [(7, 4096), (1 << 63, 2192)]
    content = path.read_bytes()
    assert buffer.view[:4096] == content[4096:]
    assert buffer.view[4096:][:2192] == content[6000:]
    ring.close()


def test_an_error_is_a_negative_errno() -> None:
    ring, buffer = Ring(8, 16), BufferPool().take(512)
    ring.push(Opcode.READ, 1 << 20, buffer.address, 512, 0, 1)
    ring.submit(wait=1)
    assert ring.reap() == [(1, -errno.EBADF)]
    ring.close()


def test_what_has_completed_is_counted() -> None:
    ring = Ring(8, 16)
    assert (ring.completed(), ring.ready()) == (0, False)
    for tag in range(3):
        ring.push(Opcode.NOP, -1, 0, 0, 0, tag)
    assert ring.completed() == 0, "not submitted"
    ring.submit(wait=3)
    assert (ring.completed(), ring.ready()) == (3, True)
    assert len(ring.reap()) == 3
    assert (ring.completed(), ring.ready()) == (0, False)
    ring.close()


def test_a_kernel_without_cooperative_completions_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uring, "_COOPERATIVE", 1 << 31)  # refused with EINVAL, as by an old one
    ring = Ring(8, 16)
    ring.push(Opcode.NOP, -1, 0, 0, 0, 1)
    ring.submit(wait=1)
    assert ring.reap() == [(1, 0)]
    ring.close()


def test_a_full_ring_refuses_until_it_is_submitted() -> None:
    ring = Ring(4, 8)
    assert [ring.push(Opcode.NOP, -1, 0, 0, 0, tag) for tag in range(5)] == [True] * 4 + [False]
    ring.submit(wait=4)
    assert ring.pending == 0
    assert ring.push(Opcode.NOP, -1, 0, 0, 0, 5)
    assert len(ring.reap()) == 4
    ring.submit(wait=1)
    assert ring.reap() == [(5, 0)]
    ring.close()


def test_completions_beyond_the_ring_are_not_lost() -> None:
    ring = Ring(4, 8)
    for tag in range(24):
        if not ring.push(Opcode.NOP, -1, 0, 0, 0, tag):
            ring.submit()
            assert ring.push(Opcode.NOP, -1, 0, 0, 0, tag)
    ring.submit()
    found: list[tuple[int, int]] = []
    while ring.ready():
        found += ring.reap()
    assert sorted(found) == [(tag, 0) for tag in range(24)]
    ring.close()


def test_indexes_wrap_around() -> None:
    ring = Ring(4, 8)
    for tag in range(1000):
        ring.push(Opcode.NOP, -1, 0, 0, 0, tag)
        ring.submit(wait=1)
        assert ring.reap() == [(tag, 0)]
    ring.close()


def test_another_machine_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert "riscv64" in str(uring.probe())
    assert make_engine("auto").kind == "threads"
    with pytest.raises(UnsupportedError, match="riscv64"):
        make_engine("io_uring")


def test_a_kernel_that_refuses_means_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    # A number that no system call has: what seccomp and old kernels answer.
    monkeypatch.setattr(uring, "_SYS_SETUP", 100_000)
    assert uring.probe() == f"io_uring_setup: {os.strerror(errno.ENOSYS)}"
    assert make_engine("auto").kind == "threads"


def test_an_unknown_engine_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="aio"):
        make_engine("aio")
