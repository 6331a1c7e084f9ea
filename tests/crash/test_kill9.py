"""kill -9 in the middle of a verified write load: nothing that was flushed may be lost.

The load keeps a journal of what the target has acknowledged and flushed.  After each kill the image
is judged as it lies there, the daemon is started again and every block of the journal is read:
flushed blocks have their flushed or a later content, all others an old or a new one.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import images, oracles
from tests.support.images import MIB
from tests.support.initiator import ConnectionLostError, Initiator
from tests.support.load import BLOCK, Journal, Load, Mix, initial_from
from tests.support.oracles import Layer
from tests.support.serve import ServeProcess

KILLS = int(os.environ.get("PLOOPD_KILLS", "20"))
SHARES = {"thin-64k": 0.4, "chain": 0.35, "v1": 0.25}

pytestmark = [pytest.mark.functional, pytest.mark.timeout(60 + 15 * KILLS)]


@dataclass(frozen=True, slots=True)
class Disk:
    """What is served and killed: `size` bytes, `layers` for QEMU, initial content or None."""

    serve: Path
    layers: list[Layer]
    size: int
    initial: Path | None

    @property
    def top(self) -> Path:
        return self.layers[-1][1]


def thin_64k(directory: Path) -> Disk:
    """Small clusters on a large disk: almost every write allocates."""
    path = images.write_delta(directory / "thin.hds", 128 * MIB, {}, cluster_size=65536)
    return Disk(path, [("parallels", path)], 128 * MIB, None)


def v1(directory: Path) -> Disk:
    path = images.write_delta(
        directory / "v1.hds", 64 * MIB, {}, cluster_size=256 * 1024, version=1
    )
    return Disk(path, [("parallels", path)], 64 * MIB, None)


def chain(directory: Path) -> Disk:
    """Three deltas: writes copy clusters up before they change them."""
    case = images.chain_of_three(directory)
    return Disk(case.serve, case.layers, case.raw.stat().st_size, case.raw)


DISKS: dict[str, Callable[[Path], Disk]] = {"thin-64k": thin_64k, "chain": chain, "v1": v1}


def judge_structure(top: Path, scratch: Path) -> None:
    """The dead image's metadata: no corruption; leaked clusters are allowed."""
    assert oracles.bat_problems(top) == []
    assert oracles.in_use_word(top) == 0x746F6E59, "a killed daemon leaves the in-use word set"
    copy = scratch / "dead.hds"
    shutil.copyfile(top, copy)
    with copy.open("r+b") as file:  # qemu-img calls the in-use word itself a corruption
        file.seek(44)
        file.write(bytes(4))
    oracles.qemu_check(copy)
    copy.unlink()


def load_until_killed(server: ServeProcess, load: Load, seconds: float) -> None:
    killer = threading.Timer(seconds, lambda: os.kill(server.pid, 9))
    killer.start()
    try:
        with pytest.raises(ConnectionLostError):
            load.run(seconds=seconds + 30)
    finally:
        killer.join()
    server.kill()


@pytest.mark.parametrize("kind", sorted(DISKS))
def test_no_flushed_write_is_lost(kind: str, tmp_path: Path) -> None:
    kills = max(1, round(KILLS * SHARES[kind]))
    generator = random.Random(kind)
    disk = DISKS[kind](tmp_path)
    initial = None if disk.initial is None else initial_from(disk.initial)
    journal = Journal(generator.getrandbits(63), initial)
    area = range(disk.size // BLOCK)
    mix = Mix(write=0.7, read=0.15, zero=0.04, unmap=0.04, flush=0.07, largest=24)
    writes = 0
    with ServeProcess(disk.serve, directory=tmp_path) as server:
        for _ in range(kills):
            with Initiator(server.url) as initiator:
                initiator.settle()
                load = Load(initiator, journal, area, seed=generator.getrandbits(32), mix=mix)
                load.verify(after_crash=True)
                load_until_killed(server, load, generator.uniform(0.1, 0.8))
                writes += load.completed
            judge_structure(disk.top, tmp_path)
            server.restart()
        with Initiator(server.url) as initiator:
            initiator.settle()
            checked = Load(initiator, journal, area).verify(after_crash=True)
            initiator.logout()
        assert server.stop() == 0, server.stderr[-3000:]
    assert writes > 20 * kills, "the load hardly ran: the test proves nothing"
    assert checked
    seen = oracles.read_through_qemu(disk.layers, tmp_path / "final.raw")
    assert journal.verify_file(seen, size=disk.size) == checked
    assert oracles.in_use_word(disk.top) == 0
    assert oracles.bat_problems(disk.top) == []
    oracles.qemu_check(disk.top)
