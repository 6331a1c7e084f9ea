"""What is exported through the kernel's target, remembered and made again; the kernel is a fake.

What only a real kernel can show is in tests/kernel."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from ploopd.device_table import DeviceTable
from ploopd.devices import Device, Environment
from ploopd.errors import (
    BusyError,
    ExitCode,
    NotFoundError,
    PloopError,
    UnsupportedError,
    UsageError,
)
from ploopd.fileio.engine import make_engine
from ploopd.frontends.tcmu.lio import Backstore, Exported, ExportRequest, Lio
from ploopd.kernel_front_end import KernelFrontEnd
from ploopd.lio_exports import Export, LioExports
from ploopd.storage.create import create_image
from scst_shim import StandbyCheck

SIZE = 8 << 20
IQN = "iqn.2026-01.org.example:disks"
PORTALS = [("127.0.0.1", 3260)]

pytestmark = pytest.mark.trio


@dataclass
class FakeLio:
    """The kernel's target: backstores and, by target, its LUNs."""

    backstores_: dict[str, ExportRequest] = field(default_factory=dict)
    targets: dict[str, dict[int, str]] = field(default_factory=dict)
    asked: list[ExportRequest] = field(default_factory=list)
    problems: dict[str, Exception] = field(default_factory=dict)

    def _step(self, name: str) -> None:
        if name in self.problems:
            raise self.problems[name]

    def backstores(self) -> list[Backstore]:
        self._step("backstores")
        return [
            Backstore(name=name, config=each.config, size=each.size, luns=self._luns(name))
            for name, each in self.backstores_.items()
        ]

    def _luns(self, name: str) -> tuple[str, ...]:
        pairs = [
            (iqn, number, used)
            for iqn, luns in self.targets.items()
            for number, used in luns.items()
        ]
        return tuple(f"{iqn}/{number}" for iqn, number, used in pairs if used == name)

    def create_backstore(self, request: ExportRequest) -> bool:
        self._step("create_backstore")
        new = request.backstore not in self.backstores_
        self.backstores_.setdefault(request.backstore, request)
        return new

    def delete_backstore(self, name: str) -> None:
        self._step("delete_backstore")
        if self.backstores_.pop(name, None) is None:
            raise NotFoundError("no such backstore")

    def export(self, request: ExportRequest) -> Exported:
        self.asked.append(request)
        self._step("export")
        made = () if request.iqn in self.targets else ("target", "portal 127.0.0.1:3260")
        luns = self.targets.setdefault(request.iqn, {})
        lun = len(luns) if request.lun is None else request.lun
        luns[lun] = request.backstore
        return Exported(
            backstore=request.backstore,
            iqn=request.iqn,
            lun=lun,
            portals=request.portals,
            made=made,
        )

    def unexport(self, exported: Exported) -> None:
        self._step("unexport")
        luns = self.targets.get(exported.iqn, {})
        luns.pop(exported.lun, None)
        if not luns and "target" in exported.made:
            self.targets.pop(exported.iqn, None)


@dataclass
class FakeServer:
    """The front end: every backstore is served at once, or is not for `problem`."""

    problem: PloopError | None = None
    attached: dict[str, Any] = field(default_factory=dict)

    def failure(self, backstore: str) -> PloopError | None:
        return self.problem

    async def wait_attached(self, backstore: str, seconds: float) -> None:
        if self.problem is not None:
            raise self.problem


@dataclass
class FakeFrontEnd:
    server: FakeServer = field(default_factory=FakeServer)


@dataclass
class Rig:
    table: DeviceTable
    state: Path
    kernel: FakeLio
    front_end: FakeFrontEnd
    exports: LioExports

    def again(self) -> LioExports:
        """As a new daemon."""
        return LioExports(
            self.table,
            cast(KernelFrontEnd, self.front_end),
            state=self.state,
            kernel=self._lio,
        )

    def _lio(self) -> Lio:
        """The kernel may never come back from what is done with it."""
        assert threading.current_thread() is not threading.main_thread()
        return cast(Lio, self.kernel)

    @property
    def web(self) -> Device:
        return self.table.get("web")

    async def export(self, name: str = "web", iqn: str = IQN, **more: Any) -> Export:
        settings: dict[str, Any] = {
            "portals": PORTALS,
            "acl": [],
            "chap_file": None,
            "lun": None,
        } | more
        return await self.exports.export(self.table.get(name), iqn, **settings)

    @property
    def remembered(self) -> list[Any]:
        return cast(list[Any], json.loads(self.state.read_text())["exports"])


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    engine = make_engine("auto")
    check = StandbyCheck()
    check.enable()
    env = Environment(engine=engine, buffers=engine.buffers, check=check, clock=trio.current_time)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        table = DeviceTable(env)
        await nursery.start(table.run)
        for name in ("web", "db"):
            path = tmp_path / f"{name}.hds"
            create_image(str(path), SIZE, 1 << 20, 2)
            await table.add(str(path))
        rig = Rig(table, tmp_path / "var/lio.json", FakeLio(), FakeFrontEnd(), cast(Any, None))
        rig.exports = rig.again()
        yield rig
        await table.close()
        nursery.cancel_scope.cancel()
    engine.close()


async def test_an_export_is_made_and_written_down(rig: Rig) -> None:
    export = await rig.export(iqn=IQN.upper(), acl=["iqn.2026-01.org.example:A"], lun=3)
    assert (export.iqn, export.lun, export.device) == (IQN, 3, "web")
    (request,) = rig.kernel.asked
    assert (request.size, request.config, request.acl) == (
        SIZE,
        "web",
        ("iqn.2026-01.org.example:a",),
    )
    assert request.serial == str(rig.web.identity)
    assert rig.remembered[0]["made"] == ["target", "portal 127.0.0.1:3260"]
    assert (await rig.again().show())[0] == [export]


async def test_a_secret_is_never_written_down(rig: Rig, tmp_path: Path) -> None:
    secrets = tmp_path / "chap.toml"
    secrets.write_text('user = "alice"\nsecret = "correct horse battery"\n')
    secrets.chmod(0o600)
    await rig.export(chap_file=str(secrets))
    chap = rig.kernel.asked[0].chap
    assert chap is not None
    assert (chap.user, chap.secret) == ("alice", "correct horse battery")
    assert "horse" not in rig.state.read_text()
    secrets.write_text('user = "alice"\nsecret = "käse mit zwiebeln"\n')
    with pytest.raises(UsageError, match="ASCII"):
        await rig.export("db", chap_file=str(secrets))


@pytest.mark.parametrize("step", ["create_backstore", "export"])
async def test_a_step_that_fails_leaves_nothing(rig: Rig, step: str) -> None:
    rig.kernel.problems[step] = PloopError("no")
    with pytest.raises(PloopError, match="no"):
        await rig.export()
    assert (rig.kernel.backstores_, rig.kernel.targets) == ({}, {})
    assert not rig.state.exists()


async def test_what_cannot_be_served_leaves_nothing(rig: Rig) -> None:
    rig.front_end.server.problem = BusyError("is open in another process")
    with pytest.raises(BusyError):
        await rig.export()
    assert rig.kernel.backstores_ == {}


async def test_why_a_backstore_is_not_served(rig: Rig) -> None:
    assert rig.exports.problem_of("web") is None
    rig.front_end.server.problem = BusyError("is open in another process", path="/dev/uio3")
    assert rig.exports.problem_of("web") == "/dev/uio3: is open in another process"


async def test_what_cannot_be_undone_does_not_hide_the_reason(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.kernel.problems = {"export": PloopError("first"), "delete_backstore": PloopError("second")}
    with pytest.raises(PloopError, match="first"):
        await rig.export()
    assert "event=lio-undo error='second'" in caplog.text


async def test_what_cannot_be_remembered_is_undone(rig: Rig) -> None:
    rig.state.parent.write_text("a file where the directory is to be")
    with pytest.raises(PloopError, match=r"lio\.json"):
        await rig.export()
    assert (rig.kernel.backstores_, rig.kernel.targets) == ({}, {})


async def test_a_backstore_that_was_there_stays(rig: Rig) -> None:
    request = ExportRequest(
        backstore="web", config="web", size=SIZE, serial="", iqn=IQN, portals=()
    )
    rig.kernel.create_backstore(request)
    await rig.export()
    await rig.exports.unexport("web", None)
    assert list(rig.kernel.backstores_) == ["web"]
    assert rig.kernel.targets == {}


async def test_twice_is_refused(rig: Rig) -> None:
    await rig.export()
    with pytest.raises(BusyError, match="exported there already"):
        await rig.export()
    await rig.export(iqn=f"{IQN}2")
    assert len(rig.remembered) == 2


async def test_the_backstore_goes_with_its_last_lun(rig: Rig) -> None:
    await rig.export()
    await rig.export(iqn=f"{IQN}2")
    await rig.exports.unexport("web", IQN)
    assert list(rig.kernel.backstores_) == ["web"]
    assert [each.iqn for each in await rig.exports.unexport("web", None)] == [f"{IQN}2"]
    assert (rig.kernel.backstores_, rig.kernel.targets) == ({}, {})
    with pytest.raises(NotFoundError, match="ploopctl lio list"):
        await rig.exports.unexport("web", None)


async def test_a_shared_target_goes_with_its_last_device(rig: Rig) -> None:
    await rig.export("web")
    await rig.export("db")
    assert rig.remembered[1]["made"] == []
    await rig.exports.unexport("web", None)
    assert rig.kernel.targets == {IQN: {1: "db"}}
    assert rig.remembered[0]["made"] == ["target", "portal 127.0.0.1:3260"]
    await rig.exports.unexport("db", None)
    assert rig.kernel.targets == {}


async def test_somebody_elses_target_stays(rig: Rig) -> None:
    rig.kernel.targets[IQN] = {0: "theirs"}
    await rig.export()
    await rig.exports.unexport("web", None)
    assert rig.kernel.targets == {IQN: {0: "theirs"}}


async def test_what_is_not_there_is_made_again(rig: Rig) -> None:
    await rig.export("web")
    await rig.export("db")
    before = rig.remembered
    rig.kernel.backstores_.clear()
    rig.kernel.targets.clear()
    results = await rig.again().restore()
    assert [error for _, error in results] == [None, None]
    assert rig.kernel.targets == {IQN: {0: "web", 1: "db"}}
    assert rig.remembered == before
    asked = len(rig.kernel.asked)
    await rig.again().restore()
    assert len(rig.kernel.asked) == asked  # what is there stays as it is


async def test_a_target_made_by_restoring_is_ours(rig: Rig) -> None:
    """It was somebody else's; after the machine has started it is not there, and we make it."""
    rig.kernel.targets[IQN] = {0: "theirs"}
    await rig.export()
    assert rig.remembered[0]["made"] == []
    rig.kernel.backstores_.clear()
    rig.kernel.targets.clear()
    await rig.again().restore()
    assert "target" in rig.remembered[0]["made"]
    await rig.exports.unexport("web", None)
    assert rig.kernel.targets == {}


async def test_one_that_cannot_come_back_does_not_stop_the_others(rig: Rig) -> None:
    await rig.export("web")
    await rig.export("db", f"{IQN}2")
    rig.kernel.backstores_.clear()
    rig.kernel.targets.clear()
    await rig.table.remove(rig.web)
    results = await rig.again().restore()
    assert isinstance(results[0][1], NotFoundError)
    assert results[1][1] is None
    assert list(rig.kernel.targets) == [f"{IQN}2"]
    assert len(rig.remembered) == 2


@pytest.mark.parametrize(
    ("portal", "reason"), [(("host.example", 3260), "IP address"), (("::1", 0), "no port")]
)
async def test_the_kernel_takes_addresses_only(
    rig: Rig, portal: tuple[str, int], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        await rig.export(portals=[portal])
    assert rig.kernel.backstores_ == {}


async def test_a_machine_without_the_kernels_target(rig: Rig) -> None:
    rig.kernel.problems["backstores"] = UnsupportedError("no LIO here")
    assert await rig.exports.show() == ([], [])


@pytest.mark.parametrize("text", ["", "{", '{"exports": [1]}', "\x00"])
async def test_a_damaged_memory_is_told_and_kept(rig: Rig, text: str) -> None:
    rig.state.parent.mkdir()
    rig.state.write_text(text)
    with pytest.raises(PloopError, match="move it away"):
        await rig.export()
    assert rig.state.read_text() == text
    assert rig.kernel.backstores_ == {}


async def test_a_kernel_that_does_not_answer(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ploopd.lio_exports.KERNEL_SECONDS", 0.05)
    done = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def hang(request: ExportRequest) -> Exported:
        trio.from_thread.run(done.wait, trio_token=token)
        raise PloopError("too late")

    monkeypatch.setattr(rig.kernel, "export", hang)
    with pytest.raises(PloopError, match="took longer than") as caught:
        await rig.export()
    assert caught.value.exit_code is ExitCode.TIMEOUT
    assert "the kernel waits" in str(caught.value)
    assert rig.kernel.backstores_ == {}
    done.set()
