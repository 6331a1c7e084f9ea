"""Finding, taking over, serving and letting go of the kernel's devices, with a kernel made of files
and memory.  What only a real kernel can show is in tests/kernel."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from ploopd.errors import StorageError
from ploopd.frontends.tcmu.server import TcmuServer
from tests.support.fake_tcmu import FakeKernel
from tests.support.memory_device import Completion
from tests.unit.frontends.tcmu.rig import READ, SIZE, Daemon, Disk, Machine, Rig
from tests.unit.scsi.harness import make_bench

pytestmark = pytest.mark.trio


async def test_a_device_that_is_there_is_served(rig: Rig, clock: trio.testing.MockClock) -> None:
    fake = rig.machine.add(3)
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.disk.bound)
    fake.command(READ, expect=4096)
    rig.file.kernel_end.send(b"\1\0\0\0")
    await rig.until(fake.harvest)
    assert fake.answers[0].data == bytes(4096)
    assert rig.machine.value(3, "attrib/cmd_time_out") == "0"
    assert rig.machine.value(3, "attrib/tmr_notification") == "1"


async def test_many_answers_are_told_at_once(rig: Rig, clock: trio.testing.MockClock) -> None:
    fake = rig.machine.add(0)
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.disk.bound)
    rig.file.tells()
    for _ in range(5):
        fake.command(READ, expect=512)
    rig.file.kernel_end.send(b"\1\0\0\0")
    await rig.until(fake.harvest)
    assert len(fake.answers) == 5
    assert rig.file.tells() == 1


async def test_a_device_that_comes_later_is_found(rig: Rig, clock: trio.testing.MockClock) -> None:
    await rig.nursery.start(rig.server.serve)
    rig.machine.add(1)
    await rig.until(lambda: rig.disk.bound)


async def test_a_removed_device_is_let_go(rig: Rig, clock: trio.testing.MockClock) -> None:
    rig.machine.add(1)
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.disk.bound)
    rig.machine.remove(1)
    rig.file.kernel_end.send(b"gone")
    await rig.until(lambda: rig.daemon.released)
    assert rig.file.closed
    assert rig.disk.bound == 0
    rig.machine.fakes[1].close()  # nobody holds a view of it


async def test_others_devices_are_left_alone(rig: Rig, clock: trio.testing.MockClock) -> None:
    rig.machine.add(1)
    name = rig.machine.sys / "class/uio/uio1/name"
    name.write_text("tcm-user/0/b1/rbd/pool/image\n")
    rig.machine.add(2)
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.disk.bound)
    assert len(rig.machine.files) == 1


async def test_a_larger_size_makes_the_disk_grow(rig: Rig, clock: trio.testing.MockClock) -> None:
    rig.machine.add(1, size=SIZE * 2)
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.disk.bound)
    assert (rig.disk.size, rig.machine.value(1, "attrib/dev_size")) == (SIZE * 2, str(SIZE * 2))


async def test_a_disk_that_cannot_grow_is_tried_again(
    rig: Rig, clock: trio.testing.MockClock
) -> None:
    rig.machine.add(1, size=SIZE * 2)
    rig.disk.problem = StorageError(errno.ENOSPC, "grow", path="disk.hds")
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.server.failure("b1"))
    assert "ENOSPC" in str(rig.server.failure("b1"))
    assert rig.disk.bound == 0
    rig.disk.problem = None
    await rig.until(lambda: rig.disk.bound, 40)
    assert rig.disk.size == SIZE * 2


async def test_every_backstore_of_a_disk_that_grows_is_told(
    rig: Rig, clock: trio.testing.MockClock
) -> None:
    """One makes it grow before it is served, and somebody else later."""
    rig.machine.add(1)
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.disk.bound == 1)
    rig.machine.add(2, size=SIZE * 2)
    await rig.until(lambda: rig.disk.bound == 2)
    await rig.until(lambda: rig.machine.value(1, "attrib/dev_size") == str(SIZE * 2))
    rig.disk.resize(SIZE * 3)
    for minor in (1, 2):
        await rig.until(lambda at=minor: rig.machine.value(at, "attrib/dev_size") == str(SIZE * 3))


async def test_a_smaller_size_is_refused_with_the_right_one(
    rig: Rig, clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    rig.machine.add(1, size=SIZE // 2)
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: "tcmu-failed" in caplog.text)
    assert f"size={SIZE}" in caplog.text
    failure = rig.server.failure("b1")
    assert failure is not None
    assert f"size={SIZE}" in str(failure)
    assert rig.server.failure("b2") is None
    assert rig.daemon.released == ["disk"]
    assert rig.disk.bound == 0


async def test_what_fails_is_tried_again_and_told_once(
    rig: Rig, clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    rig.machine.add(1)
    rig.machine.taken.add(1)
    await rig.nursery.start(rig.server.serve)
    await trio.sleep(60)
    assert caplog.text.count("tcmu-failed") == 1
    assert "another process" in str(rig.server.failure("b1"))
    rig.machine.taken.clear()
    await rig.until(lambda: rig.disk.bound, 40)
    assert rig.server.failure("b1") is None


async def test_a_clean_restart_resets_nothing(rig: Rig, clock: trio.testing.MockClock) -> None:
    fake = rig.machine.add(1)
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.disk.bound)
    fake.command(READ, expect=512)
    rig.file.kernel_end.send(b"\1\0\0\0")
    await rig.until(fake.harvest)
    await rig.server.shutdown(5)
    assert rig.disk.bound == 0
    fake.command(READ, expect=512)  # while nobody is there
    rig.restart()
    await rig.nursery.start(rig.server.serve)
    await rig.until(fake.harvest)
    assert rig.machine.value(1, "action/reset_ring") == ""
    assert not list(rig.state.glob("*.json")), "a note is good for one restart"


async def test_a_daemon_that_ends_early_does_not_switch_the_write_cache_off(
    rig: Rig, clock: trio.testing.MockClock
) -> None:
    """The kernel's emulate_write_cache is 0 until a daemon has said what is so."""
    rig.machine.add(1)
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.disk.bound)
    await rig.server.shutdown(5)
    assert rig.machine.value(1, "attrib/emulate_write_cache") == "0"
    rig.restart()
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.machine.value(1, "attrib/emulate_write_cache") == "1")
    assert rig.disk.unit.modes.write_cache


async def test_a_write_cache_that_was_switched_off_stays_off(
    rig: Rig, clock: trio.testing.MockClock
) -> None:
    rig.machine.add(1)
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.machine.value(1, "attrib/emulate_write_cache") == "1")
    await rig.until(lambda: list(rig.state.glob("*.agreed")))
    await rig.server.shutdown(5)
    rig.machine.set(1, "attrib/emulate_write_cache", 0)
    rig.restart()
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: not rig.disk.unit.modes.write_cache)


async def test_a_new_device_of_the_same_name_has_agreed_to_nothing(
    rig: Rig, clock: trio.testing.MockClock
) -> None:
    """targetcli deletes a backstore and makes it again: same name, same number, the defaults."""
    rig.machine.add(1)
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.machine.value(1, "attrib/emulate_write_cache") == "1")
    await rig.until(lambda: list(rig.state.glob("*.agreed")))
    await rig.server.shutdown(5)
    rig.machine.set(1, "attrib/emulate_write_cache", 0)
    rig.machine.set(1, "attrib/cmd_time_out", 30)
    rig.restart()
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.machine.value(1, "attrib/emulate_write_cache") == "1")
    assert rig.disk.unit.modes.write_cache


async def test_after_a_crash_the_ring_is_reset(rig: Rig, clock: trio.testing.MockClock) -> None:
    fake = rig.machine.add(1)
    fake.command(READ, expect=512)
    fake.command(READ, expect=512)
    fake.words[16] = 120  # somebody has answered one, and is gone
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.disk.bound)
    assert rig.machine.value(1, "action/reset_ring") == "1"
    assert rig.machine.value(1, "action/block_dev") == "0"
    fake.command(READ, expect=512)
    rig.file.kernel_end.send(b"\1\0\0\0")
    await rig.until(fake.harvest)


async def test_a_note_of_another_boot_is_worth_nothing(
    rig: Rig, clock: trio.testing.MockClock
) -> None:
    fake = rig.machine.add(1)
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.disk.bound)
    await rig.server.shutdown(5)
    (rig.machine.sys / "boot_id").write_text("boot-2\n")
    fake.command(READ, expect=512)
    rig.restart()
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.disk.bound)
    assert rig.machine.value(1, "action/reset_ring") == "1"


class TestWaitingCommands:
    @pytest.fixture
    async def rig(self, tmp_path: Path) -> AsyncIterator[Rig]:
        machine = Machine(tmp_path)
        bench = make_bench(SIZE, completion=Completion.MANUAL)
        bench.device.inline = False
        daemon = Daemon({"disk": Disk("disk", bench)})
        async with trio.open_nursery() as nursery:
            state = tmp_path / "state"
            yield Rig(machine, daemon, state, nursery, TcmuServer(daemon, state, kernel=machine))
            nursery.cancel_scope.cancel()

    async def begin(self, rig: Rig) -> FakeKernel:
        fake = rig.machine.add(1)
        await rig.nursery.start(rig.server.serve)
        await rig.until(lambda: rig.disk.bound)
        for _ in range(3):
            fake.command(READ, expect=512)
        rig.file.kernel_end.send(b"\1\0\0\0")
        await rig.until(lambda: len(rig.disk.bench.device.outstanding) == 3)
        return fake

    async def test_an_end_waits_for_what_runs(
        self, rig: Rig, clock: trio.testing.MockClock
    ) -> None:
        fake = await self.begin(rig)
        rig.nursery.start_soon(rig.server.shutdown, 5.0)
        await trio.sleep(1)
        rig.disk.bench.device.complete()
        await rig.until(lambda: rig.daemon.released)
        fake.harvest()
        assert [a.status for a in fake.answers] == [0, 0, 0]
        assert list(rig.state.glob("*.json")), "the next one may go on from here"

    async def test_what_does_not_end_is_given_back(
        self, rig: Rig, clock: trio.testing.MockClock
    ) -> None:
        fake = await self.begin(rig)
        await rig.server.shutdown(5)
        fake.harvest()
        assert [a.status for a in fake.answers] == [8, 8, 8]

    async def test_what_is_parked_is_given_back_at_once(
        self, rig: Rig, clock: trio.testing.MockClock
    ) -> None:
        fake = await self.begin(rig)
        rig.disk.parking = True
        before = trio.current_time()
        await rig.server.shutdown(1000)
        assert trio.current_time() - before < 1
        fake.harvest()
        assert [a.status for a in fake.answers] == [8, 8, 8]

    async def test_what_hangs_leaves_no_note(self, rig: Rig, clock: trio.testing.MockClock) -> None:
        await self.begin(rig)
        rig.disk.bench.device.cancellable = False
        await rig.server.shutdown(1)
        assert not list(rig.state.glob("*.json"))
        rig.disk.bench.device.complete()  # late: nobody is there any more


async def test_a_broken_ring_is_reset_and_served_again(
    rig: Rig, clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    fake = rig.machine.add(1)
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.disk.bound)
    fake.raw(bytes(8))  # an entry without a length
    rig.file.kernel_end.send(b"\1\0\0\0")
    await rig.until(lambda: len(rig.machine.files) == 2)
    await rig.until(lambda: rig.disk.bound)
    assert "ring is broken" in caplog.text
    assert rig.machine.value(1, "action/reset_ring") == "1"
