"""How `ploopd serve` ends when somebody is in a hurry: two signals, three signals."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import trio

from ploopd.cli.errors import ploop_error_in
from ploopd.config import DeviceConfig, ServeConfig
from ploopd.daemon import LOGOUT_GRACE, Export, serve_images
from ploopd.frontends.iscsi.config import IscsiConfig, Portal
from ploopd.storage.mapinfo import image_info
from ploopd.storage.volume import Volume
from tests.support.images import MIB, write_delta
from tests.support.iscsi_client import Client
from tests.support.iscsi_transport import ConnectionClosed, SocketTransport
from tests.support.serve import ServeProcess

pytestmark = pytest.mark.functional


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.hds"
    write_delta(path, 8 * MIB, {0: b"a" * MIB})
    return path


def test_a_second_signal_does_not_wait_for_initiators(tmp_path: Path, image: Path) -> None:
    """Whoever presses Ctrl-C twice still gets an image that was closed."""
    with ServeProcess(image, directory=tmp_path) as server:
        assert server.process is not None
        url = server.urls[0]
        client = Client(SocketTransport(url.host, url.port), target=url.iqn)
        client.login()
        client.clear_attention()
        client.write(0, b"x" * 4096)
        began = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        message = client.next_pdu()
        assert (message.opcode, message.bhs[36]) == (0x32, 1), "a logout is asked for"
        server.process.send_signal(signal.SIGINT)
        message = client.next_pdu()
        assert (message.opcode, message.bhs[36]) == (0x32, 3), "all connections are dropped"
        with pytest.raises(ConnectionClosed):
            client.next_pdu()
        client.close()
        assert server.process.wait(20) == 0
        assert time.monotonic() - began < LOGOUT_GRACE
        server._forget()
    assert image_info(str(image)).layers[0].state == "closed"


@pytest.mark.trio
async def test_a_third_signal_does_not_wait_for_the_storage(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(self: Volume) -> None:
        await trio.sleep_forever()

    def ready(exports: list[Export], control: Path) -> None:
        for _ in range(3):
            nursery.start_soon(interrupt)

    async def interrupt() -> None:
        await trio.sleep(0.2 * next(turns))
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Volume, "close", hang)
    turns = iter((1, 2, 3))
    iscsi = IscsiConfig(portals=(Portal(port=0),))
    config = ServeConfig(
        devices=(DeviceConfig(image=str(image)),), iscsi=iscsi, control=tmp_path / "c.sock"
    )
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            with pytest.raises(ExceptionGroup) as caught:
                await serve_images(config, ready)
    assert "before the images were closed" in str(ploop_error_in(caught.value))
    assert not (tmp_path / "c.sock").exists()
