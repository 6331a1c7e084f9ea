"""Devices that the kernel has not finished making: it shows them, and may take them back."""

from __future__ import annotations

import pytest
import trio.testing

from ploopd.errors import BusyError
from ploopd.frontends.tcmu.uio import Kernel
from tests.unit.frontends.tcmu.rig import READ, SIZE, Rig

pytestmark = pytest.mark.trio


async def test_it_is_opened_when_it_is_made(rig: Rig, clock: trio.testing.MockClock) -> None:
    rig.machine.add(1)
    rig.machine.set(1, "enable", 0)
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.machine.value(1, "attrib/cmd_time_out") == "0")
    await trio.sleep(3)
    assert not rig.machine.files
    rig.machine.set(1, "enable", 1)
    await rig.until(lambda: rig.disk.bound)


async def test_commands_that_were_there_before_us_are_executed(
    rig: Rig, clock: trio.testing.MockClock
) -> None:
    """A LUN is linked as soon as the backstore is made, and asked who it is.  There is no handler
    before us whose commands would have to be repeated."""
    fake = rig.machine.add(1)
    rig.machine.set(1, "enable", 0)
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.machine.value(1, "attrib/cmd_time_out") == "0")
    fake.command(READ, expect=512)
    rig.machine.set(1, "enable", 1)
    await rig.until(fake.harvest)
    assert fake.answers[0].status == 0
    assert rig.machine.value(1, "action/reset_ring") == ""
    assert len(rig.machine.files) == 1


async def test_one_that_is_taken_back_is_never_opened(
    rig: Rig, clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    rig.machine.add(1)
    rig.machine.set(1, "enable", 0)
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.machine.value(1, "attrib/cmd_time_out") == "0")
    rig.machine.remove(1)
    await rig.until(lambda: rig.daemon.released == ["disk"])
    assert not rig.machine.files
    assert "tcmu-taken-back" in caplog.text
    rig.machine.fakes.pop(1)
    rig.machine.add(2)
    await rig.until(lambda: rig.disk.bound)


async def test_one_that_is_refused_is_not_opened_either(
    rig: Rig, clock: trio.testing.MockClock
) -> None:
    """Commands are answered for a disk that cannot be had, when the device is made."""
    fake = rig.machine.add(1, size=SIZE // 2)
    rig.machine.set(1, "enable", 0)
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.server.failure("b1"))
    await trio.sleep(3)
    assert not rig.machine.files
    rig.machine.set(1, "enable", 1)
    await rig.until(lambda: rig.machine.files, 60)
    fake.command(READ, expect=512)
    rig.file.kernel_end.send(b"\1\0\0\0")
    await rig.until(fake.harvest)
    assert fake.answers[0].status == 2


async def test_opening_one_is_an_error(rig: Rig) -> None:
    rig.machine.add(1)
    rig.machine.set(1, "enable", 0)
    with pytest.raises(BusyError, match="still being made"):
        Kernel.open(rig.machine, rig.machine.devices()[0])


async def test_a_question_that_nobody_was_there_to_answer(
    rig: Rig, clock: trio.testing.MockClock
) -> None:
    """The kernel has asked before we were there; whoever has promised to answer has gone."""
    parameters = rig.machine.sys / "module/target_core_user/parameters"
    parameters.mkdir(parents=True)
    for name in ("block_netlink", "reset_netlink"):
        (parameters / name).write_bytes(b"")
    rig.machine.add(1)
    rig.machine.set(1, "enable", 0)
    await rig.nursery.start(rig.server.serve)
    await rig.until((parameters / "reset_netlink").read_bytes)
    assert (parameters / "block_netlink").read_bytes() == b"1\n0\n"
    await trio.sleep(3)
    assert (parameters / "reset_netlink").read_bytes() == b"1\n"  # once
    rig.machine.set(1, "enable", 1)
    await rig.until(lambda: rig.disk.bound)


async def test_another_handler_may_still_answer(rig: Rig, clock: trio.testing.MockClock) -> None:
    parameters = rig.machine.sys / "module/target_core_user/parameters"
    parameters.mkdir(parents=True)
    (parameters / "block_netlink").write_bytes(b"")
    rig.server.another = True
    rig.machine.add(1)
    rig.machine.set(1, "enable", 0)
    await rig.nursery.start(rig.server.serve)
    await trio.sleep(4)
    assert (parameters / "block_netlink").read_bytes() == b""
