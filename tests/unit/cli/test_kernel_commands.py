"""`ploopctl lio list` and the shell's /lio: what is not served, and why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ploopd.cli.ploopctl import cli as ploopctl
from ploopd.control import messages
from ploopd.control.server import Operation, Send
from ploopd.errors import ExitCode
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
        async def lio(parameters: messages.Empty, _send: Send) -> messages.LioReply:
            self.asked.append(parameters)
            return REPLY

        async def info(_parameters: messages.Empty, _send: Send) -> messages.DaemonInfo:
            return messages.DaemonInfo(
                version="0", pid=1, uptime=1.0, iqn="", portals=[], devices=1
            )

        async def reload(parameters: messages.ReloadAll, _send: Send) -> messages.ReloadReply:
            self.asked.append(parameters)
            refused = [] if parameters.force else [messages.ReloadRefusal(device="b", reason="no")]
            return messages.ReloadReply(
                added=[], removed=[], changed=[], refused=refused, needs_restart=[]
            )

        return [
            *super()._operations(),
            Operation(method=messages.LIO_LIST, handler=lio),
            Operation(method=messages.RELOAD, handler=reload),
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


def test_the_shell_has_the_reason(daemon: FakeDaemon) -> None:
    pytest.importorskip("configshell_fb")
    from ploopd.cli.shell import Daemon, Shell

    shell = Shell(Daemon(daemon.path, 5), None)
    shell.root.refresh()
    text, healthy = shell.root.get_node("/lio/odd").summary()
    assert not healthy
    assert "is not served: the disk root has 10737418240 bytes (dev_size = 5);" in text
    assert "\n" not in text
    assert shell.root.get_node("/lio/good").summary() == ("root (10 GiB)", True)
    lio = shell.root.get_node("/lio")
    assert lio.ui_complete_unexport({}, "g", "device") == ["good "]
    assert lio.ui_complete_unexport({"device": "good"}, "", "iqn") == [f"{IQN} "]
    assert lio.ui_complete_export({}, "r", "device") == ["root "]


def test_the_shell_does_not_ask_the_kernels_target_for_nothing(daemon: FakeDaemon) -> None:
    """It may be stuck, and a device is to be replaced."""
    pytest.importorskip("configshell_fb")
    from ploopd.cli.shell import Daemon, Shell

    shell = Shell(Daemon(daemon.path, 5), None)
    shell.run_words(["/devices/root", "replace", "image=/vz/new one.hds"])
    assert daemon.asked[0] == messages.ReplaceParameters(name="root", image="/vz/new one.hds")
    assert messages.Empty() not in daemon.asked
    shell.run_words(["ls", "/"])
    assert daemon.asked[-1] == messages.Empty()


def test_the_shell_reloads(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("configshell_fb")
    base = ("--control", daemon.path, "shell", "reload")
    assert call(capsys, ploopctl, *base, "force=true").code == 0
    result = call(capsys, ploopctl, *base)
    assert result.code == ExitCode.BUSY
    assert "not everything was done (devices = 'b')" in result.err
    assert daemon.asked == [messages.ReloadAll(force=True), messages.ReloadAll()]
