"""Standby as an initiator sees it: the storage fails in the middle of a load, and nothing happens.

The image lies on a FUSE file system that fails on command.  The load is verified: no error may
reach the initiator, nothing may be lost and overlapping writes must keep their order.
"""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support import images, oracles
from tests.support.faultfs import FaultFs
from tests.support.images import MIB
from tests.support.initiator import Initiator
from tests.support.load import BLOCK, Journal, Load, Mix
from tests.support.serve import ServeProcess

pytestmark = [pytest.mark.functional, pytest.mark.fuse, pytest.mark.timeout(120)]

SIZE = 64 * MIB


def thin_image(path: Path) -> Path:
    return images.write_delta(path, SIZE, {}, cluster_size=65536)


@dataclass
class Director(threading.Thread):
    """Runs the play beside the load; `error` is what went wrong in it."""

    play: Callable[[], None]
    error: BaseException | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    def run(self) -> None:
        try:
            self.play()
        except BaseException as error:
            self.error = error
        finally:
            self.ended.set()

    def __hash__(self) -> int:
        return id(self)


def wait_for_standby(server: ServeProcess, device: str, wanted: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (seen := server.standby(device)) != wanted:
        assert time.monotonic() < deadline, f"standby is {seen!r}, not {wanted!r}"
        time.sleep(0.05)


def run_load_through(load: Load, play: Callable[[], None]) -> None:
    """The load runs from before the play begins until some time after it has ended."""
    load.run(requests=300)
    director = Director(play)
    director.start()
    load.run(until=director.ended.is_set, stall=60)
    director.join()
    if director.error is not None:
        raise director.error
    load.run(requests=300)
    load.flush()
    load.verify()


FAULTS = [
    pytest.param(number, operation, id=f"{errno.errorcode[number]}-{operation}")
    for number in (errno.EBUSY, errno.ENOTCONN, errno.EIO)
    for operation in ("write", "fsync", "read")
]


@pytest.mark.parametrize(("number", "operation"), FAULTS)
def test_the_initiator_sees_only_latency(
    number: int, operation: str, storage: FaultFs, tmp_path: Path
) -> None:
    """Fail → standby on → replaced by a copy elsewhere → everything goes on and is right."""
    thin_image(storage.source / "disk.hds")
    replacement = storage.source / "replacement.hds"
    mix = Mix(write=0.6, read=0.3, flush=0.05, largest=4)
    with ServeProcess(storage.mountpoint / "disk.hds", directory=tmp_path) as server:
        (device,) = server.device_names()
        assert server.standby(device) == "off"

        def play() -> None:
            storage.fail("disk.hds", operation, errno=number)
            wait_for_standby(server, device, "on", 10)
            assert server.ctl_json("device", "list")[0]["standby"] == "on"
            time.sleep(0.3)  # the load must stand still now, not fail
            shutil.copyfile(storage.source / "disk.hds", replacement)
            new = str(storage.mountpoint / "replacement.hds")
            # A copy of an image in use carries the in-use word: that is what --force accepts.
            server.ctl("device", "replace", device, "--image", new, "--force")
            assert server.standby(device) == "off"

        with Initiator(server.url) as initiator:
            initiator.settle()
            journal = Journal(number)
            load = Load(initiator, journal, range(SIZE // BLOCK), mix=mix)
            run_load_through(load, play)
            initiator.logout()
        assert load.longest > 0.2, "nothing was ever parked"
        assert storage.status()["hits"][0] > 0
        assert server.stop() == 0, server.stderr[-3000:]
        assert "Traceback" not in server.stderr
    seen = oracles.read_through_qemu([("parallels", replacement)], tmp_path / "final.raw")
    assert journal.verify_file(seen, size=SIZE) > 0
    assert oracles.bat_problems(replacement) == []
    assert oracles.in_use_word(replacement) == 0


def test_the_same_path_again_and_order_of_overlapping_writes(
    storage: FaultFs, tmp_path: Path
) -> None:
    """Many writes race on few blocks while the storage fails and heals, three times."""
    disk = thin_image(storage.source / "disk.hds")
    served = storage.mountpoint / "disk.hds"
    with ServeProcess(served, directory=tmp_path) as server:
        (device,) = server.device_names()
        with Initiator(server.url) as initiator:
            initiator.settle()
            journal = Journal(5)
            mix = Mix(write=1.0, read=0.0, flush=0.01, largest=3)
            load = Load(initiator, journal, range(48), mix=mix, overlap=True)
            for number in (errno.EBUSY, errno.ENOTCONN, errno.EIO):

                def play(number: int = number) -> None:
                    storage.fail("disk.hds", "write", "fsync", errno=number)
                    wait_for_standby(server, device, "on", 10)
                    time.sleep(0.2)
                    storage.clear()
                    assert server.standby(device) == "on", "only replace leaves standby"
                    server.ctl("device", "replace", device, "--image", str(served))

                run_load_through(load, play)
            initiator.logout()
        assert server.stop() == 0
    seen = oracles.read_through_qemu([("parallels", disk)], tmp_path / "final.raw")
    journal.verify_file(seen, size=SIZE)


def test_a_failed_replace_leaves_standby_and_can_be_repeated(
    storage: FaultFs, tmp_path: Path
) -> None:
    thin_image(storage.source / "disk.hds")
    images.write_delta(storage.source / "small.hds", SIZE // 2, {}, cluster_size=65536)
    served = storage.mountpoint / "disk.hds"
    with ServeProcess(served, directory=tmp_path) as server:
        (device,) = server.device_names()

        def play() -> None:
            storage.fail("disk.hds", "write", errno=errno.EIO)
            wait_for_standby(server, device, "on", 10)
            for wrong in ("missing.hds", "small.hds"):
                image = str(storage.mountpoint / wrong)
                result = server.ctl("device", "replace", device, "--image", image, check=False)
                assert result.returncode != 0
                assert wrong in result.stderr
                assert "Traceback" not in result.stderr
                assert server.standby(device) == "on"
            storage.clear()
            server.ctl("device", "replace", device, "--image", str(served))

        with Initiator(server.url) as initiator:
            initiator.settle()
            run_load_through(Load(initiator, Journal(6), range(SIZE // BLOCK)), play)
            initiator.logout()
        assert server.stop() == 0


def test_with_the_fuse_off_an_error_is_an_error(storage: FaultFs, tmp_path: Path) -> None:
    thin_image(storage.source / "disk.hds")
    served = storage.mountpoint / "disk.hds"
    options = ("--standby", "off")
    with ServeProcess(served, directory=tmp_path, options=options) as server:
        (device,) = server.device_names()
        assert server.standby(device) == "not supported"
        with Initiator(server.url) as initiator:
            initiator.settle()
            initiator.good(initiator.write(0, bytes([1]) * 4096))
            storage.fail("disk.hds", "write", errno=errno.EIO)
            answer = initiator.wait(initiator.write(0, bytes([2]) * 4096))
            assert answer.sense_text == "sense 03/0c/00"
            storage.clear()
            answer = initiator.wait(initiator.write(0, bytes([3]) * 4096))
            assert answer.sense_text.startswith("sense 07/27/"), "latched read-only"
            assert initiator.good(initiator.read(0, 8)) == bytes([1]) * 4096


def test_a_stalled_storage_stalls_only_its_own_lun(storage: FaultFs, tmp_path: Path) -> None:
    """Reads and writes hang: NOP-In, the other LUN and ploopctl answer within a second."""
    thin_image(storage.source / "disk.hds")
    healthy = thin_image(tmp_path / "healthy.hds")
    served = storage.mountpoint / "disk.hds"
    with ServeProcess(served, healthy, directory=tmp_path) as server:
        with Initiator(server.urls[0]) as stalled, Initiator(server.urls[1]) as other:
            for session in (stalled, other):
                session.settle()
                session.good(session.write(0, bytes([7]) * 65536))
            storage.hang("disk.hds", "read", "write", "fsync")
            tags = [stalled.read(n * 8, 8) for n in range(16)]
            tags += [stalled.write(n * 8, bytes([8]) * 4096) for n in range(16, 24)]
            assert stalled.poll(0.5) == []
            began = time.monotonic()
            for _ in range(5):
                for action in (
                    lambda: stalled.wait(stalled.nop(), 1.0),
                    lambda: stalled.good(stalled.test_unit_ready(), 1.0),
                    lambda: other.good(other.read(0, 128), 1.0),
                    lambda: other.good(other.write(128, bytes(4096)), 1.0),
                    lambda: other.good(other.synchronize_cache(), 1.0),
                ):
                    before = time.monotonic()
                    action()
                    assert time.monotonic() - before < 1.0
                server.ctl("device", "list", timeout=1.0)
            assert time.monotonic() - began < 15
            storage.clear()
            answered: set[int] = set()
            while len(answered) < len(tags):
                for answer in stalled.poll(10):
                    assert answer.status == 0, answer.sense_text
                    answered.add(answer.tag)
            assert answered == set(tags)
        assert server.stop() == 0


def test_a_daemon_whose_storage_hangs_can_be_stopped(storage: FaultFs, tmp_path: Path) -> None:
    thin_image(storage.source / "disk.hds")
    server = ServeProcess(storage.mountpoint / "disk.hds", directory=tmp_path)
    with server, Initiator(server.url) as initiator:
        initiator.settle()
        initiator.good(initiator.write(0, bytes([7]) * 65536))
        storage.hang("disk.hds", "read", "write", "fsync")
        initiator.read(0, 8)
        initiator.poll(0.3)
        server.stop(timeout=30)  # with or without an error, but it ends
