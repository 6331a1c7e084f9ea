"""A storage that acknowledges writes, loses them and then fails, as an initiator sees it.

The image lies on a fault file system that keeps writes in its memory until an fsync, as the client
of a network file system does, and that forgets them when it fails.  What was acknowledged and never
flushed must be on the disk after a replace; without the journal it is not.
"""

from __future__ import annotations

import errno
import shutil
import time
from pathlib import Path

import pytest

from tests.functional.test_standby_e2e import Director, thin_image, wait_for_standby
from tests.support import oracles
from tests.support.faultfs import FaultFs
from tests.support.images import MIB
from tests.support.initiator import Initiator
from tests.support.load import BLOCK, Journal, Load, LoadError, Mix
from tests.support.serve import ServeProcess
from tests.support.stage import Operator

pytestmark = [pytest.mark.functional, pytest.mark.fuse, pytest.mark.timeout(120)]

SIZE = 64 * MIB
OPTIONS = [(), ("--journal", "on"), ("--journal", "off")]


@pytest.mark.parametrize("back", ["the same path", "a copy from before"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options) or "auto")
def test_every_acknowledged_byte_is_there_after_a_replace(
    options: tuple[str, ...], back: str, storage: FaultFs, tmp_path: Path
) -> None:
    disk = thin_image(storage.source / "disk.hds")
    served = storage.mountpoint / "disk.hds"
    kept = options != ("--journal", "off")
    with ServeProcess(served, directory=tmp_path, options=options) as server:
        (device,) = server.device_names()
        with Initiator(server.url) as initiator:
            initiator.settle()
            storage.cache("disk.hds")
            expected = bytearray(64 * BLOCK)
            for block in range(48):
                data = bytes([block + 1]) * BLOCK
                initiator.good(initiator.write(block * 8, data))
                expected[block * BLOCK : (block + 1) * BLOCK] = data
                if block == 15:
                    initiator.good(initiator.synchronize_cache())
            initiator.good(initiator.write_zeroes(4 * 8, 16))
            expected[4 * BLOCK : 6 * BLOCK] = bytes(2 * BLOCK)
            initiator.good(initiator.unmap(20 * 8, 8))
            expected[20 * BLOCK : 21 * BLOCK] = bytes(BLOCK)
            shown = server.ctl_json("device", "show", device)["journal"]
            assert (shown is not None) == kept
            assert not kept or shown["data"] == 31 * BLOCK  # block 20 is zero again

            storage.clear()
            storage.fail("disk.hds", "write", "fsync", errno=errno.EIO, lose=True)
            last = initiator.write(63 * 8, b"z" * BLOCK)
            assert initiator.poll(0.2) == []  # sent, and not answered
            expected[63 * BLOCK :] = b"z" * BLOCK
            wait_for_standby(server, device, "on", 10)
            if back == "the same path":
                storage.clear()
                server.ctl("device", "replace", device, "--image", str(served))
            else:
                shutil.copyfile(disk, storage.source / "copy.hds")
                copy = str(storage.mountpoint / "copy.hds")
                server.ctl("device", "replace", device, "--image", copy, "--force")
            initiator.good(last)
            assert initiator.good(initiator.read(0, 16 * 8))[: 4 * BLOCK] == expected[: 4 * BLOCK]
            found = initiator.good(initiator.read(0, 64 * 8))
            assert (found == expected) == kept, "without the journal this storage must lose writes"
            shown = server.ctl_json("device", "show", device)["journal"]
            assert not kept or shown["requests"] == 1  # what came after the replay
            initiator.logout()
        assert server.stop() == 0
        assert "journal-lost" not in server.stderr


@pytest.mark.parametrize("kept", [True, False], ids=["journal", "no journal"])
def test_a_read_sees_what_the_storage_has_lost_before_it_says_so(
    kept: bool, storage: FaultFs, tmp_path: Path
) -> None:
    """The loss comes with a write whose error is answered a second later: reads meanwhile."""
    thin_image(storage.source / "disk.hds")
    served = storage.mountpoint / "disk.hds"
    options = ("--journal", "on" if kept else "off")
    with ServeProcess(served, directory=tmp_path, options=options) as server:
        (device,) = server.device_names()
        with Initiator(server.url) as initiator:
            initiator.settle()
            for block in range(32):
                initiator.good(initiator.write(block * 8, b"o" * BLOCK))
            initiator.good(initiator.synchronize_cache())
            storage.cache("disk.hds")
            expected = bytearray(b"o" * 32 * BLOCK)
            for block in range(16):
                data = bytes([block + 1]) * BLOCK
                initiator.good(initiator.write(block * 8, data))
                expected[block * BLOCK : (block + 1) * BLOCK] = data
            initiator.good(initiator.write_zeroes(4 * 8, 8))
            expected[4 * BLOCK : 5 * BLOCK] = bytes(BLOCK)
            storage.clear()
            storage.fail("disk.hds", "write", "fsync", errno=errno.EIO, lose=True, late=2)
            last = initiator.write(20 * 8, b"z" * BLOCK)
            deadline = time.monotonic() + 10
            while storage.status()["unsynced"]:
                assert initiator.poll(0.02) == []  # sent, and not answered
                assert time.monotonic() < deadline
            one = initiator.good(initiator.read(3 * 8, 8))
            first = initiator.good(initiator.read(0, 20 * 8))
            assert server.standby(device) == "off", "the error is known: nothing has been shown"
            assert initiator.poll(0.0) == []
            assert (one == expected[3 * BLOCK : 4 * BLOCK]) == kept
            assert (first == expected[: 20 * BLOCK]) == kept
            wait_for_standby(server, device, "on", 10)
            storage.clear()
            server.ctl("device", "replace", device, "--image", str(served))
            initiator.good(last)
            initiator.logout()
        assert server.stop() == 0, server.stderr[-3000:]


@pytest.mark.parametrize("options", [("--journal-size", "1M"), ("--journal", "off")])
def test_a_load_never_misses_what_was_acknowledged(
    options: tuple[str, ...], storage: FaultFs, tmp_path: Path
) -> None:
    """Three losses under load, with a journal so small that flushes are forced all the time."""
    disk = thin_image(storage.source / "disk.hds")
    served = storage.mountpoint / "disk.hds"
    mix = Mix(write=0.7, read=0.22, zero=0.02, unmap=0.02, flush=0.01, largest=8)
    journal = Journal(11)

    def run() -> None:
        with ServeProcess(served, directory=tmp_path, options=options) as server:
            (device,) = server.device_names()
            with Initiator(server.url) as initiator:
                initiator.settle()
                load = Load(initiator, journal, range(SIZE // BLOCK), mix=mix)
                for number in (errno.EIO, errno.ENOTCONN, errno.EBUSY):
                    storage.cache("disk.hds")
                    load.run(requests=400)

                    def play(number: int = number) -> None:
                        storage.clear()
                        storage.fail("disk.hds", "write", "fsync", errno=number, lose=True)
                        wait_for_standby(server, device, "on", 10)
                        storage.clear()
                        server.ctl("device", "replace", device, "--image", str(served))

                    director = Director(play)
                    director.start()
                    load.run(until=director.ended.is_set, stall=60)
                    director.join()
                    assert director.error is None, director.error
                    load.verify()
                initiator.logout()
            assert server.stop() == 0, server.stderr[-3000:]
            assert "Traceback" not in server.stderr

    if options == ("--journal", "off"):
        with pytest.raises(LoadError, match="expected version"):
            run()
        return
    run()
    seen = oracles.read_through_qemu([("parallels", disk)], tmp_path / "final.raw")
    assert journal.verify_file(seen, size=SIZE) > 0
    assert oracles.bat_problems(disk) == []


def test_a_steady_writer_that_never_flushes_stays_within_the_bound(
    storage: FaultFs, tmp_path: Path
) -> None:
    """Ten times the bound: flushes are forced, the memory is bounded, and nobody is refused."""
    thin_image(storage.source / "disk.hds")
    limit = 2 * MIB
    options = ("--journal-size", str(limit))
    with ServeProcess(
        storage.mountpoint / "disk.hds", directory=tmp_path, options=options
    ) as server:
        (device,) = server.device_names()
        with Initiator(server.url) as initiator, Operator(server.control, device) as operator:
            initiator.settle()
            syncs = storage.status()["seen"].get("fsync", 0)
            largest = 0
            for round_ in range(80):
                data = bytes([round_ + 1]) * 262144
                initiator.good(initiator.write(round_ % 16 * 4096, data))
                journal = operator.details().journal
                assert journal is not None
                largest = max(largest, journal.used)
            assert 0 < largest <= limit
            assert storage.status()["seen"]["fsync"] - syncs >= 9
            initiator.logout()
        assert server.stop() == 0
