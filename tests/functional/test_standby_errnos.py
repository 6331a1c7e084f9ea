"""Which errors are standby, per device, and what a latch is and how it ends: on the wire."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

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
def storage(tmp_path: Path) -> Iterator[FaultFs]:
    missing = oracles.missing_for_fuse()
    if missing is not None:
        pytest.skip(missing)
    source = tmp_path / "source"
    source.mkdir()
    for name in ("with", "without", "off"):
        images.write_delta(source / f"{name}.hds", 64 * MIB, {}, cluster_size=65536)
    with FaultFs(source, tmp_path / "mount") as fs:
        yield fs


def test_one_errno_is_standby_for_one_device_and_a_latch_for_another(
    storage: FaultFs, tmp_path: Path
) -> None:
    """ESTALE, with and without extra_standby_errnos; EIO where standby is off: side by side."""
    files = {name: str(storage.mountpoint / f"{name}.hds") for name in ("with", "without", "off")}
    write_config(
        tmp_path,
        f'image = "{files["with"]}"\nextra_standby_errnos = ["ESTALE"]',
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
            storage.fail("with.hds", "write", errno=errno.ESTALE)
            storage.fail("without.hds", "write", errno=errno.ESTALE, count=1)
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
