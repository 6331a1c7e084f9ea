"""Which errors are standby, per device, and what a latch is and how it ends: on the wire."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from ploopd.fileio.policy import filesystem_type, may_lose_written
from tests.functional.test_run_service import RunProcess, write_config
from tests.support import images, oracles
from tests.support.faultfs import FaultFs
from tests.support.images import MIB
from tests.support.initiator import GOOD, Initiator
from tests.support.serve import ServeError

pytestmark = [pytest.mark.functional, pytest.mark.fuse, pytest.mark.timeout(90)]

BLOCK = 4096
ONE, TWO = bytes([1]) * BLOCK, bytes([2]) * BLOCK


@pytest.fixture
def storage(storage: FaultFs) -> FaultFs:
    """With three images."""
    for name in ("with", "without", "off"):
        images.write_delta(storage.source / f"{name}.hds", 64 * MIB, {}, cluster_size=65536)
    return storage


def test_one_errno_is_standby_for_one_device_and_a_latch_for_another(
    storage: FaultFs, tmp_path: Path
) -> None:
    """EPROTO, with and without extra_standby_errnos; EIO where standby is off: side by side."""
    files = {name: str(storage.mountpoint / f"{name}.hds") for name in ("with", "without", "off")}
    write_config(
        tmp_path,
        f'image = "{files["with"]}"\nextra_standby_errnos = ["EPROTO"]',
        f'image = "{files["without"]}"',
        f'image = "{files["off"]}"\nstandby = false',
    )
    with RunProcess(*files.values(), directory=tmp_path) as server:
        first, second, third = (Initiator(url) for url in server.urls)
        with first, second, third:
            for session in (first, second, third):
                session.settle()
                session.good(session.write(0, ONE))
            states = {row["name"]: row["standby"] for row in server.ctl_json("device", "list")}
            assert states == {"with": "off", "without": "off", "off": "not supported"}
            storage.fail("with.hds", "write", errno=errno.EPROTO)
            storage.fail("without.hds", "write", errno=errno.EPROTO, count=1)
            storage.fail("off.hds", "write", errno=errno.EIO, count=1)
            parked = first.write(0, TWO)
            assert first.poll(0.5) == []
            assert server.standby("with") == "on"
            for session, name in ((second, "without"), (third, "off")):
                answer = session.wait(session.write(0, TWO))
                assert answer.sense_text == "sense 03/0c/00"
                assert session.wait(session.write(8, TWO)).sense_text == "sense 07/27/00"
                assert session.good(session.read(0, 8)) == ONE
                assert server.ctl_json("device", "show", name)["latched"]
                assert server.ctl_json("device", "show", name)["state"] == "active"
            storage.clear()
            server.ctl("device", "replace", "with", "--image", files["with"])
            first.good(parked)
            assert first.good(first.read(0, 8)) == TWO
            # One latch ends by an operator's order, the other one by a replace.
            server.ctl("device", "clear-latch", "without")
            server.ctl("device", "replace", "off", "--image", files["off"])
            for session, name in ((second, "without"), (third, "off")):
                assert server.ctl_json("device", "show", name)["latched"] is None
                assert session.wait(session.write(0, TWO)).status == GOOD
                assert session.good(session.read(0, 8)) == TWO
        assert server.stop() == 0, server.stderr[-2000:]
    for name in files:
        assert oracles.in_use_word(storage.source / f"{name}.hds") == 0


@pytest.mark.parametrize("first", ["ESTALE", "EBADFD", "ETIMEDOUT", "ESHUTDOWN", "ENETDOWN"])
def test_what_a_client_of_the_network_answers_first_is_standby_by_default(
    first: str, storage: FaultFs, tmp_path: Path
) -> None:
    """A FUSE file system is one; moved to a local one, the device has the contract's three."""
    image = storage.mountpoint / "with.hds"
    write_config(tmp_path, f'image = "{image}"')
    with RunProcess(image, directory=tmp_path) as server:
        remote = server.ctl_json("device", "show", "with")["standby_errnos"]
        assert remote[:3] == ["EIO", "EBUSY", "ENOTCONN"]
        assert first in remote
        with Initiator(server.urls[0]) as session:
            session.settle()
            storage.fail("with.hds", "write", errno=getattr(errno, first))
            parked = session.write(0, ONE)
            assert session.poll(0.3) == []
            assert server.standby("with") == "on"
            local = tmp_path / "local.hds"
            shutil.copyfile(storage.source / "with.hds", local)
            server.ctl("device", "replace", "with", "--image", str(local), "--force")
            session.good(parked)
            assert session.good(session.read(0, 8)) == ONE
        now = server.ctl_json("device", "show", "with")["standby_errnos"]
        assert (first in now) == (may_lose_written(filesystem_type(local.stat().st_dev)))
        assert now[:3] == remote[:3]
        storage.clear()
        assert server.stop() == 0, server.stderr[-2000:]


def test_a_client_that_dies_with_requests_in_execution_is_standby(
    storage: FaultFs, tmp_path: Path
) -> None:
    """The kernel answers ECONNABORTED to what a FUSE process had, and only then ENOTCONN."""
    image = storage.mountpoint / "with.hds"
    write_config(tmp_path, f'image = "{image}"')
    with RunProcess(image, directory=tmp_path) as server:
        with Initiator(server.urls[0]) as session:
            session.settle()
            storage.hang("with.hds", "write")
            tags = [session.write(8 * index, ONE) for index in range(8)]
            assert session.poll(0.5) == []
            storage.kill()
            assert session.poll(0.5) == []
            assert server.standby("with") == "on"
            local = tmp_path / "local.hds"
            shutil.copyfile(storage.source / "with.hds", local)
            server.ctl("device", "replace", "with", "--image", str(local), "--force")
            waiting = set(tags)
            while waiting:
                answers = session.poll(20)
                assert answers, "no answer"
                assert [each.sense_text for each in answers if each.status != GOOD] == []
                waiting -= {answer.tag for answer in answers}
            assert session.good(session.read(0, 64)) == ONE * 8
        assert server.stop() == 0, server.stderr[-2000:]


@pytest.mark.parametrize("wrong", ["ENOSPC", "EDQUOT", "EROFS"])
def test_an_errno_that_recovers_by_itself_is_refused_by_name(wrong: str, tmp_path: Path) -> None:
    image = images.write_delta(tmp_path / "disk.hds", 16 * MIB, {})
    write_config(tmp_path, f'image = "{image}"\nextra_standby_errnos = ["ESTALE", "{wrong}"]')
    with pytest.raises(ServeError) as refusal:
        RunProcess(image, directory=tmp_path).start()
    text = str(refusal.value)
    for part in ("ploopd.toml", "extra_standby_errnos", wrong, "cannot put a device into standby"):
        assert part in text
    assert oracles.in_use_word(image) == 0
