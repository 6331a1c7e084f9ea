"""The two fuses as a daemon's front ends set and clear them; devices with and without support."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio

from ploopd.config import DeviceConfig, ServeConfig
from ploopd.daemon import Export, serve_images
from ploopd.errors import PloopError
from ploopd.frontends.iscsi.config import IscsiConfig, Portal
from scst_shim import QueueFlags, StandbyCheck
from tests.support import images
from tests.support.images import MIB

pytestmark = [pytest.mark.functional]


class Seen(StandbyCheck):
    """The key of the daemon under test, with its queues, which live as long as this does."""

    def __init__(self) -> None:
        super().__init__()
        self.queues: dict[str, QueueFlags] = {}

    def _attach(self, queue: QueueFlags) -> None:
        super()._attach(queue)
        self.queues[queue.name] = queue

    def states(self) -> dict[str, str]:
        return {name: queue.state.value for name, queue in self.queues.items()}


async def serve(
    directory: Path, monkeypatch: pytest.MonkeyPatch, standby: dict[str, bool], *, enter: str = ""
) -> tuple[Seen, dict[str, str]]:
    """Serve disks of these names, put one into standby, stop; the key, and what was read while the
    disks were served."""
    keys: list[Seen] = []
    during: dict[str, str] = {}

    def key() -> Seen:
        keys.append(Seen())
        return keys[-1]

    def ready(exports: list[Export], control: Path) -> None:
        assert keys[0].enabled
        if enter:
            keys[0].queues[enter].set_standby()
        during.update(keys[0].states())
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("ploopd.daemon.StandbyCheck", key)
    devices = tuple(
        DeviceConfig(
            image=str(images.write_delta(directory / f"{name}.hds", 16 * MIB, {})), standby=support
        )
        for name, support in standby.items()
    )
    config = ServeConfig(
        devices=devices,
        iscsi=IscsiConfig(portals=(Portal(port=0),)),
        control=directory / "control.sock",
    )
    with trio.fail_after(30):
        await serve_images(config, ready)
    return keys[0], during


@pytest.mark.trio
async def test_the_key_is_on_while_the_front_ends_are_and_en_while_a_device_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key, during = await serve(tmp_path, monkeypatch, {"with": True, "without": False})
    assert during == {"with": "off", "without": "not supported"}  # mixed mode
    assert not key.enabled
    assert key.states() == {"with": "not supported", "without": "not supported"}
    assert not any(queue.standby_en for queue in key.queues.values())
    assert "contradict" not in caplog.text


@pytest.mark.trio
async def test_a_device_that_is_removed_in_standby_is_warned_about_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody is left who could keep the promise to clear the flag."""
    key, during = await serve(tmp_path, monkeypatch, {"disk": True}, enter="disk")
    assert during == {"disk": "on"}
    assert key.states() == {"disk": "not supported"}
    assert key.queues["disk"].standby
    assert caplog.text.count("contradict") == 1


@pytest.mark.trio
async def test_a_start_that_fails_takes_the_fuses_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[Seen] = []

    def key() -> Seen:
        keys.append(Seen())
        return keys[-1]

    monkeypatch.setattr("ploopd.daemon.StandbyCheck", key)
    good = images.write_delta(tmp_path / "good.hds", 16 * MIB, {})
    config = ServeConfig(
        devices=(DeviceConfig(image=str(good)), DeviceConfig(image=str(tmp_path / "missing.hds"))),
        iscsi=IscsiConfig(portals=(Portal(port=0),)),
        control=tmp_path / "control.sock",
    )
    with trio.fail_after(30), pytest.raises((ExceptionGroup, PloopError)):
        await serve_images(config, lambda exports, control: None)
    assert not keys[0].enabled
    assert set(keys[0].states().values()) == {"not supported"}
