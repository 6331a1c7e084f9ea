"""Clocks and tasks while a device is in standby, on the wire: what is parked is answered in time or
dropped at once, and nothing that was dropped ever reaches the image."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import images, oracles
from tests.support.faultfs import FaultFs
from tests.support.images import MIB
from tests.support.initiator import GOOD, Answer, ConnectionLostError, Initiator
from tests.support.serve import ServeProcess

pytestmark = [pytest.mark.functional, pytest.mark.timeout(120)]

ABORT_TASK, ABORT_TASK_SET, CLEAR_TASK_SET, UNIT_RESET, WARM_RESET, COLD_RESET = 1, 2, 4, 5, 6, 7
BUSY = 0x08
COMPLETE = 0
AT_ONCE = 5.0
"""Seconds on a machine that does much else; parked requests wait for 20."""
BLOCK = 4096
COUNT = 8
BEFORE, PARKED, AFTER = bytes([1]) * BLOCK, bytes([2]) * BLOCK, bytes([3]) * BLOCK


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return images.write_delta(tmp_path / "disk.hds", 64 * MIB, {}, cluster_size=65536)


@pytest.fixture
def server(image: Path, tmp_path: Path) -> Iterator[ServeProcess]:
    with ServeProcess(image, directory=tmp_path) as process:
        yield process


def enter(server: ServeProcess) -> None:
    server.ctl("device", "standby", "disk", "enter")
    assert server.standby("disk") == "on"


def leave(server: ServeProcess) -> None:
    server.ctl("device", "standby", "disk", "leave")
    assert server.standby("disk") == "off"


def parked(server: ServeProcess) -> int:
    return int(server.ctl_json("device", "show", "disk")["parked_requests"])


def wait_until_parked(server: ServeProcess, count: int) -> None:
    deadline = time.monotonic() + 10
    while (seen := parked(server)) != count:
        assert time.monotonic() < deadline, f"{seen} requests are parked, not {count}"
        time.sleep(0.02)


def prepare(initiator: Initiator) -> None:
    initiator.settle()
    for index in range(COUNT):
        initiator.good(initiator.write(index * 8, BEFORE))


def park_writes(server: ServeProcess, initiator: Initiator) -> list[int]:
    """Writes that the gate has parked: small ones, and one that needs R2Ts, which is the last."""
    tags = [initiator.write(index * 8, PARKED) for index in range(COUNT)]
    tags.append(initiator.write(1024, bytes([2]) * (256 << 10)))
    deadline = time.monotonic() + 10
    while parked(server) < len(tags):
        assert initiator.poll(0.02) == []
        assert time.monotonic() < deadline
    return tags


def untouched(initiator: Initiator) -> None:
    """Nothing that was parked has reached the disk."""
    for index in range(COUNT):
        assert initiator.good(initiator.read(index * 8, 8)) == BEFORE
    assert not any(initiator.good(initiator.read(1024, 512)))


def timed(initiator: Initiator, tag: int) -> tuple[Answer, float]:
    began = time.monotonic()
    return initiator.wait(tag), time.monotonic() - began


@pytest.mark.parametrize("function", [ABORT_TASK, ABORT_TASK_SET, CLEAR_TASK_SET])
def test_aborted_parked_writes_are_answered_for_at_once_and_never_land(
    function: int, server: ServeProcess
) -> None:
    with Initiator(server.url) as initiator:
        prepare(initiator)
        enter(server)
        tags = park_writes(server, initiator)
        for victim in tags if function == ABORT_TASK else tags[:1]:
            answer, seconds = timed(initiator, initiator.task_management(function, victim))
            assert answer.status == COMPLETE
            assert seconds < AT_ONCE
        assert parked(server) == 0
        tag = initiator.write(0, AFTER)
        wait_until_polled(server, initiator, 1)
        leave(server)
        assert initiator.wait(tag).status == GOOD
        assert initiator.poll(0.3) == []  # those that were aborted are never answered
        initiator.good(initiator.write(0, BEFORE))
        untouched(initiator)


def wait_until_polled(server: ServeProcess, initiator: Initiator, count: int) -> None:
    """The initiator sends what it has; until `count` requests are parked."""
    deadline = time.monotonic() + 10
    while parked(server) < count:
        assert initiator.poll(0.02) == []
        assert time.monotonic() < deadline


@pytest.mark.parametrize("function", [UNIT_RESET, WARM_RESET, COLD_RESET])
def test_a_reset_drops_what_is_parked_and_every_nexus_is_told(
    function: int, server: ServeProcess
) -> None:
    with Initiator(server.url) as initiator, Initiator(server.url) as other:
        prepare(initiator)
        other.settle()
        enter(server)
        park_writes(server, initiator)
        theirs = other.write(0, PARKED)
        wait_until_polled(server, other, COUNT + 2)
        answer, seconds = timed(initiator, initiator.task_management(function))
        assert answer.status == COMPLETE
        assert seconds < AT_ONCE
        assert parked(server) == 0
        leave(server)
        for session in (initiator, other):
            if function == COLD_RESET:  # which also ends the sessions
                with pytest.raises(ConnectionLostError):
                    use_it(session)
                continue
            told = session.wait(session.test_unit_ready())
            assert told.sense_text == "sense 06/29/03"
            session.good(session.test_unit_ready())
        if function != COLD_RESET:
            assert theirs not in [each.tag for each in other.poll(0.2)]
        with Initiator(server.url) as fresh:
            fresh.settle()
            untouched(fresh)


def use_it(session: Initiator) -> None:
    for _ in range(100):
        session.wait(session.test_unit_ready(), 1.0)


def test_clear_task_set_tells_the_others(server: ServeProcess) -> None:
    with Initiator(server.url) as initiator, Initiator(server.url) as other:
        prepare(initiator)
        other.settle()
        enter(server)
        other.write(0, PARKED)
        wait_until_polled(server, other, 1)
        answer, _ = timed(initiator, initiator.task_management(CLEAR_TASK_SET))
        assert answer.status == COMPLETE
        assert parked(server) == 0
        assert other.wait(other.test_unit_ready()).sense_text == "sense 06/2f/00"
        initiator.good(initiator.test_unit_ready())
        leave(server)
        untouched(initiator)


@pytest.mark.parametrize("end", ["logout", "drop", "reinstate"])
def test_a_session_that_ends_takes_what_it_has_parked_with_it(
    end: str, server: ServeProcess
) -> None:
    name = "iqn.2026-01.org.ploopd:ends"
    initiator = Initiator(server.url, name=name)
    prepare(initiator)
    enter(server)
    park_writes(server, initiator)
    began = time.monotonic()
    if end == "logout":
        initiator.logout()
    elif end == "drop":
        initiator.close()
    with Initiator(server.url, name=name, isid=initiator.isid) as again:
        wait_until_parked(server, 0)
        assert time.monotonic() - began < AT_ONCE
        again.settle()  # TEST UNIT READY is answered in standby
        again.wait(again.nop(), AT_ONCE)
        leave(server)
        untouched(again)
        again.good(again.write(0, AFTER))
    initiator.close()


def test_parked_commands_are_busy_after_park_max_and_never_land(
    image: Path, tmp_path: Path
) -> None:
    options = ("--park-max", "1.5")
    server = ServeProcess(image, directory=tmp_path, options=options)
    with server, Initiator(server.url) as initiator:
        prepare(initiator)
        enter(server)
        began = time.monotonic()
        tags = [initiator.write(index * 8, PARKED) for index in range(COUNT)]
        tags += [initiator.read(0, 8), initiator.synchronize_cache()]
        answers: dict[int, int] = {}
        while len(answers) < len(tags):
            answers |= {answer.tag: answer.status for answer in initiator.poll(10)}
            assert time.monotonic() - began < 20
        assert answers == dict.fromkeys(tags, BUSY)
        assert 1.4 < time.monotonic() - began < 1.5 + AT_ONCE
        leave(server)
        untouched(initiator)
        for index in range(COUNT):  # what an initiator does with BUSY
            initiator.good(initiator.write(index * 8, AFTER))
        assert initiator.good(initiator.read(0, 8)) == AFTER


def test_parked_for_ever_means_until_somebody_acts(image: Path, tmp_path: Path) -> None:
    options = ("--park-max", "forever")
    server = ServeProcess(image, directory=tmp_path, options=options)
    with server, Initiator(server.url) as initiator:
        prepare(initiator)
        enter(server)
        tags = [initiator.write(0, AFTER), initiator.write(8, PARKED)]
        assert initiator.poll(2.0) == []
        answer, _ = timed(initiator, initiator.task_management(ABORT_TASK, tags[1]))
        assert answer.status == COMPLETE
        leave(server)
        initiator.good(tags[0])
        assert initiator.good(initiator.read(0, 16)) == AFTER + BEFORE


def test_a_target_that_stops_executes_nothing_of_what_is_parked(
    image: Path, tmp_path: Path
) -> None:
    """The storage works; an operator has entered standby: the image is closed cleanly."""
    server = ServeProcess(image, directory=tmp_path)
    with server, Initiator(server.url) as initiator:
        prepare(initiator)
        initiator.good(initiator.synchronize_cache())
        enter(server)
        park_writes(server, initiator)
        began = time.monotonic()
        assert server.stop() == 8, "the exit code tells of requests that were not executed"
        assert time.monotonic() - began < 30
        assert "not executed" in server.stderr
    assert oracles.in_use_word(image) == 0
    with ServeProcess(image, directory=tmp_path) as second, Initiator(second.url) as initiator:
        initiator.settle()
        untouched(initiator)


@pytest.mark.fuse
@pytest.mark.parametrize("alive", [True, False])
def test_a_target_that_stops_in_standby_leaves_an_image_that_opens_again(
    alive: bool, tmp_path: Path
) -> None:
    """The storage has failed: the in-use word stays, the next daemon checks the image, and nothing
    parked has landed, whether the storage works when the daemon ends or not."""
    missing = oracles.missing_for_fuse()
    if missing is not None:
        pytest.skip(missing)
    source = tmp_path / "source"
    source.mkdir()
    disk = images.write_delta(source / "disk.hds", 64 * MIB, {}, cluster_size=65536)
    with FaultFs(source, tmp_path / "mount") as storage:
        server = ServeProcess(storage.mountpoint / "disk.hds", directory=tmp_path)
        with server, Initiator(server.url) as initiator:
            prepare(initiator)
            initiator.good(initiator.synchronize_cache())
            storage.fail("disk.hds", "write", "fsync", errno=errno.ENOTCONN)
            park_writes(server, initiator)
            assert server.standby("disk") == "on"
            if alive:
                storage.clear()
            began = time.monotonic()
            assert server.stop(timeout=40) == 8
            assert time.monotonic() - began < 40
        storage.clear()
        assert oracles.in_use_word(disk) != 0
        with ServeProcess(storage.mountpoint / "disk.hds", directory=tmp_path) as second:
            with Initiator(second.url) as initiator:
                initiator.settle()
                untouched(initiator)
                initiator.good(initiator.write(0, AFTER))
            assert second.stop() == 0
    assert oracles.in_use_word(disk) == 0
    assert oracles.bat_problems(disk) == []


@pytest.mark.fuse
def test_entering_standby_waits_for_what_is_being_executed(tmp_path: Path) -> None:
    """When `enter` has returned the image may be copied: everything answered later is parked."""
    source = tmp_path / "source"
    source.mkdir()
    delta = images.write_delta(source / "disk.hds", 64 * MIB, {}, cluster_size=65536)
    with FaultFs(source, tmp_path / "mount") as storage:
        server = ServeProcess(storage.mountpoint / "disk.hds", directory=tmp_path)
        with server, Initiator(server.url) as initiator:
            prepare(initiator)
            initiator.good(initiator.synchronize_cache())
            storage.delay("disk.hds", "write", seconds=1.0)
            tag = initiator.write(0, AFTER)
            assert initiator.poll(0.3) == []
            enter(server)
            seen = oracles.read_through_qemu(
                [("parallels", closed_copy(delta))], tmp_path / "seen.raw"
            )
            assert seen.read_bytes()[:BLOCK] == AFTER
            initiator.good(tag)


def closed_copy(delta: Path) -> Path:
    """A copy that QEMU opens although the original is in use."""
    copy = delta.with_name("copy.hds")
    content = bytearray(delta.read_bytes())
    content[44:48] = bytes(4)
    copy.write_bytes(content)
    return copy


@pytest.mark.fuse
def test_a_storage_that_hangs_is_not_waited_for_when_standby_is_entered(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    images.write_delta(source / "disk.hds", 64 * MIB, {}, cluster_size=65536)
    with FaultFs(source, tmp_path / "mount") as storage:
        server = ServeProcess(storage.mountpoint / "disk.hds", directory=tmp_path)
        with server, Initiator(server.url) as initiator:
            prepare(initiator)
            storage.hang("disk.hds", "write")
            tag = initiator.write(0, AFTER)
            assert initiator.poll(0.3) == []
            told = server.ctl("device", "standby", "disk", "enter").stderr
            assert "1 requests have not come back from the storage" in told
            storage.clear()
            storage.release()
            initiator.good(tag)
            leave(server)
