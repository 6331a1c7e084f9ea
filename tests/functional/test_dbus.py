"""The handler on a real message bus, asked by GLib's client, which is what targetcli uses."""

from __future__ import annotations

import os
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from ploopd.errors import UsageError
from ploopd.frontends.tcmu.names import Reference

pytest.importorskip("jeepney")
from ploopd.frontends.tcmu.dbus_service import BusService

NAME = "org.kernel.TCMUService1"
ROOT = "/org/kernel/TCMUService1"

pytestmark = [pytest.mark.functional, pytest.mark.trio]


@pytest.fixture
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if shutil.which("dbus-daemon") is None or shutil.which("gdbus") is None:
        pytest.skip("dbus-daemon or gdbus is not installed: apt-get install dbus libglib2.0-bin")
    address = f"unix:path={tmp_path}/bus"
    daemon = subprocess.Popen(
        ["dbus-daemon", "--session", "--nofork", "--print-address", f"--address={address}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert daemon.stdout is not None
    address = daemon.stdout.readline().strip()
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", address)
    yield address
    daemon.terminate()
    daemon.wait()
    daemon.stdout.close()


@dataclass
class Asked:
    """Answers targetcli's questions and remembers them."""

    checked: list[Reference] = field(default_factory=list)
    changed: list[tuple[str, Reference, int]] = field(default_factory=list)
    another: bool | None = None

    def another_handler(self, there: bool) -> None:
        self.another = there

    async def check(self, reference: Reference) -> None:
        self.checked.append(reference)
        if reference.device != "disk":
            raise UsageError("no such device", field="device", value=str(reference))

    async def change_medium(self, backstore: str, reference: Reference, size: int) -> None:
        self.changed.append((backstore, reference, size))


async def gdbus(method: str, *arguments: str, path: str = ROOT, name: str = NAME) -> str:
    command = ["gdbus", "call", "--session", "-d", name, "-o", path, "-m", method, *arguments]
    done = await trio.run_process(
        command, capture_stdout=True, capture_stderr=True, check=False, env=os.environ
    )
    return (done.stdout + done.stderr).decode().strip()


async def until_owned(name: str = NAME) -> None:
    with trio.fail_after(20):
        while not await owned(name):  # noqa: ASYNC110 (another process has the event)
            await trio.sleep(0.05)


async def owned(name: str) -> bool:
    answer = await gdbus(
        "org.freedesktop.DBus.NameHasOwner",
        name,
        path="/org/freedesktop/DBus",
        name="org.freedesktop.DBus",
    )
    return answer == "(true,)"


@pytest.fixture
async def asked(bus: str) -> AsyncIterator[Asked]:
    asked = Asked()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(BusService(asked, bus="SESSION").serve)
        await until_owned()
        yield asked
        nursery.cancel_scope.cancel()


async def test_the_handler_is_listed(asked: Asked) -> None:
    listed = await gdbus("org.freedesktop.DBus.ObjectManager.GetManagedObjects")
    assert f"'{ROOT}/ploop': {{'{NAME}': {{'ConfigDesc': <'NAME or /PATH" in listed
    properties = await gdbus("org.freedesktop.DBus.Properties.GetAll", NAME, path=f"{ROOT}/ploop")
    assert "ConfigDesc" in properties
    ping = await gdbus("org.freedesktop.DBus.Peer.Ping")
    assert ping == "()"


async def test_it_can_be_introspected(asked: Asked) -> None:
    answer = await gdbus("org.freedesktop.DBus.Introspectable.Introspect", path=f"{ROOT}/ploop")
    text = answer.removeprefix("('").removesuffix("',)").encode().decode("unicode_escape")
    names = {each.get("name") for each in ET.fromstring(text).iter("method")}
    assert {"CheckConfig", "ChangeMedium"} <= names
    root = await gdbus("org.freedesktop.DBus.Introspectable.Introspect", path="/")
    assert 'name="org"' in root


async def test_a_configuration_is_checked(asked: Asked) -> None:
    path = f"{ROOT}/ploop"
    assert await gdbus(f"{NAME}.CheckConfig", "ploop/disk", path=path) == "(true, '')"
    answer = await gdbus(f"{NAME}.CheckConfig", "ploop//vz/a%20b.hds", path=path)
    assert answer.startswith("(false, ")
    assert asked.checked == [Reference(device="disk"), Reference(image="/vz/a b.hds")]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("rbd/x", "does not begin with ploop/"),
        ("ploop/", "names nothing"),
        ("ploop//a b", "character"),
        ("ploop//../x", ".."),
        ("ploop//" + "x" * 400, "255 bytes"),
    ],
)
async def test_bad_configurations_are_told(asked: Asked, config: str, reason: str) -> None:
    answer = await gdbus(f"{NAME}.CheckConfig", config, path=f"{ROOT}/ploop")
    assert answer.startswith("(false, ")
    assert reason in answer
    assert asked.checked == []


async def test_a_medium_is_changed(asked: Asked) -> None:
    answer = await gdbus(
        f"{NAME}.ChangeMedium", "web", "1048576", "ploop//vz/new.hds", path=f"{ROOT}/ploop"
    )
    assert answer == "(0, '')"
    assert asked.changed == [("web", Reference(image="/vz/new.hds"), 1048576)]


async def test_unknown_objects_and_methods_are_errors(asked: Asked) -> None:
    assert "UnknownObject" in await gdbus(f"{NAME}.CheckConfig", "ploop/x", path=f"{ROOT}/rbd")
    assert "UnknownMethod" in await gdbus(f"{NAME}.Nothing", path=f"{ROOT}/ploop")
    assert "InvalidArgs" in await gdbus(f"{NAME}.CheckConfig", "1", "2", path=f"{ROOT}/ploop")


async def test_the_second_takes_the_name_when_the_first_leaves(bus: str) -> None:
    first, second = Asked(), Asked()
    async with trio.open_nursery() as nursery:
        leaving = trio.CancelScope()

        async def serve_first() -> None:
            with leaving:
                await BusService(first, bus="SESSION").serve()

        nursery.start_soon(serve_first)
        await until_owned()
        nursery.start_soon(BusService(second, bus="SESSION").serve)
        await until_owned(f"{NAME}.HandlerManager1.ploop")
        await gdbus(f"{NAME}.CheckConfig", "ploop/disk", path=f"{ROOT}/ploop")
        assert (len(first.checked), len(second.checked)) == (1, 0)
        assert (first.another, second.another) == (False, True)
        leaving.cancel()
        with trio.fail_after(20):
            while not second.checked:
                await gdbus(f"{NAME}.CheckConfig", "ploop/disk", path=f"{ROOT}/ploop")
        assert second.another is False
        nursery.cancel_scope.cancel()


async def test_no_bus_is_no_trouble(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", f"unix:path={tmp_path}/none")
    caplog.set_level("INFO")
    with trio.move_on_after(0.2):
        await BusService(Asked(), bus="SESSION").serve()
    assert "dbus-absent" in caplog.text
