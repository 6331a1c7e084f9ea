"""The handlers on a real device table with an image on disk."""

from __future__ import annotations

import contextlib
import errno
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from ploopd.control import messages
from ploopd.control.automation import Automation
from ploopd.control.context import ControlContext
from ploopd.control.event_log import EventLog
from ploopd.control.handlers import all_operations
from ploopd.control.server import Operation
from ploopd.device_table import DeviceTable
from ploopd.devices import DeviceOptions, Environment
from ploopd.errors import BusyError, ExitCode, NotFoundError, PloopError, StorageError, UsageError
from ploopd.fileio.engine import make_engine
from ploopd.storage.create import create_image
from ploopd.storage.journaling import JournalMode
from scst_shim import StandbyCheck

SIZE = 16 << 20


class Daemon:
    """The operations by name, and the devices they work on."""

    def __init__(self, devices: DeviceTable) -> None:
        self.devices = devices
        self.steps: list[messages.Message] = []
        context = ControlContext(
            devices=devices,
            urls=lambda name: [f"iscsi://127.0.0.1:3260/iqn.2026-11.org.ploopd:x/{name}"],
            iqn="iqn.2026-11.org.ploopd:x",
            portals=["127.0.0.1:3260"],
            version="1.2.3",
            started=devices.env.clock() - 5.0,
            event_log=EventLog(devices.env.events),
            automation=Automation(Path("/nonexistent")),
        )
        self._operations: dict[str, Operation] = {
            each.method.name: each for each in all_operations(context)
        }

    async def call(self, name: str, parameters: messages.Message) -> messages.Message:
        async def send(step: messages.Message) -> None:
            self.steps.append(step)

        operation = self._operations[name]
        assert isinstance(parameters, operation.method.parameters)
        reply = await operation.handler(parameters, send)
        assert isinstance(reply, operation.method.reply)
        return reply

    async def standby(self, action: str) -> str:
        reply = await self.call(f"Standby{action}", messages.DeviceName(name="disk"))
        assert isinstance(reply, messages.StandbyState)
        return reply.standby


@contextlib.asynccontextmanager
async def running(directory: Path, options: DeviceOptions | None = None) -> AsyncIterator[Daemon]:
    create_image(directory / "disk.hds", SIZE)
    engine = make_engine("threads")
    check = StandbyCheck()
    check.enable()
    env = Environment(engine=engine, buffers=engine.buffers, check=check, clock=trio.current_time)
    table = DeviceTable(env)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        await nursery.start(table.run)
        device = await table.add(str(directory / "disk.hds"), options)
        device.bind()
        yield Daemon(table)
        assert await table.close() == []
        nursery.cancel_scope.cancel()
    engine.close()


@pytest.mark.trio
async def test_every_method_of_the_interface_has_one_handler(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        assert sorted(daemon._operations) == sorted(method.name for method in messages.METHODS)


@pytest.mark.trio
async def test_info_list_and_show(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        info = await daemon.call("GetInfo", messages.Empty())
        assert isinstance(info, messages.DaemonInfo)
        assert (info.version, info.devices) == ("1.2.3", 1)
        assert info.uptime >= 5.0
        listing = await daemon.call("ListDevices", messages.Empty())
        assert listing == messages.DeviceList(
            devices=[
                messages.DeviceSummary(
                    name="disk",
                    image=str(tmp_path / "disk.hds"),
                    size=SIZE,
                    standby="off",
                    urls=["iscsi://127.0.0.1:3260/iqn.2026-11.org.ploopd:x/disk"],
                )
            ]
        )
        shown = await daemon.call("ShowDevice", messages.DeviceName(name="disk"))
        assert isinstance(shown, messages.ShowReply)
        device = shown.device
        assert (device.format_version, device.cluster_size, device.allocated) == (2, 1 << 20, 0)
        assert (device.state, device.reason, device.parked_requests) == ("active", None, 0)
        assert [layer.path for layer in device.layers] == [str(tmp_path / "disk.hds")]
        assert uuid.UUID(device.identity).version is not None


@pytest.mark.trio
async def test_show_says_how_full_the_journal_is(tmp_path: Path) -> None:
    async def shown(daemon: Daemon) -> messages.JournalDetails | None:
        reply = await daemon.call("ShowDevice", messages.DeviceName(name="disk"))
        assert isinstance(reply, messages.ShowReply)
        return reply.device.journal

    options = DeviceOptions(journal=JournalMode.ON, journal_size=1 << 20)
    async with running(tmp_path, options) as daemon:
        device = daemon.devices.get("disk")
        ended = trio.Event()
        device.gate.write(0, memoryview(b"a" * 4096), lambda _: ended.set())
        device.gate.kick()
        await ended.wait()
        journal = await shown(daemon)
        assert journal is not None
        assert (journal.requests, journal.data, journal.limit) == (1, 4096, 1 << 20)
        assert journal.data < journal.used < journal.data + 1024
    (tmp_path / "disk.hds").unlink()
    async with running(tmp_path, DeviceOptions(journal=JournalMode.OFF)) as daemon:
        assert await shown(daemon) is None


@pytest.mark.trio
async def test_the_nearest_name_is_proposed(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        with pytest.raises(NotFoundError, match="did you mean disk") as caught:
            await daemon.call("ShowDevice", messages.DeviceName(name="disc"))
        assert caught.value.exit_code == ExitCode.NOT_FOUND
        with pytest.raises(NotFoundError, match="there are: disk"):
            await daemon.call("ShowDevice", messages.DeviceName(name="zzzzzzzz"))


@pytest.mark.trio
async def test_standby_by_hand(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        assert await daemon.standby("Show") == "off"
        with pytest.raises(BusyError):
            await daemon.standby("Leave")
        assert await daemon.standby("Enter") == "on"
        shown = await daemon.call("ShowDevice", messages.DeviceName(name="disk"))
        assert isinstance(shown, messages.ShowReply)
        assert (shown.device.state, shown.device.reason) == ("standby", "entered by ploopctl")
        assert await daemon.standby("Leave") == "off"


@pytest.mark.trio
async def test_waiting_ends_with_the_change_or_the_time(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:

        async def wait(state: str, timeout: float) -> messages.Message:
            return await daemon.call(
                "StandbyWait",
                messages.StandbyWaitParameters(name="disk", standby=state, timeout=timeout),
            )

        assert await wait("off", 0.0) == messages.StandbyState(standby="off")
        with pytest.raises(PloopError, match=r"waited 0\.01 s .* to be on") as caught:
            await wait("on", 0.01)
        assert caught.value.exit_code == ExitCode.TIMEOUT
        with pytest.raises(UsageError):
            await wait("up", 1.0)
        results: list[messages.Message] = []
        async with trio.open_nursery() as nursery:

            async def waiter() -> None:
                results.append(await wait("on", 30.0))

            nursery.start_soon(waiter)
            await trio.testing.wait_all_tasks_blocked()
            assert results == []
            await daemon.standby("Enter")
        assert results == [messages.StandbyState(standby="on")]
        await daemon.standby("Leave")


@pytest.mark.trio
async def test_replace_tells_its_steps(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        image = str(tmp_path / "disk.hds")
        await daemon.standby("Enter")
        parameters = messages.ReplaceParameters(name="disk", image=image)
        reply = await daemon.call("ReplaceDevice", parameters)
        assert isinstance(reply, messages.ReplaceStep)
        assert (reply.step, reply.image) == ("done", image)
        steps = [step.step for step in daemon.steps if isinstance(step, messages.ReplaceStep)]
        assert steps[0].startswith("check")
        assert steps[-1].startswith("release")
        assert await daemon.standby("Show") == "off"


@pytest.mark.trio
async def test_a_replacement_that_fails_says_why_after_its_steps(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        parameters = messages.ReplaceParameters(name="disk", image=str(tmp_path / "missing"))
        with pytest.raises(PloopError) as caught:
            await daemon.call("ReplaceDevice", parameters)
        assert caught.value.exit_code == ExitCode.NOT_FOUND
        assert caught.value.path == str(tmp_path / "missing")
        assert await daemon.standby("Show") == "off"


@pytest.mark.trio
async def test_a_reload_and_a_dry_run_tell_their_steps_and_end_with_a_report(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as daemon:
        image = str(tmp_path / "disk.hds")
        await daemon.standby("Enter")
        for dry_run in (True, False):
            daemon.steps.clear()
            parameters = messages.ReloadParameters(name="disk", dry_run=dry_run)
            reply = await daemon.call("ReloadDevice", parameters)
            assert isinstance(reply, messages.ReplaceStep)
            assert reply.report is not None
            assert (reply.planned, reply.report.dry_run) == (dry_run, dry_run)
            assert (reply.report.image, reply.report.level) == (image, None)
            sent = [each for each in daemon.steps if isinstance(each, messages.ReplaceStep)]
            assert [each.step for each in sent] == [each.step for each in reply.report.steps]
            assert [each.planned for each in sent[1:]] == [dry_run] * (len(sent) - 1)
            assert await daemon.standby("Show") == ("on" if dry_run else "off")


@pytest.mark.trio
async def test_a_resize_tells_its_steps_and_both_sizes(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        (device,) = daemon.devices
        before = device.size
        parameters = messages.ResizeParameters(name="disk", size=2 * before)
        reply = await daemon.call("ResizeDevice", parameters)
        assert isinstance(reply, messages.ResizeStep)
        assert (reply.size, reply.previous) == (2 * before, before)
        sent = [each for each in daemon.steps if isinstance(each, messages.ResizeStep)]
        assert [each.step for each in sent if each.detail] == ["grow"]
        assert str(2 * before) in next(each.detail for each in sent if each.detail)
        with pytest.raises(UsageError):
            await daemon.call("ResizeDevice", messages.ResizeParameters(name="disk", size=before))


@pytest.mark.trio
async def test_the_latch_is_told_and_cleared(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        with pytest.raises(BusyError, match="not latched"):
            await daemon.call("ClearLatch", messages.DeviceName(name="disk"))
        (device,) = daemon.devices
        device.gate.judge(StorageError(errno.ESTALE, "write", path="disk.hds"))
        shown = await daemon.call("ShowDevice", messages.DeviceName(name="disk"))
        assert isinstance(shown, messages.ShowReply)
        assert shown.device.latched is not None
        assert "ESTALE" in shown.device.latched
        reply = await daemon.call("ClearLatch", messages.DeviceName(name="disk"))
        assert reply == messages.ClearLatchReply(failure=shown.device.latched)
        assert not device.gate.read_only
