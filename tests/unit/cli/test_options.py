"""Sizes, portals, CHAP files and the other conversions of the command line."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ploopd import config
from ploopd.cli import errors
from ploopd.cli.ploopctl import cli as ploopctl
from ploopd.cli.ploopd import cli as ploopd
from ploopd.config import ConfigError, DeviceConfig, ServeConfig, parse_portal, read_chap_files
from ploopd.errors import DeniedError, ExitCode, NotFoundError, PloopError, UsageError
from ploopd.frontends.iscsi.config import IscsiConfig, Portal
from ploopd.frontends.iscsi.names import normalize_name
from ploopd.units import format_size, format_size_exact, parse_size
from tests.unit.cli.test_manual import commands

SECRET = "correct horse battery"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("64K", 65536),
        ("64KiB", 65536),
        ("1.5M", 1572864),
        ("10G", 10 << 30),
        (" 10 GiB ", 10 << 30),
        ("16T", 16 << 40),
        ("4096B", 4096),
    ],
)
def test_sizes_are_binary(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "1.5", "0.3K", "1e9", "٣K", "10 G 5"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


@given(st.integers(0, 1 << 62))
def test_a_formatted_size_reads_back_within_its_precision(size: int) -> None:
    text = format_size(size)
    number, unit = text.split(" ")
    back = float(number) * parse_size("1" + unit)
    assert abs(back - size) <= 0.006 * parse_size("1" + unit)
    assert format_size_exact(size).startswith(text + " (")


def test_formats() -> None:
    assert format_size_exact(10 << 30) == "10 GiB (10,737,418,240 bytes)"
    assert format_size(1536) == "1.5 KiB"
    assert format_size(511) == "511 B"


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:3260", "127.0.0.1", 3260),
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("localhost", "localhost", 3260),
        ("[::1]:860", "::1", 860),
        ("[fe80::1%eth0]", "fe80::1%eth0", 3260),
    ],
)
def test_portals(text: str, host: str, port: int) -> None:
    assert parse_portal(text) == Portal(host=host, port=port)


@pytest.mark.parametrize("text", ["", ":3260", "::1:3260", "a:b", "a:99999", "a b:1", "a:", "[::1"])
def test_what_is_not_a_portal_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        parse_portal(text)


@pytest.mark.parametrize("host", ["debian", "My_Host", "ünï.example", "", "---", "a.b-c"])
def test_the_default_name_is_valid_on_any_host(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config.socket, "gethostname", lambda: host)
    name = config.default_iqn()
    assert normalize_name(name) == name
    assert re.fullmatch(r"iqn\.2026-11\.org\.ploopd:.+", name)


def test_an_open_network_portal_needs_a_decision() -> None:
    def check(**options: object) -> None:
        iscsi = IscsiConfig(
            portals=(Portal(host="0.0.0.0"),),
            iqn="iqn.2026-11.org.ploopd:x",
            **options,  # type: ignore[arg-type]
        )
        ServeConfig(devices=(DeviceConfig(image="a"),), iscsi=iscsi).check()

    with pytest.raises(PloopError, match="--insecure") as caught:
        check()
    assert caught.value.exit_code == ExitCode.CONFIG
    check(insecure=True)
    check(acl=("iqn.2004-10.com.example:a",))


def write_chap(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_chap_file(tmp_path: Path) -> None:
    first = write_chap(
        tmp_path / "a",
        f'user = "alice"\nsecret = "{SECRET}"\n'
        f'mutual_user = "t"\nmutual_secret = "{SECRET[::-1]}"\n',
    )
    second = write_chap(
        tmp_path / "b",
        f'user = "bob"\nsecret = "{SECRET}!"\ninitiator = "iqn.2004-10.com.example:b"\n'
        "allow_md5 = true\n",
    )
    chap = read_chap_files([first, second])
    assert chap is not None
    assert [account.user for account in chap.accounts] == ["alice", "bob"]
    assert chap.accounts[0].secret == SECRET.encode()
    assert chap.accounts[1].initiator == "iqn.2004-10.com.example:b"
    assert chap.mutual is not None
    assert chap.mutual.secret == SECRET[::-1].encode()
    assert chap.algorithms == (8, 7, 6, 5)
    assert SECRET not in repr(chap)
    without_md5 = read_chap_files([first])
    assert without_md5 is not None
    assert 5 not in without_md5.algorithms
    assert read_chap_files([]) is None


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602, 0o620])
def test_a_chap_file_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = write_chap(tmp_path / "a", f'user = "a"\nsecret = "{SECRET}"\n', mode)
    with pytest.raises(DeniedError, match="chmod 600") as caught:
        read_chap_files([path])
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f'user = "a"\nsecret = "{SECRET}', "not TOML"),
        (f'user = "a"\nsecret = {SECRET}', "not TOML"),
        (f'secret = "{SECRET}"', "user"),
        (f'user = "a"\nsecret = "{SECRET}"\npassword = "{SECRET}"', "password"),
        (f'user = "a"\nsecret = "{SECRET[:11]}"', "12 to 255"),
        (f'user = "a"\nsecret = ["{SECRET}"]', "secret"),
        (f'user = "a"\nsecret = "{SECRET}"\nmutual_user = "b"', "go together"),
        (
            f'user = "a"\nsecret = "{SECRET}"\nmutual_user = "b"\nmutual_secret = "{SECRET}"',
            "equal",
        ),
        ("#" * 70000, "longer than"),
    ],
)
def test_a_wrong_chap_file_is_explained_without_its_secret(
    tmp_path: Path, text: str, message: str
) -> None:
    path = write_chap(tmp_path / "a", text)
    with pytest.raises(PloopError, match=message) as caught:
        read_chap_files([path])
    assert caught.value.exit_code in (ExitCode.CONFIG, ExitCode.USAGE)
    assert SECRET[:11] not in str(caught.value)


def test_accounts_that_contradict_each_other(tmp_path: Path) -> None:
    mutual = f'mutual_user = "t"\nmutual_secret = "{SECRET}%d"\n'
    one = write_chap(tmp_path / "1", f'user = "a"\nsecret = "{SECRET}"\n' + mutual % 1)
    two = write_chap(tmp_path / "2", f'user = "b"\nsecret = "{SECRET}"\n' + mutual % 2)
    with pytest.raises(ConfigError, match="different mutual account"):
        read_chap_files([one, two])
    with pytest.raises(ConfigError, match="another file has that user"):
        read_chap_files([one, one])


def test_a_chap_file_must_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a regular file"):
        read_chap_files([tmp_path])
    with pytest.raises(NotFoundError):
        read_chap_files([tmp_path / "missing"])


def test_permission_is_not_the_parsers_business() -> None:
    """What may not be read is a denied access, not a wrong usage; the daemon may read more."""
    programs: dict[str, click.Command] = {"ploopd": ploopd, "ploopctl": ploopctl}
    paths = [
        (name, parameter.name, parameter.type)
        for program, command in programs.items()
        for name, sub in commands(command, program)
        for parameter in sub.params
        if isinstance(parameter.type, click.Path)
    ]
    assert ("ploopd serve", "images") in {(name, parameter) for name, parameter, _ in paths}
    wrong = [(name, parameter) for name, parameter, kind in paths if kind.readable]
    assert not wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recovery", "command"), "recovery command"),
        (("--recovery-command", "/bin/true"), "recovery"),
        (("--recovery-command", "no-such-program-anywhere x"), "not a program"),
        (("--recovery-command", "'"), "closing quotation"),
        (("--recovery-command", " "), "names no program"),
        (("--candidate", "b"), "candidates are for"),
        (("--recovery", "reopen", "--candidate", "b", "second"), "one IMAGE"),
        (("--recovery", "never"), "reopen"),
    ],
)
def test_recovery_options_that_make_no_sense(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = errors.run_to_code("ploopd", ploopd, ["serve", "first", *arguments])
    assert code == ExitCode.USAGE
    assert message in capsys.readouterr().err
