"""The files of `ploopd run`: what they may say, how they are merged, and how mistakes are named."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ploopd import config_file
from ploopd.config import ConfigError
from ploopd.config_file import RunConfig, check_config, load_config
from ploopd.errors import DeniedError, ExitCode, NotFoundError, PloopError
from ploopd.frontends.iscsi.config import Portal

ROOT = Path(__file__).resolve().parents[2]

FULL = """
[daemon]
control = "/run/ploopd/control.sock"
sysfs = "/run/ploopd/sys"
log_level = "debug"

[iscsi]
portals = ["127.0.0.1:3260", "[::1]"]
iqn = "iqn.2026-11.org.example:store"
acl = ["iqn.2004-10.com.example:a"]
insecure = true

[defaults]
cache = "none"
park_max = "forever"
journal_size = "32MiB"
extra_standby_errnos = ["ESTALE"]

[[device]]
image = "/vz/a.hds"
name = "a"
read_only = true
park_max = 12.5

[[device]]
image = "/vz/../vz/b/DiskDescriptor.xml"
recovery = "reopen"
candidates = ["/other/b.hds"]
recovery_delay = 0.5
recovery_delay_max = 8
"""

Load = Callable[..., RunConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def write_and_load(text: str, **others: str) -> RunConfig:
        main = tmp_path / "ploopd.toml"
        main.write_text(text)
        (tmp_path / "ploopd.d").mkdir(exist_ok=True)
        for name, content in others.items():
            (tmp_path / "ploopd.d" / f"{name}.toml").write_text(content)
        loaded = load_config(main)
        check_config(loaded)
        return loaded

    return write_and_load


def test_everything_that_can_be_said(load: Load) -> None:
    loaded = load(FULL)
    assert loaded.log_level == "debug"
    serve = loaded.serve
    assert (serve.control, serve.sysfs) == (
        Path("/run/ploopd/control.sock"),
        Path("/run/ploopd/sys"),
    )
    assert serve.iscsi.portals == (Portal(), Portal(host="::1"))
    assert serve.iscsi.acl == ("iqn.2004-10.com.example:a",)
    assert serve.iscsi.insecure
    a, b = serve.devices
    assert (a.name, a.image, a.read_only, a.park_max) == ("a", "/vz/a.hds", True, 12.5)
    assert (b.name, b.image, b.park_max) == (None, "/vz/b/DiskDescriptor.xml", None)
    for device in (a, b):
        assert device.cache == "none"
        assert device.journal_size == 32 << 20
        assert device.extra_standby_errnos == (errno.ESTALE,)
    assert (b.recovery, b.candidates) == ("reopen", ("/other/b.hds",))
    assert (b.recovery_delay, b.recovery_delay_max) == (0.5, 8.0)
    assert (a.recovery, a.recovery_delay, a.recovery_delay_max) == ("manual", 1.0, 30.0)


def test_a_device_alone_is_enough(load: Load) -> None:
    loaded = load('[[device]]\nimage = "/a"\n')
    assert loaded.log_level == "info"
    assert loaded.serve.control is None
    assert loaded.serve.iscsi.portals == (Portal(),)
    assert loaded.serve.iscsi.iqn.startswith("iqn.")
    assert loaded.serve.devices[0].standby


def test_the_kernels_target_needs_no_device(load: Load) -> None:
    loaded = load(
        '[lio]\nserve = true\n[defaults]\ncache = "none"\nrecovery = "command"\n'
        'recovery_command = ["/x"]\n'
    )
    assert loaded.serve.lio
    assert loaded.serve.devices == ()
    assert loaded.serve.backstores.cache == "none"
    assert loaded.serve.backstores.recovery == "manual"
    assert loaded.serve.iscsi.portals == ()  # LIO has the port


def test_the_embedded_target_listens_beside_the_kernels_where_it_is_told(load: Load) -> None:
    loaded = load('[lio]\nserve = true\n[iscsi]\nportals = ["127.0.0.1:3261"]\n')
    assert loaded.serve.iscsi.portals == (Portal(port=3261),)
    assert load("[lio]\nserve = true\n[iscsi]\nportals = []\n").serve.iscsi.portals == ()
    off = load(DEVICE, x="[lio]\nserve = false\n")
    assert not off.serve.lio
    assert off.serve.iscsi.portals == (Portal(),)


def test_drop_ins_are_read_in_the_order_of_their_names(load: Load, tmp_path: Path) -> None:
    loaded = load(
        '[defaults]\nio = "threads"\ncache = "none"\n[[device]]\nimage = "/first"\n',
        b='[defaults]\nio = "inline"\n[[device]]\nimage = "/third"\n',
        a='[daemon]\nlog_level = "error"\n[[device]]\nimage = "/second"\nio = "auto"\n',
        **{".hidden": "no toml"},
    )
    assert [device.image for device in loaded.serve.devices] == ["/first", "/second", "/third"]
    assert [device.io for device in loaded.serve.devices] == ["inline", "auto", "inline"]
    assert {device.cache for device in loaded.serve.devices} == {"none"}
    assert loaded.log_level == "error"
    directory = tmp_path / "ploopd.d"
    assert loaded.files == (
        tmp_path / "ploopd.toml",
        directory / "a.toml",
        directory / "b.toml",
    )


def test_the_default_hook_is_for_those_who_have_no_other_way(load: Load) -> None:
    loaded = load(
        '[defaults]\nrecovery = "command"\nrecovery_command = ["/hook", "x y"]\n'
        '[[device]]\nimage = "/a"\n[[device]]\nimage = "/b"\nrecovery = "manual"\n'
    )
    assert [device.recovery_command for device in loaded.serve.devices] == [("/hook", "x y"), None]


DEVICE = '[[device]]\nimage = "/a"\n'
BAD = [
    ("", "names no device"),
    ("[[device]\n", "is not TOML"),
    ('[[device]]\nname = "a"\n', "has no image"),
    ('[device]\nimage = "/a"\n', r"\[\[device\]\]"),
    ('[[device]]\nimage = "a"\n', r"line 2: is not an absolute path .*device 1.image = 'a'"),
    ("[[device]]\nimage = 7\n", r"line 2: expected `str`, got `int` .*image = 7"),
    (DEVICE + 'imgae = "/b"\n', r"line 3: .*no such key: imgae .*did you mean image\?"),
    ("[lio]\nserve = false\n", "names no device.*serve = true"),
    (DEVICE + "[lio]\nserve = 1\n", "line 4: expected `bool`, got `int` .*lio.serve"),
    (DEVICE + "[lio]\nserves = true\n", r"line 4: .*did you mean serve\?"),
    (DEVICE + '[iscsi]\nchap_files = ["credential:"]\n', "line 4: is not the name of a cred"),
    (DEVICE + '[iscsi]\nchap_files = ["credential:../x"]\n', "line 4: is not the name of a cred"),
    (DEVICE + "[demon]\n", r"no such table or key: demon.*did you mean daemon\?"),
    (DEVICE + '[daemon]\nlog_level = "loud"\n', r"line 4: .*daemon.log_level = 'loud'"),
    (DEVICE + '[iscsi]\ninsecure = "yes"\n', "expected `bool`"),
    (DEVICE + "[iscsi]\nportals = []\n", "names no portal"),
    (DEVICE + '[iscsi]\nportals = ["a:b:c"]\n', r"is not HOST:PORT .*iscsi.portals"),
    (DEVICE + '[iscsi]\nportals = ["0.0.0.0"]\n', "insecure = true"),
    (DEVICE + '[iscsi]\niqn = "x"\n', r"line 4: is not an iSCSI name"),
    (DEVICE + '[iscsi]\nacl = ["x"]\n', "is not an iSCSI name .*iscsi.acl"),
    (DEVICE + 'journal_size = "many"\n', "is not a size"),
    (DEVICE + "journal_size = 5\n", r"line 3: must be at least 1048576 bytes"),
    (DEVICE + "park_max = 0\n", "park_max"),
    (DEVICE + "park_max = nan\n", "park_max"),
    (DEVICE + 'park_max = "never"\n', "park_max"),
    (DEVICE + "recovery_delay = 0\n", "line 3: must be between 0.05 and 3600"),
    (DEVICE + "recovery_delay = 90\nrecovery_delay_max = 80\n", "line 3: is longer than"),
    (DEVICE + 'extra_standby_errnos = ["ESTALLED"]\n', "did you mean ESTALE"),
    (DEVICE + 'recovery = "command"\n', "recovery command"),
    (DEVICE + 'recovery_command = ["/x"]\n', "recovery"),
    (DEVICE + 'candidates = ["/x"]\n', "candidates are for recovery = reopen"),
    (DEVICE + 'recovery = "command"\nrecovery_command = ["x"]\n', "absolute"),
    (DEVICE + 'image_root = "/nowhere/at/all"\n', "/nowhere/at/all: is not a directory"),
    (DEVICE + 'name = "a/b"\n', "line 3: a device's name has letters"),
    (DEVICE + "physical_block_size = 1024\n", "physical_block_size"),
    ("defaults = 7\n" + DEVICE, r"write \[defaults\]"),
    ('[defaults]\nimage = "/x"\n' + DEVICE, "no such key: image"),
    (DEVICE + 'name = "a"\n' + DEVICE + 'name = "a"\n', "device 1 has that name"),
    (DEVICE + "lun = 2\n" + DEVICE + "lun = 2\n", r"device 1 has that lun \(device 2.lun = 2\)"),
    (DEVICE + "lun = 16384\n", "line 3: is not between 0 and 16383"),
    (DEVICE + 'lun = "0"\n', "line 3: expected `int`"),
    (DEVICE + 'io = "threads"\n' + DEVICE + 'io = "io_uring"\n', "one I/O engine"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_mistake_is_one_line_that_names_file_key_and_value(
    text: str, message: str, load: Load, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    shown = str(caught.value)
    assert shown.startswith(f"{tmp_path}/ploopd.toml: ")
    assert re.search(message, shown), shown
    assert caught.value.exit_code == ExitCode.CONFIG


def test_a_mistake_in_a_drop_in_names_that_file(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ploopd\.d/x\.toml: line 2: expected `bool`"):
        load(DEVICE, x="[iscsi]\ninsecure = 3\n")


def test_a_wrong_default_is_named_where_it_stands(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"ploopd\.d/x\.toml: line 2: .*defaults.journal_size"):
        load(DEVICE, x="[defaults]\njournal_size = 1\n")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none\.toml"):
        load_config(tmp_path / "none.toml")
    wrong = tmp_path / "w.toml"
    wrong.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(wrong)
    (tmp_path / "d.toml").mkdir()
    with pytest.raises(PloopError, match="directory"):
        load_config(tmp_path / "d.toml")


def test_chap_files_are_read_and_must_be_private(load: Load, tmp_path: Path) -> None:
    chap = tmp_path / "alice.toml"
    chap.write_text('user = "alice"\nsecret = "correct horse battery"\n')
    text = f'{DEVICE}[iscsi]\nchap_files = ["{chap}"]\nportals = ["0.0.0.0:3260"]\n'
    chap.chmod(0o600)
    found = load(text).serve.iscsi.chap
    assert found is not None
    assert found.accounts[0].user == "alice"
    chap.chmod(0o644)
    with pytest.raises(DeniedError, match=r"alice\.toml"):
        load(text)


def test_a_credential_is_what_the_service_manager_has_loaded(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f'{DEVICE}[iscsi]\nchap_files = ["credential:alice"]\n'
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(ConfigError, match=r"gave no credentials.*LoadCredential=alice:"):
        load(text)
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    account = credentials / "alice"
    account.write_text('user = "alice"\nsecret = "correct horse battery"\n')
    account.chmod(0o440)  # as an ACL for the service's user looks
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    found = load(text).serve.iscsi.chap
    assert found is not None
    assert found.accounts[0].user == "alice"
    with pytest.raises(NotFoundError, match="credentials/bob"):
        load(text.replace("alice", "bob"))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "others"))
    with pytest.raises(DeniedError, match="others can read"):
        load(text.replace("credential:alice", str(account)))


def test_the_example_can_be_used(tmp_path: Path) -> None:
    loaded = load_config(ROOT / "systemd/ploopd.toml")
    check_config(loaded)
    text = (ROOT / "systemd/ploopd.toml").read_text()
    keys = set(re.findall(r"^#? ?([a-z_]+) = ", text, re.MULTILINE))
    sections = (config_file._Daemon, config_file._Iscsi, config_file._Lio, config_file._Device)
    for section in sections:
        for key in section.__struct_fields__:
            assert key in keys, f"{key} is not in the example"
    # What is commented out is right, too.
    every = tmp_path / "every.toml"
    chosen = [re.sub(r"^# ?(?=[a-z_]+ = |\[)", "", line) for line in text.splitlines()]
    every.write_text("\n".join(line for line in chosen if not line.startswith("chap_files")))
    load_config(every)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_bytes_do_anything_but_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.toml"
    path.write_bytes(content)
    with pytest.raises(PloopError):
        load_config(path)


def test_the_manual_has_every_key_and_no_other() -> None:
    manual = (ROOT / "docs/man/ploopd.toml.5.md").read_text()
    for heading, section in (
        ("[daemon]", config_file._Daemon),
        ("[iscsi]", config_file._Iscsi),
        ("[lio]", config_file._Lio),
        ("[[device]] and [defaults]", config_file._Device),
    ):
        text = manual.split(f"## {heading}\n")[1].split("\n## ")[0]
        entries = [line for line in text.splitlines() if line.startswith("**") and " = " in line]
        keys = {key for line in entries for key in re.findall(r"\*\*([a-z_]+)\*\*", line)}
        assert keys == set(section.__struct_fields__)
