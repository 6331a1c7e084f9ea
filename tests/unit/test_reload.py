"""What a new configuration changes: devices, LUNs and settings of a daemon that serves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio

from ploopd import luns as luns_module
from ploopd import reload as reload_module
from ploopd.config import DeviceConfig, ServeConfig
from ploopd.config_file import LogLevel, RunConfig
from ploopd.control.automation import Automation
from ploopd.device_settings import device_luns, device_names
from ploopd.errors import ExitCode, NotFoundError, PloopError, UsageError
from ploopd.frontends.iscsi.config import ChapAccount, ChapConfig, IscsiConfig, Portal
from ploopd.frontends.iscsi.server import IscsiServer
from ploopd.gate.state import GateState
from ploopd.luns import Lun, Luns
from ploopd.reload import ConfigSource, Reloader, make_plan
from ploopd.scsi.target import Target
from ploopd.scsi.unit_attention import UnitAttention
from ploopd.storage.create import create_image
from tests.support.served import Served, serving

SIZE = 8 << 20
IQN = "iqn.2026-11.org.example:x"
pytestmark = pytest.mark.trio


@dataclass(eq=False)
class Rig:
    """The parts of a daemon that a reload touches; `wanted` is what the files say."""

    directory: Path
    served: Served
    target: Target
    luns: Luns
    iscsi: IscsiServer
    reloader: Reloader
    files: list[RunConfig | PloopError]
    users: dict[str, str]

    def want(
        self, *devices: DeviceConfig, level: LogLevel = "info", iscsi: IscsiConfig | None = None
    ) -> None:
        serve = ServeConfig(devices=devices, iscsi=iscsi or IscsiConfig(iqn=IQN))
        serve.check()
        self.files[:] = [RunConfig(serve=serve, log_level=level, files=())]

    def config(self, file: str, /, **values: object) -> DeviceConfig:
        return DeviceConfig(image=str(self.directory / f"{file}.hds"), **values)  # type: ignore[arg-type]

    @property
    def numbers(self) -> dict[str, int]:
        return {lun.device.name: lun.number for lun in self.luns}

    def lun(self, name: str) -> Lun:
        return next(lun for lun in self.luns if lun.device.name == name)


@asynccontextmanager
async def daemon(
    directory: Path, names: Sequence[str] = ("a", "b"), iscsi: IscsiConfig | None = None
) -> AsyncIterator[Rig]:
    """Serves the images of those names; `c` can be added."""
    for name in {*names, "c"}:
        create_image(directory / f"{name}.hds", SIZE)
    iscsi = iscsi or IscsiConfig(iqn=IQN)
    async with serving() as served, trio.open_nursery() as nursery:
        target, automation = Target(IQN), Automation(Path("/nonexistent"))
        await nursery.start(automation.run)
        users: dict[str, str] = {}
        luns = Luns(served.table, target, automation, lambda device: users.get(device.name))
        server = IscsiServer(iscsi, {IQN: target})
        configs = tuple(DeviceConfig(image=str(directory / f"{name}.hds")) for name in names)
        files: list[RunConfig | PloopError] = []

        def load() -> RunConfig:
            (found,) = files
            if isinstance(found, PloopError):
                raise found
            return found

        reloader = Reloader(
            ServeConfig(devices=configs, iscsi=iscsi),
            ConfigSource(load=load, log_level="info"),
            luns=luns,
            table=served.table,
            automation=automation,
            iscsi=server,
            kernel=None,
        )
        for name, number, config in zip(
            device_names(configs), device_luns(configs), configs, strict=True
        ):
            luns.offer(number, await luns.open(name, config), config)
        yield Rig(directory, served, target, luns, server, reloader, files, users)
        luns.unbind()
        nursery.cancel_scope.cancel()


async def test_nothing_changes_by_reading_the_same_again(tmp_path: Path) -> None:
    async with daemon(tmp_path) as rig:
        rig.want(rig.config("a"), rig.config("b"))
        nexus = rig.target.open_nexus("i", "t")
        before = [(lun.device, lun.number) for lun in rig.luns]
        for _ in range(2):
            report = await rig.reloader.reload()
            assert (report.added, report.removed, report.changed) == ((), (), ())
            assert (report.refused, report.needs_restart) == ((), ())
        assert [(lun.device, lun.number) for lun in rig.luns] == before
        itl = nexus.itl(0)
        assert itl is not None
        assert itl.take_attention() is UnitAttention.POWER_ON
        assert itl.take_attention() is None


async def test_a_number_that_was_taken_away_is_only_given_to_who_asks_for_it(
    tmp_path: Path,
) -> None:
    async with daemon(tmp_path) as rig:
        rig.want(rig.config("b"))
        report = await rig.reloader.reload()
        assert report.removed == ("a",)
        assert report.needs_restart == ("b.lun",)  # it would be LUN 0
        rig.want(rig.config("b", lun=1), rig.config("c"))
        report = await rig.reloader.reload()
        assert rig.numbers == {"b": 1, "c": 2}
        assert report.needs_restart == ("c.lun",)
        rig.want(rig.config("b", lun=1), rig.config("c", lun=2), rig.config("a", lun=0))
        report = await rig.reloader.reload()
        assert rig.numbers == {"b": 1, "c": 2, "a": 0}
        assert report.needs_restart == ()
        # What would be saved has the numbers that the next start would not find.
        rig.want(rig.config("b", lun=1), rig.config("c", lun=2))
        await rig.reloader.reload()
        assert [device.lun for device in rig.reloader.config.devices] == [1, 2]


async def test_a_new_image_that_cannot_be_opened_leaves_everything(tmp_path: Path) -> None:
    async with daemon(tmp_path) as rig:
        rig.want(rig.config("a", park_max=3.0), rig.config("c"), rig.config("missing"))
        with pytest.raises(NotFoundError, match="missing"):
            await rig.reloader.reload()
        assert rig.numbers == {"a": 0, "b": 1}
        assert [device.name for device in rig.served.table] == ["a", "b"]
        assert rig.lun("a").device.gate.limits.park_max == 20.0
        assert (tmp_path / "c.hds").read_bytes()[44:48] == bytes(4)  # not in use


async def test_an_image_is_served_once(tmp_path: Path) -> None:
    async with daemon(tmp_path) as rig:
        rig.want(rig.config("a"), rig.config("b"), rig.config("a", name="again"))
        with pytest.raises(UsageError, match="is served already, as a"):
            await rig.reloader.reload()
        assert [device.name for device in rig.served.table] == ["a", "b"]


async def test_an_image_that_does_not_open_in_time_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload_module, "OPEN_SECONDS", 0.05)
    async with daemon(tmp_path) as rig:
        entered = trio.Event()

        async def hangs(name: str, config: DeviceConfig) -> None:
            entered.set()
            await trio.sleep_forever()

        monkeypatch.setattr(rig.luns, "open", hangs)
        rig.want(rig.config("a"), rig.config("b"), rig.config("c"))
        with pytest.raises(PloopError, match=r"opening .*c.hds took more than 0.05 s") as caught:
            await rig.reloader.reload()
        assert caught.value.exit_code == ExitCode.TIMEOUT
        assert entered.is_set()
        rig.want(rig.config("a"), rig.config("b"))
        await rig.reloader.reload()  # the next one is not kept waiting


async def test_the_settings_of_devices_that_can_change(tmp_path: Path) -> None:
    async with daemon(tmp_path) as rig:
        a = rig.lun("a").device
        rig.want(
            rig.config(
                "a",
                park_max=None,
                extra_standby_errnos=(28 + 1,),
                recovery="reopen",
                candidates=("/x",),
                cache="none",
            ),
            rig.config("b"),
        )
        report = await rig.reloader.reload()
        assert sorted(report.changed) == [
            "a.candidates",
            "a.extra_standby_errnos",
            "a.park_max",
            "a.recovery",
        ]
        assert report.needs_restart == ("a.cache",)
        limits = a.gate.limits
        assert limits.park_max is None
        assert 29 in a.gate.standby_errnos
        # What does not hold is named until it does, and not taken for what is.
        assert rig.lun("a").config.cache == "writeback"
        assert (await rig.reloader.reload()).needs_restart == ("a.cache",)
        rig.want(rig.config("a"), rig.config("b"))
        report = await rig.reloader.reload()
        assert report.needs_restart == ()
        assert a.gate.limits.park_max == 20.0
        assert 29 not in a.gate.standby_errnos


async def test_a_name_or_an_image_says_which_device_it_is(tmp_path: Path) -> None:
    async with daemon(tmp_path) as rig:
        luns = tuple(rig.luns)
        other = DeviceConfig(image="/elsewhere/a.hds", name="a")
        plan = make_plan(luns, [other, rig.config("b", name="data")], names=["a", "b"])
        assert (plan.added, plan.removed) == ((), ())
        assert plan.restart == ("a.image", "b.name")
        # After a replace the configuration may name either file.
        rig.lun("a").device.image = "/elsewhere/a.hds"
        assert make_plan(luns, [other, rig.config("b")], names=["a", "b"]).restart == ()
        with pytest.raises(UsageError, match="b has that LUN until the next start"):
            make_plan(luns, [rig.config("b"), rig.config("c", lun=1)], names=["a", "b"])
        plan = make_plan(luns, [rig.config("a"), rig.config("c", lun=1)], names=["a", "b"])
        assert [(new.name, new.number) for new in plan.added] == [("c", 1)]
        assert [lun.device.name for lun in plan.removed] == ["b"]


async def test_access_rules_are_for_the_next_login(tmp_path: Path) -> None:
    account = ChapAccount(user="u", secret=b"x" * 12)
    old = IscsiConfig(iqn=IQN, portals=(Portal(host="192.0.2.1"),), acl=("iqn.2000-01.org.a:b",))
    async with daemon(tmp_path, iscsi=old) as rig:
        devices = (rig.config("a"), rig.config("b"))
        new = replace(old, acl=None, chap=ChapConfig(accounts=(account,)))
        rig.want(*devices, iscsi=new)
        report = await rig.reloader.reload()
        assert report.changed == ("iscsi.chap_files", "iscsi.acl")
        assert rig.iscsi._node.config == new
        # On its way to the loopback it must not become open to all at the address of now.
        rig.want(*devices, iscsi=IscsiConfig(iqn=IQN))
        report = await rig.reloader.reload()
        assert report.changed == ()
        assert report.needs_restart == ("iscsi.portals", "iscsi.chap_files")
        assert rig.iscsi._node.config == new


async def test_what_others_use_stays(tmp_path: Path) -> None:
    async with daemon(tmp_path) as rig:
        rig.users["b"] = "somebody has it"
        rig.want(rig.config("a"), rig.config("c", lun=1))
        report = await rig.reloader.reload()
        assert [(each.device, each.reason) for each in report.refused] == [
            ("b", "somebody has it"),
            ("c", "b still is LUN 1"),
        ]
        assert rig.numbers == {"a": 0, "b": 1}
        assert [device.name for device in rig.served.table] == ["a", "b"]
        rig.users.clear()
        report = await rig.reloader.reload()
        assert (report.added, report.removed) == (("c",), ("b",))
        assert rig.numbers == {"a": 0, "c": 1}


async def test_commands_that_do_not_end_keep_a_lun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is back where it was, for everybody; by force it goes."""
    monkeypatch.setattr(luns_module, "DRAIN_SECONDS", 0.1)
    async with daemon(tmp_path) as rig:
        nexus = rig.target.open_nexus("i", "t")
        itl = nexus.itl(1 << 48)
        assert itl is not None
        itl.streams += 1  # a WRITE whose data is still to come
        rig.want(rig.config("a"))
        (refusal,) = (await rig.reloader.reload()).refused
        assert "did not end within 0.1 s" in refusal.reason
        assert rig.numbers == {"a": 0, "b": 1}
        assert nexus.itl(1 << 48) is not itl
        assert (await rig.reloader.reload()).refused == (refusal,)  # it still is to come
        assert rig.lun("b").device.gate.standby_text == "off"
        itl.streams -= 1
        assert (await rig.reloader.reload()).removed == ("b",)
        assert nexus.itl(1 << 48) is None


async def test_a_device_in_standby_is_removed_by_force_only(tmp_path: Path) -> None:
    async with daemon(tmp_path) as rig:
        b = rig.lun("b").device
        b.gate.enter_standby("a test")
        rig.want(rig.config("a"))
        (refusal,) = (await rig.reloader.reload()).refused
        assert "standby" in refusal.reason
        failed: list[object] = []
        b.gate.flush(failed.append)
        assert b.gate.parked_count == 1
        assert (await rig.reloader.reload(force=True)).removed == ("b",)
        assert len(failed) == 1
        assert failed[0] is not None
        assert b.gate.state is GateState.STANDBY
        assert [device.name for device in rig.served.table] == ["a"]


async def test_devices_that_come_and_go_are_events(tmp_path: Path) -> None:
    async with daemon(tmp_path) as rig:
        rig.want(rig.config("a"), rig.config("c", read_only=True))
        await rig.reloader.reload()
        b, c = (str(tmp_path / f"{name}.hds") for name in "bc")
        assert [(e.device, e.kind.value, e.details) for e in rig.served.events[1:]] == [
            ("b", "device-added", {"image": b, "size": SIZE, "mode": "rw", "lun": 1}),
            ("b", "device-removed", {"lun": 1}),
            ("c", "device-added", {"image": c, "size": SIZE, "mode": "ro", "lun": 2}),
        ]
        rig.served.events.clear()
        rig.want(rig.config("a"), rig.config("missing"))
        with pytest.raises(NotFoundError):
            await rig.reloader.reload()
        b_again = await rig.luns.open("b", rig.config("b"))  # a reload that fails later on
        await rig.luns.close(b_again)
        assert rig.served.events == []


async def test_who_watches_the_table_hears_before_a_device_is_closed(tmp_path: Path) -> None:
    async with daemon(tmp_path) as rig:
        seen: list[tuple[list[str], bool]] = []
        b = rig.lun("b").device

        def changed() -> None:
            seen.append(([device.name for device in rig.served.table], b.volume_open))

        unwatch = rig.served.table.watch(changed)
        rig.want(rig.config("a"), rig.config("c"))
        await rig.reloader.reload()
        assert seen == [(["a", "b", "c"], True), (["a", "c"], True)]
        assert not b.volume_open
        unwatch()
        rig.want(rig.config("a"))
        await rig.reloader.reload()
        assert len(seen) == 2
