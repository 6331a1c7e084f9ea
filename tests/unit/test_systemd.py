"""sd_notify: what is sent where, and that nobody is needed to read it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from ploopd.systemd import Notifier


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        path = os.path.relpath(tmp_path / "notify")
        listening.bind(path)
        listening.setblocking(False)
        yield str(tmp_path / "notify"), listening


def test_what_is_said(manager: tuple[str, socket.socket]) -> None:
    path, listening = manager
    with Notifier({"NOTIFY_SOCKET": path}) as notifier:
        notifier.ready("serving 2 devices")
        notifier.status("two\nlines")
        notifier.reloading()
        notifier.stopping()
    assert listening.recv(4096) == b"READY=1\nSTATUS=serving 2 devices"
    assert listening.recv(4096) == b"STATUS=two lines"
    reloading, _, since = listening.recv(4096).partition(b"\nMONOTONIC_USEC=")
    assert reloading == b"RELOADING=1"
    assert 0 <= time.clock_gettime(time.CLOCK_MONOTONIC) - int(since) / 1e6 < 60
    assert listening.recv(4096) == b"STOPPING=1\nSTATUS=stopping"


def test_an_abstract_socket() -> None:
    name = f"ploopd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("\0" + name)
        with Notifier({"NOTIFY_SOCKET": f"@{name}"}) as notifier:
            notifier.status("x")
        assert listening.recv(100) == b"STATUS=x"


def test_the_watchdog_is_for_this_process(manager: tuple[str, socket.socket]) -> None:
    path, _ = manager
    environ = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "30000000"}
    assert Notifier(environ).watchdog_seconds == 30.0
    assert Notifier(environ | {"WATCHDOG_PID": str(os.getpid())}).watchdog_seconds == 30.0
    assert Notifier(environ | {"WATCHDOG_PID": "1"}).watchdog_seconds is None
    assert Notifier({"WATCHDOG_USEC": "30000000"}).watchdog_seconds is None
    for wrong in ("", "0", "x", "-5"):
        assert Notifier(environ | {"WATCHDOG_USEC": wrong}).watchdog_seconds is None


@pytest.mark.trio
async def test_the_watchdog_is_fed_three_times_in_each_period(
    manager: tuple[str, socket.socket], autojump_clock: trio.testing.MockClock
) -> None:
    path, listening = manager
    notifier = Notifier({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "6000000"})
    with trio.move_on_after(6.5):
        await notifier.feed()
    notifier.close()
    fed = [listening.recv(100) for _ in range(4)]
    assert set(fed) == {b"WATCHDOG=1"}
    with pytest.raises(BlockingIOError):
        listening.recv(100)


@pytest.mark.trio
async def test_without_a_manager_nothing_is_sent_and_nothing_waits() -> None:
    with trio.fail_after(1):
        await Notifier({}).feed()
    Notifier({}).ready("")
    Notifier({"NOTIFY_SOCKET": "relative"}).ready("")


def test_a_manager_that_reads_nothing_or_is_gone_holds_nobody_up(
    manager: tuple[str, socket.socket], tmp_path: Path
) -> None:
    path, _ = manager
    with Notifier({"NOTIFY_SOCKET": path}) as notifier:
        for _ in range(2000):
            notifier.status("x" * 1000)
    with Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}) as notifier:
        notifier.status("x")
