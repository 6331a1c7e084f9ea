"""Units and D-Bus policy as `make install-data` installs them, judged by systemd and D-Bus."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = ("ploopd", "ploopd-embedded", "ploopd-exports")
NAME = "org.kernel.TCMUService1"

pytestmark = [pytest.mark.functional, pytest.mark.timeout(60)]

BUS = """<busconfig>
  <type>system</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>
  </policy>
  <include>{policy}</include>
</busconfig>
"""  # Debian's system.conf, without other people's policies


def needs(program: str, package: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"NOT TESTED: apt-get install {package}")
    return found


def run(
    *command: str | Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | (env or {}),
        check=False,
    )


def install(destination: Path, *steps: str, prefix: str = "/usr") -> str:
    program = Path(sys.executable).parent / "ploopd"
    env = {"DESTDIR": str(destination), "PREFIX": prefix, "BINDIR": str(program.parent)}
    result = run("tools/install", *steps, env=env)
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def destination(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("destination")
    install(directory, "data")
    return directory


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}


def unit(destination: Path, name: str) -> Path:
    return destination / f"usr/lib/systemd/system/{name}.service"


def verify(*paths: Path) -> subprocess.CompletedProcess[str]:
    analyze = needs("systemd-analyze", "systemd")
    return run(analyze, "verify", "--man=no", "--recursive-errors=one", *paths)


def test_systemd_understands_the_units(destination: Path) -> None:
    result = verify(*(unit(destination, name) for name in UNITS))
    assert (result.returncode, result.stderr) == (0, "")


def test_systemd_says_so_when_it_does_not(destination: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "ploopd.service"
    text = unit(destination, "ploopd").read_text()
    wrong.write_text(text.replace("Restart=on-failure", "Restarts=on-failure"))
    assert "'Restarts'" in verify(wrong).stderr
    wrong.write_text(text.replace("/ploopd run", "/ploopd-is-not-there run"))
    assert verify(wrong).returncode != 0


def exposure(path: Path) -> float:
    analyze = needs("systemd-analyze", "systemd")
    result = run(analyze, "security", "--offline=true", "--no-pager", path)
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", result.stdout)
    assert found is not None, result.stdout + result.stderr
    return float(found[1])


@pytest.mark.parametrize(
    ("name", "most"), [("ploopd", 3.0), ("ploopd-embedded", 2.0), ("ploopd-exports", 2.0)]
)
def test_what_the_services_may_do_is_little(destination: Path, name: str, most: float) -> None:
    path = unit(destination, name)
    assert 0 < exposure(path) <= most
    analyze = needs("systemd-analyze", "systemd")
    threshold = f"--threshold={round(most * 10)}"
    assert run(analyze, "security", "--offline=true", threshold, path).returncode == 0


def test_the_readme_says_how_much_that_is(destination: Path) -> None:
    embedded, root = (exposure(unit(destination, name)) for name in ("ploopd-embedded", "ploopd"))
    readme = (ROOT / "README.md").read_text()
    assert f"(`systemd-analyze security`: {embedded} and {root})" in readme


def test_the_drop_in_for_the_view(destination: Path, tmp_path: Path) -> None:
    service = tmp_path / "ploopd.service"
    shutil.copy(unit(destination, "ploopd"), service)
    drop_ins = tmp_path / "ploopd.service.d"
    drop_ins.mkdir()
    shutil.copy(destination / "usr/share/doc/ploopd/ploopd-view.conf", drop_ins)
    result = verify(service)
    assert (result.returncode, result.stderr) == (0, "")


def test_no_template_is_left_unfilled(destination: Path) -> None:
    for path in destination.rglob("*"):
        if path.is_file() and path.suffix in (".service", ".conf"):
            assert not re.search(r"@[a-z]+@", path.read_text()), path


def test_the_user_and_the_directory_for_secrets(destination: Path, tmp_path: Path) -> None:
    sysusers = needs("systemd-sysusers", "systemd")
    root = tmp_path / "root"
    shutil.copytree(destination, root)
    (root / "etc/ploopd/chap.d").rmdir()
    result = run(sysusers, f"--root={root}", "ploopd.conf")
    assert result.returncode == 0, result.stderr
    assert re.search(
        r"^ploopd:.*:/var/lib/ploopd:.*nologin$", (root / "etc/passwd").read_text(), re.M
    )
    if os.geteuid() == 0:
        result = run("systemd-tmpfiles", f"--root={root}", "--create", "ploopd.conf")
        assert result.returncode == 0, result.stderr
        assert (root / "etc/ploopd/chap.d").stat().st_mode & 0o7777 == 0o700


def test_uninstall_leaves_what_is_the_administrators(tmp_path: Path) -> None:
    install(tmp_path, "data", prefix="/opt/ploopd")
    assert "etc/systemd/system/ploopd.service" in files(tmp_path)
    assert "etc/dbus-1/system.d/ploopd.conf" in files(tmp_path)
    config = tmp_path / "etc/ploopd/ploopd.toml"
    config.write_text("# mine\n")
    install(tmp_path, "data", prefix="/opt/ploopd")
    assert config.read_text() == "# mine\n"
    install(tmp_path, "uninstall", prefix="/opt/ploopd")
    assert files(tmp_path) == {"etc/ploopd/ploopd.toml"}


@pytest.mark.parametrize(
    "setting", [{"PREFIX": "usr"}, {"DESTDIR": "/tmp/a b"}, {"BINDIR": "/a,b"}]
)
def test_paths_that_would_end_up_somewhere_else_are_refused(setting: dict[str, str]) -> None:
    result = run("tools/install", "data", env={"DESTDIR": "/nonexistent/x", **setting})
    assert result.returncode == 2
    assert next(iter(setting.values())) in result.stderr


def test_the_manual_is_one_for_man(destination: Path) -> None:
    needs("go-md2man", "go-md2man")
    for page, section, what in (
        ("ploopd", 8, "serve ploop disk images over iSCSI"),
        ("ploopctl", 1, "control ploopd and work on ploop images"),
        ("ploopd.toml", 5, "configuration of ploopd"),
    ):
        path = destination / f"usr/share/man/man{section}/{page}.{section}"
        text = path.read_text()
        assert f".TH {page} {section} " in text
        assert "**" not in text, "markdown that was not understood"
        lexgrog = shutil.which("lexgrog")
        if lexgrog is not None:
            assert run(lexgrog, path).stdout == f'{path}: "{page} - {what}"\n'


# -- D-Bus -------------------------------------------------------------------------------------


@pytest.fixture
def bus(destination: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a system bus with our policy."""
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: needs root, to be two users")
    daemon = needs("dbus-daemon", "dbus")
    directory = Path("/run") / f"ploopd-test-bus-{os.getpid()}"
    directory.mkdir()
    path, config = directory / "s", directory / "bus.conf"
    policy = destination / "usr/share/dbus-1/system.d/ploopd.conf"
    config.write_text(BUS.format(socket=path, policy=policy))
    process = subprocess.Popen([daemon, f"--config-file={config}", "--nofork", "--nopidfile"])
    try:
        deadline = time.monotonic() + 20
        while not path.exists():
            assert process.poll() is None, "dbus-daemon does not take the policy"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield f"unix:path={path}"
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(directory)


def call(bus: str, uid: int, to: str, member: str, *arguments: str) -> str:
    """Make a call as a user; what dbus-send prints."""
    setpriv = ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--")
    send = ("dbus-send", f"--bus={bus}", "--print-reply", "--reply-timeout=5000", f"--dest={to}")
    result = run(*setpriv, *send, "/", member, *arguments)
    return result.stdout + result.stderr


@pytest.mark.parametrize("name", [NAME, f"{NAME}.HandlerManager1.ploop"])
def test_only_root_is_the_handler(bus: str, name: str) -> None:
    request = ("org.freedesktop.DBus.RequestName", f"string:{name}", "uint32:4")
    assert "uint32 1" in call(bus, 0, "org.freedesktop.DBus", *request)
    refused = call(bus, 65534, "org.freedesktop.DBus", *request)
    assert "AccessDenied" in refused
    assert f'not allowed to own the service "{name}"' in refused


@pytest.mark.parametrize("name", [NAME, f"{NAME}.HandlerManager1.ploop"])
def test_only_root_asks_the_handler(bus: str, name: str) -> None:
    jeepney = pytest.importorskip("jeepney")
    from jeepney.io.blocking import open_dbus_connection

    with open_dbus_connection(bus=bus) as connection:
        request = jeepney.new_method_call(jeepney.message_bus, "RequestName", "su", (name, 4))
        assert connection.send_and_get_reply(request).body == (1,)
        refused = call(bus, 65534, name, f"{NAME}.CheckConfig", "string:x")
        assert "AccessDenied" in refused
        asking = subprocess.Popen(
            [
                *("dbus-send", f"--bus={bus}", "--print-reply", "--reply-timeout=20000"),
                *(f"--dest={name}", "/", f"{NAME}.CheckConfig", "string:x"),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        while True:
            message = connection.receive(timeout=20)
            if message.header.message_type is jeepney.MessageType.method_call:
                break
        assert message.body == ("x",)
        connection.send(jeepney.new_method_return(message, "s", ("answered",)))
        said, _ = asking.communicate(timeout=20)
        assert "answered" in said
