"""The command lines against a real control server: output, messages, exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import trio

from ploopd.cli import errors
from ploopd.cli.ploopctl import cli as ploopctl
from ploopd.cli.ploopd import cli as ploopd
from ploopd.control import messages
from ploopd.control.listener import claim_control_socket
from ploopd.control.server import ControlServer, Operation, Send
from ploopd.errors import ExitCode, NotFoundError, PloopError, StorageError

DEVICE = messages.DeviceSummary(
    name="root",
    image="/vz/root.hds",
    size=10 << 30,
    standby="off",
    urls=["iscsi://127.0.0.1:3260/iqn.2026-11.org.ploopd:x/0"],
)
DETAILS = messages.DeviceDetails(
    name="root",
    image="/vz/root.hds",
    size=10 << 30,
    standby="on",
    urls=DEVICE.urls,
    read_only=False,
    state="standby",
    reason="write failed",
    parked_requests=3,
    parked_bytes=12288,
    identity="8d0f1bd4-7dbd-4c61-8bd8-2f7f3d7b0f4b",
    format_version=2,
    cluster_size=1 << 20,
    allocated=5 << 20,
    layers=[messages.Layer(path="/vz/root.hds", kind="ploop", level=0, version=2)],
    notes=["was not closed cleanly"],
    journal=messages.JournalDetails(requests=3, data=12288, used=13056, limit=64 << 20),
    recovery="reopen, 4 attempts: /vz/root.hds: open failed",
)


EVENTS = [
    messages.DeviceEvent(
        sequence=7,
        time=1.5,
        event="standby-entered",
        device="root",
        details={"errno": "EIO", "path": "/a b\n", "offset": 4096},
    ),
    messages.DeviceEvent(
        sequence=8, time=2.0, event="replace-step", device="root", details={"elapsed": 0.25}
    ),
]


class FakeDaemon:
    """A control server with one device, in a thread; remembers what it was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[messages.Message] = []
        self._claimed = claim_control_socket(path)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._serve,))

    def __enter__(self) -> FakeDaemon:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
        self._thread.join(10)
        self._claimed.close()

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        info = messages.ServiceInfo(vendor="", product="", version="", url="", interfaces=[])
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:
                server = ControlServer(self._operations(), info)
                await nursery.start(server.serve, self._claimed.socket)
                self._ready.set()

    def _operations(self) -> list[Operation]:
        async def listing(_parameters: messages.Empty, _send: Send) -> messages.DeviceList:
            return messages.DeviceList(devices=[DEVICE])

        async def show(parameters: messages.DeviceName, _send: Send) -> messages.ShowReply:
            if parameters.name != "root":
                raise NotFoundError("no such device", field="device", value=parameters.name)
            return messages.ShowReply(device=DETAILS)

        async def state(parameters: messages.Message, _send: Send) -> messages.StandbyState:
            self.asked.append(parameters)
            return messages.StandbyState(standby="not supported")

        async def replace(
            parameters: messages.ReplaceParameters, send: Send
        ) -> messages.ReplaceStep:
            self.asked.append(parameters)
            await send(messages.ReplaceStep(step="drain", elapsed=0.25))
            if parameters.image.endswith("bad"):
                raise StorageError(5, "open", path=parameters.image)
            return messages.ReplaceStep(step="done", elapsed=0.5, image=parameters.image)

        async def wait(
            parameters: messages.StandbyWaitParameters, _send: Send
        ) -> messages.StandbyState:
            self.asked.append(parameters)
            raise PloopError("waited 1 s for it", exit_code=ExitCode.TIMEOUT)

        async def events(
            parameters: messages.EventsParameters, _send: Send
        ) -> messages.EventsReply:
            self.asked.append(parameters)
            return messages.EventsReply(events=EVENTS, lost=2)

        async def follow(parameters: messages.EventsParameters, send: Send) -> messages.EventsReply:
            for event in EVENTS:
                await send(messages.EventsReply(events=[event], lost=event.sequence - 7))
            raise PloopError("stopped")

        return [
            Operation(method=messages.EVENTS, handler=events, follower=follow),
            Operation(method=messages.LIST_DEVICES, handler=listing),
            Operation(method=messages.SHOW_DEVICE, handler=show),
            Operation(method=messages.STANDBY_SHOW, handler=state),
            Operation(method=messages.STANDBY_ENTER, handler=state),
            Operation(method=messages.STANDBY_WAIT, handler=wait),
            Operation(method=messages.REPLACE_DEVICE, handler=replace, outlives_client=True),
        ]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path / "c.sock") as running:
        yield running


class Result:
    """What a command printed and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def call(
    capsys: pytest.CaptureFixture[str], command: click.Command, *arguments: str | Path
) -> Result:
    code = errors.run_to_code(command.name or "x", command, [str(one) for one in arguments])
    captured = capsys.readouterr()
    return Result(code, captured.out, captured.err)


def test_list_as_a_table(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    result = call(capsys, ploopctl, "--control", daemon.path, "device", "list")
    assert result.code == 0
    header, row = result.out.splitlines()
    assert header.split() == ["NAME", "SIZE", "STANDBY", "URL", "IMAGE"]
    for name, value in (("NAME", "root"), ("STANDBY", "off"), ("IMAGE", "/vz/root.hds")):
        assert row[header.index(name) :].startswith(value)
    assert "10 GiB" in row


def test_list_as_json(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    result = call(capsys, ploopctl, "--control", daemon.path, "device", "list", "--output", "json")
    assert json.loads(result.out) == [
        {
            "name": "root",
            "image": "/vz/root.hds",
            "size": 10 << 30,
            "standby": "off",
            "urls": ["iscsi://127.0.0.1:3260/iqn.2026-11.org.ploopd:x/0"],
            "read_only": False,
        }
    ]
    assert result.err == ""


def test_show(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    result = call(capsys, ploopctl, "--control", daemon.path, "device", "show", "root")
    lines = dict(line.split(":", 1) for line in result.out.splitlines())
    assert lines["size"].strip() == "10 GiB (10,737,418,240 bytes)"
    assert lines["state"].strip() == "standby: write failed"
    assert lines["parked"].strip() == "3 requests, 12 KiB"
    assert "3 requests, 12 KiB; 12.75 KiB of 64 MiB used" in result.out
    assert lines["recovery"].strip() == "reopen, 4 attempts: /vz/root.hds: open failed"
    shown = call(
        capsys, ploopctl, "--control", daemon.path, "device", "show", "root", "--output=json"
    )
    assert json.loads(shown.out)["layers"][0]["path"] == "/vz/root.hds"


def test_an_unknown_device(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    result = call(capsys, ploopctl, "--control", daemon.path, "device", "show", "toor")
    assert (result.code, result.out) == (ExitCode.NOT_FOUND, "")
    assert result.err.splitlines() == ["cli: no such device (device = 'toor')"]


def test_no_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none.sock"
    result = call(capsys, ploopctl, "--control", path, "device", "list")
    assert result.code == ExitCode.NOT_RUNNING
    assert len(result.err.splitlines()) == 1
    assert str(path) in result.err
    assert "ploopd serve" in result.err


def test_replace_prints_its_steps_on_stderr(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    result = call(
        capsys, ploopctl, "--control", daemon.path, "device", "replace", "root", "--image", "new"
    )
    assert (result.code, result.out) == (0, "")
    assert [line.split() for line in result.err.splitlines()] == [
        ["0.250", "s", "drain"],
        ["0.500", "s", "done"],
    ]
    (asked,) = daemon.asked
    assert isinstance(asked, messages.ReplaceParameters)
    assert asked.image == str(Path.cwd() / "new")


def test_a_failed_replace(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    result = call(
        capsys, ploopctl, "--control", daemon.path, "device", "replace", "root", "--image", "/bad"
    )
    assert result.code == 1
    steps = result.err.splitlines()
    assert "drain" in steps[0]
    assert steps[1] == "cli: /bad: open failed: Input/output error [EIO]"


def test_standby_show_prints_exactly_the_state(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    result = call(capsys, ploopctl, "--control", daemon.path, "device", "standby", "root", "show")
    assert (result.code, result.out, result.err) == (0, "not supported\n", "")


def test_standby_wait(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--control", daemon.path, "device", "standby", "root"]
    result = call(capsys, ploopctl, *base, "wait", "--state", "on", "--timeout", "1")
    assert result.code == ExitCode.TIMEOUT
    assert daemon.asked == [messages.StandbyWaitParameters(name="root", standby="on", timeout=1.0)]
    assert call(capsys, ploopctl, *base, "wait").code == ExitCode.USAGE
    assert call(capsys, ploopctl, *base, "show", "--state", "on").code == ExitCode.USAGE


def test_events_as_lines(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    result = call(capsys, ploopctl, "--control", daemon.path, "events", "--device", "root")
    assert result.code == 0
    assert result.err == "2 events were lost here\n"
    first, second = result.out.splitlines()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d  "
    shown = "root  standby-entered  errno=EIO path='/a b\\n' offset=4096"
    assert re.fullmatch(stamp + re.escape(shown), first)
    assert re.fullmatch(stamp + re.escape("root  replace-step  elapsed=0.250"), second)
    assert daemon.asked == [messages.EventsParameters(device="root")]


def test_events_for_programs(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    base = ("--control", daemon.path, "events", "--output", "json")
    result = call(capsys, ploopctl, *base)
    assert [one["sequence"] for one in json.loads(result.out)] == [7, 8]
    result = call(capsys, ploopctl, *base, "--follow", "--timeout", "0.5")
    assert [json.loads(line)["event"] for line in result.out.splitlines()] == [
        "standby-entered",
        "replace-step",
    ]
    assert result.err == "1 events were lost here\ncli: stopped\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve"],
        ["serve", "--park-max", "soon", "x"],
        ["serve", "--park-max", "-1", "x"],
        ["serve", "--portal", "nowhere:x", "x"],
        ["serve", "--write-cache", "maybe", "x"],
        ["serve", "--unknown", "x"],
        ["server"],
    ],
)
def test_usage_errors_are_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = call(capsys, ploopd, *arguments)
    assert (result.code, result.out) == (ExitCode.USAGE, "")
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["device", "list", "--timeout", "nan"],
        ["device", "list", "--timeout", "inf"],
        ["device", "list", "--timeout", "1e20"],
        ["device", "list", "--timeout", "0"],
        ["device", "standby", "root"],
    ],
)
def test_usage_errors_of_ploopctl_are_one_line(
    arguments: list[str], daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    result = call(capsys, ploopctl, "--control", daemon.path, *arguments)
    assert (result.code, result.out) == (ExitCode.USAGE, "")
    assert len(result.err.splitlines()) == 1
    assert "internal error" not in result.err
    assert "\\t" not in result.err


@pytest.mark.parametrize(
    ("command", "arguments"),
    [(ploopd, []), (ploopctl, []), (ploopctl, ["device"]), (ploopctl, ["image"])],
)
def test_without_a_command_there_is_help_to_read(
    command: click.Command, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = call(capsys, command, *arguments)
    assert (result.code, result.out) == (ExitCode.USAGE, "")
    assert result.err.startswith("Usage: ")
    assert "\nCommands:\n" in result.err


def test_the_nearest_command_is_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    result = call(capsys, ploopctl, "devise", "list")
    assert result.code == ExitCode.USAGE
    assert "did you mean device?" in result.err


def test_a_secret_cannot_be_given_on_the_command_line() -> None:
    from ploopd.cli.serve import serve

    names = {name for parameter in serve.params for name in parameter.opts}
    assert not {name for name in names if "secret" in name or "password" in name}


@click.command()
@click.option("--kind")
def fails(kind: str) -> None:
    """A command that ends in every possible way."""
    match kind:
        case "bug":
            raise KeyError("missing")
        case "group":
            raise ExceptionGroup("", [ExceptionGroup("", [NotFoundError("gone", path="/x\ny")])])
        case "mixed":
            raise ExceptionGroup("", [NotFoundError("gone"), ValueError("bug")])
        case "interrupt":
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("kind", "code", "text"),
    [
        ("bug", 1, "internal error: KeyError: 'missing'"),
        ("group", 4, "/x\\ny: gone"),
        ("mixed", 1, "internal error"),
        ("interrupt", 130, ""),
    ],
)
def test_nothing_ends_in_a_bare_traceback(
    kind: str, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = call(capsys, fails, "--kind", kind)
    assert result.code == code
    assert text in result.err
    assert len(result.err.splitlines()) <= 1
    assert "Traceback" not in result.err


def test_debug_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLOOPD_DEBUG", "1")
    result = call(capsys, fails, "--kind", "bug")
    assert "Traceback" in result.err
    assert "raise KeyError" in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["ploopd.cli.ploopd", "--help"],
        ["ploopd.cli.ploopd", "serve", "--help"],
        ["ploopd.cli.ploopd", "--version"],
        ["ploopd.cli.ploopctl", "--help"],
        ["ploopd.cli.ploopctl", "device", "--help"],
        ["ploopd.cli.ploopctl", "image", "--help"],
        ["ploopd.cli.ploopctl", "device", "standby", "--help"],
    ],
)
def test_help_imports_nothing_slow(arguments: list[str]) -> None:
    module, *rest = arguments
    code = (
        "import runpy, sys\n"
        f"sys.argv = {['x', *rest]!r}\n"
        "try:\n"
        f"    runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "print('\\n'.join(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert "click" in loaded
    assert not loaded & {"trio", "numpy", "construct", "rich", "asyncio", "hypothesis"}


def test_completion_scripts_and_device_names(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    for shell in ("bash", "zsh", "fish"):
        result = call(capsys, ploopctl, "completion", shell)
        assert result.code == 0
        assert "_PLOOPCTL_COMPLETE" in result.out
    from click.shell_completion import ShellComplete

    complete = ShellComplete(ploopctl, {}, "ploopctl", "_PLOOPCTL_COMPLETE")
    control = ["--control", str(daemon.path)]
    names = complete.get_completions([*control, "device", "show"], "r")
    assert [one.value for one in names] == ["root"]
    assert complete.get_completions(["--control", "/none", "device", "show"], "r") == []
