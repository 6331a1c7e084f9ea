"""Every bad input of `ploopd serve` once.

One line on stderr with the file, a distinct exit code, no traceback, nothing on stdout, and the
image bit-identical afterwards.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ploopd.errors import ExitCode
from tests.functional.serve_rig import assert_refused, image, run, snapshot
from tests.support.images import MIB, chain_of_three
from tests.support.serve import ServeError, ServeProcess

pytestmark = pytest.mark.functional

__all__ = ["image"]  # a fixture

ROOT = os.geteuid() == 0

HEADER = struct.Struct("<16sIIIIIQIIIQ")
FIELDS = {
    "version": 1,
    "clusters": 4,
    "entries": 5,
    "size": 6,
    "in_use": 7,
    "first_block": 8,
}


def patch(path: Path, **fields: int) -> None:
    """Overwrite fields of the header of a v2 delta."""
    data = bytearray(path.read_bytes())
    values = list(HEADER.unpack_from(data))
    for name, value in fields.items():
        values[FIELDS[name]] = value
    HEADER.pack_into(data, 0, *values)
    path.write_bytes(data)


def patch_bat(path: Path, **entries: int) -> None:
    """Overwrite BAT entries: `e3=9` sets the fourth one."""
    data = bytearray(path.read_bytes())
    for name, value in entries.items():
        struct.pack_into("<I", data, 64 + 4 * int(name[1:]), value)
    path.write_bytes(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad:
    """How to spoil an image, and what must be said about it."""

    name: str
    spoil: Callable[[Path], object]
    code: ExitCode
    mentions: tuple[str, ...] = ()


BAD_FILES = [
    Bad(name="missing", spoil=lambda p: p.unlink(), code=ExitCode.NOT_FOUND),
    Bad(
        name="truncated-header",
        spoil=lambda p: os.truncate(p, 63),
        code=ExitCode.FORMAT,
    ),
    Bad(
        name="truncated-bat",
        spoil=lambda p: os.truncate(p, 70),
        code=ExitCode.FORMAT,
    ),
    Bad(name="type", spoil=lambda p: patch(p, version=3), code=ExitCode.FORMAT, mentions=("3",)),
    Bad(name="no-cluster", spoil=lambda p: patch(p, clusters=0), code=ExitCode.FORMAT),
    Bad(
        name="huge-cluster",
        spoil=lambda p: patch(p, clusters=0xFFFFFFFF),
        code=ExitCode.FORMAT,
        mentions=("4294967295",),
    ),
    Bad(
        name="bat-larger-than-file",
        spoil=lambda p: patch(p, entries=1 << 28, size=(1 << 28) * 2048),
        code=ExitCode.FORMAT,
    ),
    Bad(name="size-without-bat", spoil=lambda p: patch(p, size=1 << 40), code=ExitCode.FORMAT),
    Bad(name="first-block", spoil=lambda p: patch(p, first_block=7), code=ExitCode.FORMAT),
    Bad(name="past-eof", spoil=lambda p: patch_bat(p, e5=100), code=ExitCode.CORRUPT),
    Bad(name="duplicate", spoil=lambda p: patch_bat(p, e1=1, e2=1), code=ExitCode.CORRUPT),
    Bad(
        name="unclean-and-wrong",
        spoil=lambda p: (patch(p, in_use=0x746F6E59), patch_bat(p, e5=100)),
        code=ExitCode.UNCLEAN,
        mentions=("ploopctl image check",),
    ),
]


@pytest.mark.parametrize("bad", BAD_FILES, ids=lambda bad: bad.name)
def test_a_bad_delta_is_refused_and_left_alone(tmp_path: Path, image: Path, bad: Bad) -> None:
    good = tmp_path / "good.hds"
    shutil.copy(image, good)
    bad.spoil(image)
    before = snapshot(tmp_path)
    control = tmp_path / "c.sock"
    for others in ([], [good]):
        result = run("serve", "--portal", "127.0.0.1:0", "--control", control, *others, image)
        assert_refused(result, bad.code, str(image), *bad.mentions)
    after = snapshot(tmp_path)
    after.pop("good.hds.uuid", None)
    assert after == before


def test_an_unclean_image_without_errors_is_served(tmp_path: Path, image: Path) -> None:
    patch(image, in_use=0x746F6E59)
    with ServeProcess(image, directory=tmp_path) as server:
        assert server.logged("image-note"), server.stderr
        assert server.stop() == 0
    assert HEADER.unpack_from(image.read_bytes())[FIELDS["in_use"]] != 0x746F6E59


def test_a_directory_a_device_and_a_fifo(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, codes in (
        (tmp_path, {ExitCode.NOT_FOUND, ExitCode.DESCRIPTOR}),
        (Path("/dev/null"), {ExitCode.UNSUPPORTED, ExitCode.USAGE, ExitCode.DENIED}),
        (fifo, {ExitCode.UNSUPPORTED, ExitCode.USAGE, ExitCode.DENIED}),
    ):
        result = run("serve", "--portal", "127.0.0.1:0", "--control", tmp_path / "c", path)
        assert result.returncode in codes, result.stderr
        assert_refused(result, ExitCode(result.returncode), str(path))


def test_no_permission(tmp_path: Path, image: Path) -> None:
    """Root goes without the capabilities that let it open everything."""
    drop = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if ROOT else ()
    image.chmod(0)
    control = tmp_path / "c"
    result = run("serve", "--portal", "127.0.0.1:0", "--control", control, image, prefix=drop)
    assert_refused(result, ExitCode.DENIED, str(image))


def test_a_read_only_file_system(tmp_path: Path, image: Path) -> None:
    """Refused for writing with the option to use, served with it; in a mount namespace."""
    namespace = ["unshare", "--mount", *([] if ROOT else ["--map-root-user"]), "sh", "-c"]
    mount = f"mount --bind {tmp_path} {tmp_path} && mount -o remount,bind,ro {tmp_path}"
    if subprocess.run([*namespace, mount], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    elsewhere = tmp_path.with_name(tmp_path.name + "-logs")
    elsewhere.mkdir()
    prefix = (*namespace, f'{mount} && exec "$0" "$@"')
    before = snapshot(tmp_path)
    with pytest.raises(ServeError) as caught:
        ServeProcess(image, directory=elsewhere, prefix=prefix).start()
    assert caught.value.returncode == ExitCode.READ_ONLY
    assert "--read-only" in caught.value.stderr
    options = ("--read-only",)
    with ServeProcess(image, directory=elsewhere, prefix=prefix, options=options) as server:
        assert server.ctl_json("device", "list")[0]["read_only"]
    assert snapshot(tmp_path) == before
    shutil.rmtree(elsewhere)


def test_a_name_that_no_terminal_should_see(tmp_path: Path) -> None:
    path = tmp_path / "evil\n\x1b[2Jploopd: \u202eall is well"
    result = run("serve", "--portal", "127.0.0.1:0", "--control", tmp_path / "c", path)
    assert_refused(result, ExitCode.NOT_FOUND, "evil\\n\\x1b[2Jploopd: \\u202eall")


@dataclass(frozen=True, slots=True, kw_only=True)
class BadDescriptor:
    """An edit of a good DiskDescriptor.xml, or of what is beside it."""

    name: str
    edit: Callable[[str, Path], str]
    code: ExitCode = ExitCode.DESCRIPTOR


def _outside(text: str, directory: Path) -> str:
    for path in directory.iterdir():
        if path.suffix != ".xml":
            target = directory.with_name("outside.hds")
            shutil.move(path, target)
            path.symlink_to(target)
            break
    return text


def _file_name(text: str) -> str:
    match = re.search(r"<File>([^<]+)</File>", text)
    assert match is not None
    return match[1]


BAD_DESCRIPTORS = [
    BadDescriptor(name="not-xml", edit=lambda t, d: t[: len(t) // 2]),
    BadDescriptor(name="empty", edit=lambda t, d: ""),
    BadDescriptor(
        name="dtd",
        edit=lambda t, d: t.replace(
            "?>", '?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>', 1
        ),
    ),
    BadDescriptor(name="huge", edit=lambda t, d: t + "<!--" + "x" * (2 * MIB) + "-->"),
    BadDescriptor(
        name="absolute",
        edit=lambda t, d: t.replace(f"<File>{_file_name(t)}", "<File>/etc/passwd"),
    ),
    BadDescriptor(
        name="parent-directory",
        edit=lambda t, d: t.replace(f"<File>{_file_name(t)}", "<File>../outside.hds"),
    ),
    BadDescriptor(
        name="missing-file",
        edit=lambda t, d: t.replace(f"<File>{_file_name(t)}", "<File>nowhere.hds"),
    ),
    BadDescriptor(name="symlink-out", edit=_outside),
    BadDescriptor(
        name="unknown-parent",
        edit=lambda t, d: re.sub(
            r"<ParentGUID>[^<]+", "<ParentGUID>{11111111-2222-3333-4444-555555555555}", t
        ),
    ),
]


@pytest.mark.parametrize("bad", BAD_DESCRIPTORS, ids=lambda bad: bad.name)
def test_a_bad_descriptor_is_refused(tmp_path: Path, bad: BadDescriptor) -> None:
    directory = tmp_path / "disk"
    directory.mkdir()
    case = chain_of_three(directory)
    descriptor = case.serve if case.serve.is_file() else case.serve / "DiskDescriptor.xml"
    text = bad.edit(descriptor.read_text(), descriptor.parent)
    descriptor.write_text(text)
    before = snapshot(tmp_path)
    result = run("serve", "--portal", "127.0.0.1:0", "--control", tmp_path / "c", case.serve)
    assert_refused(result, bad.code, str(descriptor.parent))
    assert snapshot(tmp_path) == before


def test_the_port_is_taken(tmp_path: Path, image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(52)
        file.write(b"\x01")  # the flag "empty" of libploop, which no writer would leave there
    before = snapshot(image.parent)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("serve", "--portal", f"127.0.0.1:{port}", "--control", tmp_path / "c", image)
    assert_refused(result, ExitCode.ADDRESS_IN_USE, str(port))
    assert snapshot(image.parent) == before


def test_an_address_of_another_host(tmp_path: Path, image: Path) -> None:
    before = image.read_bytes()
    result = run(
        "serve", "--insecure", "--portal", "192.0.2.1:0", "--control", tmp_path / "c", image
    )
    assert result.returncode not in (0, -signal.SIGKILL)
    assert_refused(result, ExitCode(result.returncode), "192.0.2.1")
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--portal", "0.0.0.0:0"], ExitCode.CONFIG),
        (["--iqn", "not a name"], ExitCode.USAGE),
        (["--acl", "not a name"], ExitCode.USAGE),
        (["--image-root", "/nonexistent"], ExitCode.NOT_FOUND),
        (["--control", "/nonexistent/c.sock"], ExitCode.NOT_FOUND),
        (["--chap-file", "/nonexistent"], ExitCode.NOT_FOUND),
    ],
)
def test_bad_options(tmp_path: Path, image: Path, arguments: list[str], code: ExitCode) -> None:
    before = image.read_bytes()
    base = ["serve", "--portal", "127.0.0.1:0", "--control", str(tmp_path / "c")]
    result = run(*base, *arguments, image)
    assert_refused(result, code)
    assert image.read_bytes() == before


def test_a_daemon_that_did_not_start_says_so(tmp_path: Path) -> None:
    with pytest.raises(ServeError) as caught:
        ServeProcess(tmp_path / "missing", directory=tmp_path).start()
    assert caught.value.returncode == ExitCode.NOT_FOUND
