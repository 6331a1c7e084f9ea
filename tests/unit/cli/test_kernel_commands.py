"""`ploopctl lio list` and the shell's /lio: what is not served, and why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ploopd.cli.ploopctl import cli as ploopctl
from ploopd.control import messages
from ploopd.control.server import Operation, Send
from tests.unit.cli.test_commands import FakeDaemon, call

IQN = "iqn.2026-01.org.example:disks"
REASON = "the disk root has 10737418240 bytes (dev_size = 5);\ncreate it with size=10737418240"
REPLY = messages.LioReply(
    exports=[
        messages.LioExport(
            device="gone", iqn=IQN, lun=1, portals=["127.0.0.1:3260"], acl=[], chap=False
        )
    ],
    backstores=[
        messages.LioBackstore(
            name="good", config="root", size=10 << 30, luns=[f"{IQN}/0"], device="root"
        ),
        messages.LioBackstore(
            name="odd", config="root", size=5 << 30, luns=[], device=None, error=REASON
        ),
    ],
)


class KernelDaemon(FakeDaemon):
    """A daemon with one device and two backstores of the kernel's target."""

    def _operations(self) -> list[Operation]:
        async def lio(_parameters: messages.Empty, _send: Send) -> messages.LioReply:
            return REPLY

        async def info(_parameters: messages.Empty, _send: Send) -> messages.DaemonInfo:
            return messages.DaemonInfo(
                version="0", pid=1, uptime=1.0, iqn="", portals=[], devices=1
            )

        return [
            *super()._operations(),
            Operation(method=messages.LIO_LIST, handler=lio),
            Operation(method=messages.GET_INFO, handler=info),
        ]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with KernelDaemon(tmp_path / "c.sock") as running:
        yield running


def test_a_backstore_that_is_not_served_has_a_reason(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    result = call(capsys, ploopctl, "--control", daemon.path, "lio", "list")
    header, good, odd, gone = result.out.splitlines()
    assert header.split() == ["BACKSTORE", "SIZE", "DEVICE", "LUN", "PORTALS", "PROBLEM"]
    assert good.split() == ["good", "10", "GiB", "root", f"{IQN}/0", "-", "-"]
    column = header.index("PROBLEM")
    assert odd[column:].startswith("the disk root has 10737418240 bytes (dev_size = 5);")
    assert odd.endswith("create it with size=10737418240")
    assert gone[column:] == "is missing: ploopctl lio restore"
    assert gone.split()[4] == "127.0.0.1:3260"
    shown = call(capsys, ploopctl, "--control", daemon.path, "lio", "list", "--output=json")
    assert [each["error"] for each in json.loads(shown.out)["backstores"]] == [None, REASON]


def test_the_shell_has_the_reason(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("configshell_fb")
    result = call(capsys, ploopctl, "--control", daemon.path, "shell", "ls", "/lio")
    (line,) = [line for line in result.out.splitlines() if "o- odd" in line]
    assert "is not served: the disk root has 10737418240 bytes (dev_size = 5)" in line
