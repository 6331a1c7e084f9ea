"""What happens between two steps: deaths, cancellations, names that are used again."""

from __future__ import annotations

import socket

import pytest
import trio
import trio.testing

from ploopd.disownable import disownable
from ploopd.frontends.tcmu import attachment, netlink, server
from ploopd.frontends.tcmu.uio import UioDevice
from tests.support.memory_device import Completion
from tests.unit.frontends.tcmu.rig import READ, SIZE, Disk, Rig, Wakeable
from tests.unit.scsi.harness import cdb10, make_bench

pytestmark = pytest.mark.trio

Clock = trio.testing.MockClock
WRITE = cdb10(0x2A, 0, 8)[:10]


async def serve(rig: Rig) -> None:
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.disk.bound)


async def test_answers_that_nobody_was_told_of(rig: Rig, clock: Clock) -> None:
    """A handler died after its answer and before its write(2)."""
    rig.machine.add(1)
    await serve(rig)
    assert rig.file.tells() == 1


async def test_a_device_that_was_left_blocked(rig: Rig, clock: Clock) -> None:
    """A handler died between blocking the device and serving it; its ring is empty."""
    rig.machine.add(1)
    rig.machine.action(UioDevice(minor=1, name=rig.machine.devices()[0].name), "block_dev", 1)
    await serve(rig)
    assert rig.machine.value(1, "action/block_dev") == "0"


async def test_an_end_in_the_middle_of_an_attach(
    rig: Rig, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel does not come back from the last step: what is open is closed."""
    fake = rig.machine.add(1)
    reached = trio.Event()

    async def hanging(blocking: object, **options: object) -> object:
        if getattr(blocking, "args", ())[1:] == ("block_dev", 0):
            reached.set()
            await trio.sleep_forever()
        return await disownable(blocking, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(attachment, "disownable", hanging)
    await rig.nursery.start(rig.server.serve)
    await reached.wait()
    await rig.server.shutdown(5)
    assert rig.file.closed
    assert rig.daemon.released == ["disk"]
    fake.close()  # nobody holds a view of it


async def test_a_device_that_appears_while_we_look(rig: Rig, clock: Clock) -> None:
    """It was told of after the look had begun; without another one it would wait for seconds."""
    rig.server._interval = 3600
    looked = rig.machine.devices

    def slow() -> list[UioDevice]:
        found = looked()
        if not rig.machine.fakes:
            rig.machine.add(1)
            trio.from_thread.run_sync(rig.server._wake.set)
        return found

    await rig.nursery.start(rig.server.serve)
    rig.machine.devices = slow  # type: ignore[method-assign]
    rig.server._wake.set()
    await rig.until(lambda: rig.disk.bound)


async def test_the_same_name_in_two_hbas(rig: Rig, clock: Clock) -> None:
    rig.machine.add(1)
    rig.machine.add(2)
    (rig.machine.sys / "class/uio/uio2/name").write_text("tcm-user/7/b1/ploop/disk\n")
    directory = rig.machine.sys / "kernel/config/target/core"
    (directory / "user_7").mkdir()
    (directory / "user_0/b2").rename(directory / "user_7/b1")
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.disk.bound == 2)
    for minor, file in ((1, rig.machine.files[0]), (2, rig.machine.files[1])):
        rig.machine.remove(minor)
        file.kernel_end.send(b"gone")
    await rig.until(lambda: rig.daemon.released == ["disk", "disk"])


async def test_the_same_device_again_at_once(rig: Rig, clock: Clock) -> None:
    """Deleted and made again, with the same number and name, before the first one was let go."""
    rig.machine.add(1)
    await serve(rig)
    first = rig.file
    rig.machine.fakes[1] = type(rig.machine.fakes[1])()
    first.kernel_end.send(b"gone")
    await rig.until(lambda: len(rig.machine.files) == 2)
    await rig.until(lambda: rig.disk.bound == 1)
    rig.machine.fakes[1].command(READ, expect=512)
    rig.file.kernel_end.send(b"\1\0\0\0")
    await rig.until(rig.machine.fakes[1].harvest)
    assert rig.machine.value(1, "action/reset_ring") == ""


async def test_one_busy_device_lets_others_have_their_turn(rig: Rig, clock: Clock) -> None:
    """However many commands there are, the kernel hears of answers after a bounded number."""
    fake = rig.machine.add(1)
    fake.__init__(ring_size=1 << 20)  # type: ignore[misc]
    await serve(rig)
    rig.file.tells()
    for _ in range(600):
        fake.command(bytes(6))  # TEST UNIT READY
    rig.file.kernel_end.send(b"\1\0\0\0")
    await rig.until(lambda: fake.harvest() is not None and len(fake.answers) == 600)
    assert 3 <= rig.file.tells() <= 20


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_command_that_comes_as_its_wake_up_is_taken(
    rig: Rig, clock: Clock, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """It is seen although nothing wakes for it any more, or once although something does."""
    fake = rig.machine.add(1)
    acknowledge = Wakeable.acknowledge
    came = False

    def with_a_command(file: Wakeable) -> bool:
        nonlocal came
        new, came = not came, True
        if new and moment == "before":
            fake.command(READ, expect=4096)
            file.kernel_end.send(b"\1\0\0\0")
        result = acknowledge(file)
        if new and moment == "after":
            fake.command(READ, expect=4096)
            file.kernel_end.send(b"\1\0\0\0")
        return result

    monkeypatch.setattr(Wakeable, "acknowledge", with_a_command)
    await serve(rig)
    await rig.until(fake.harvest)
    fake.command(READ, expect=4096)
    rig.file.kernel_end.send(b"\1\0\0\0")
    await rig.until(fake.harvest)
    assert [answer.status for answer in fake.answers] == [0, 0]


async def test_nobody_sleeps_without_the_loop_where_others_may_wait(
    rig: Rig, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = [rig.machine.add(minor) for minor in (1, 2)]
    await rig.nursery.start(rig.server.serve)
    await rig.until(lambda: rig.disk.bound == 2)
    for attached in rig.server.attached.values():
        monkeypatch.setattr(attached, "_waiter", None)
    for _ in range(3):
        for file in rig.machine.files:
            file.fake.command(READ, expect=4096)
            file.kernel_end.send(b"\1\0\0\0")
        for fake in fakes:
            await rig.until(fake.harvest)


async def test_commands_that_never_stop_coming_let_others_have_their_turn(
    rig: Rig, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the kernel is told of an answer the next command is there, for ever."""
    fake = rig.machine.add(1)
    await serve(rig)
    tell = Wakeable.tell

    def and_again(file: Wakeable) -> None:
        tell(file)
        file.tells()
        fake.harvest()
        fake.command(READ, expect=512)

    with monkeypatch.context() as patch:
        patch.setattr(Wakeable, "tell", and_again)
        fake.command(READ, expect=512)
        rig.file.kernel_end.send(b"\1\0\0\0")
        turns = []
        for _ in range(10):
            before = len(fake.answers)
            await trio.lowlevel.checkpoint()
            turns.append(len(fake.answers) - before)
    assert 0 < max(turns) <= 2 * attachment.TURN, "trio runs what is ready in any order"


async def test_netlink_that_comes_later_is_used(
    rig: Rig, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon was there before the kernel's module."""
    tries = 0

    async def subscribe() -> tuple[trio.socket.SocketType, netlink.Family]:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise netlink.NetlinkError("no such family")
        ours, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        return trio.socket.from_stdlib_socket(ours), netlink.Family(message_type=30, group=2)

    monkeypatch.setattr(server, "_subscribe", subscribe)
    await rig.nursery.start(rig.server.serve)
    assert tries == 1
    await trio.sleep(60)
    assert tries == 3


class TestSlowStorage:
    @pytest.fixture
    async def rig(self, rig: Rig) -> Rig:
        bench = make_bench(SIZE, completion=Completion.MANUAL)
        bench.device.inline = False
        rig.daemon.disks["disk"] = Disk("disk", bench)
        return rig

    async def test_a_broken_ring_is_not_reset_before_its_writes_have_ended(
        self, rig: Rig, clock: Clock
    ) -> None:
        """The kernel repeats what a reset gives back; a write that ends after its repetition would
        undo what came later."""
        fake = rig.machine.add(1)
        await serve(rig)
        fake.command(WRITE, out=b"x" * 4096)
        rig.file.kernel_end.send(b"\1\0\0\0")
        device = rig.disk.bench.device
        await rig.until(lambda: device.outstanding)
        device.cancellable = False
        fake.raw(bytes(8))  # an entry without a length
        rig.file.kernel_end.send(b"\1\0\0\0")
        await rig.until(lambda: not rig.disk.bound)
        await trio.sleep(60)
        assert rig.machine.value(1, "action/reset_ring") == ""
        device.complete()
        await rig.until(lambda: rig.disk.bound)
        assert rig.machine.value(1, "action/reset_ring") == "1"

    async def test_nonsense_that_is_found_while_answering(
        self, rig: Rig, clock: Clock, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Completions come from the engine, which must not hear of it."""
        fake = rig.machine.add(1)
        await serve(rig)
        fake.command(READ, expect=512)
        rig.file.kernel_end.send(b"\1\0\0\0")
        device = rig.disk.bench.device
        await rig.until(lambda: device.outstanding)
        fake.words[16] = 12345678  # a tail far outside of the ring
        device.complete()
        await rig.until(lambda: "tcmu-reset" in caplog.text and rig.disk.bound)
        assert "ring is broken" in caplog.text
        assert rig.machine.value(1, "action/reset_ring") == "1"
