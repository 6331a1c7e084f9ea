"""`ploopctl image`: words, exit codes and JSON as qemu-img's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ploopd.cli.errors import run_to_code
from ploopd.cli.ploopctl import cli
from tests.support import oracles
from tests.support.images import write_descriptor
from tests.unit.storage.broken_images import (
    CLUSTER,
    IN_USE,
    SIZE,
    append,
    make,
    set_entry,
    set_word,
    truncate,
)


class Result:
    """How a command ended and what it printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def image_command(capfd: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object) -> Result:
        capfd.readouterr()
        code = run_to_code("ploopctl", cli, ["image", *map(str, arguments)])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Result(int(code), out, err)

    return call


def test_create_info_check_map(tmp_path: Path, image_command: Any) -> None:
    path = tmp_path / "a.hds"
    made = image_command("create", "--size", "10G", path)
    assert (made.code, made.err) == (0, "")
    assert "10 GiB" in made.out
    info = image_command("info", path)
    assert info.code == 0
    assert "virtual size:   10 GiB (10,737,418,240 bytes)" in info.out
    assert "cluster size:   1 MiB" in info.out
    check = image_command("check", path)
    assert check.code == 0
    assert "No errors were found on the image." in check.out
    assert "Image end offset: 1048576" in check.out
    assert image_command("map", path).out.split() == ["Offset", "Length", "Mapped", "to", "File"]


def test_create_with_everything(tmp_path: Path, image_command: Any) -> None:
    options = ["--size", "100M", "--cluster-size", "64K", "--format-version", "1", "--descriptor"]
    made = image_command("create", *options, "--output", "json", f"{tmp_path}/vm/")
    assert made.code == 0
    assert made.json() == {
        "filename": f"{tmp_path}/vm/root.hds",
        "descriptor": f"{tmp_path}/vm/DiskDescriptor.xml",
        "format": "parallels",
        "format-version": 1,
        "virtual-size": 100 << 20,
        "cluster-size": 64 << 10,
    }
    info = image_command("info", "--output", "json", f"{tmp_path}/vm").json()
    assert info["format-specific"]["data"]["format-version"] == 1


def test_rounding_is_said_on_stderr(tmp_path: Path, image_command: Any) -> None:
    made = image_command("create", "--size", "1537K", tmp_path / "a.hds")
    assert made.code == 0
    assert "rounded up to 2 MiB" in made.err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--size", "10X"], "10X"),
        (["--size", "0"], "size"),
        (["--size", "3T", "--format-version", "1"], "version 1"),
        (["--size", "1G", "--cluster-size", "3M"], "cluster_size"),
        (["--size", "1G", "--format-version", "3"], "3"),
        ([], "--size"),
    ],
)
def test_create_refuses(
    tmp_path: Path, image_command: Any, arguments: list[str], word: str
) -> None:
    result = image_command("create", *arguments, tmp_path / "a.hds")
    assert result.code == 2
    assert word in result.err
    assert result.err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_create_never_overwrites(tmp_path: Path, image_command: Any) -> None:
    path = tmp_path / "a.hds"
    path.write_text("precious")
    result = image_command("create", "--size", "1G", path)
    assert result.code == 2
    assert "already exists" in result.err
    assert path.read_text() == "precious"


def same_fields(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """All that qemu-img says, we say, too; numbers it leaves out are 0."""
    assert {name: ours[name] for name in theirs} == theirs


def test_check_json_is_qemus(tmp_path: Path, image_command: Any) -> None:
    image = make(tmp_path / "a.hds")
    append(image, 3 * CLUSTER)
    theirs = subprocess.run(
        ["qemu-img", "check", "--output=json", "-f", "parallels", str(image)],
        capture_output=True,
        text=True,
        check=False,
    )
    ours = image_command("check", "--output", "json", image)
    assert ours.code == theirs.returncode == 3
    same_fields(ours.json(), json.loads(theirs.stdout))


def test_info_json_is_qemus(tmp_path: Path, image_command: Any) -> None:
    image = make(tmp_path / "a.hds")
    theirs = json.loads(oracles.run("qemu-img", "info", "--output=json", str(image)))
    theirs.pop("dirty-flag", None)
    same_fields(image_command("info", "--output", "json", image).json(), theirs)


def test_map_json_is_qemus(tmp_path: Path, image_command: Any) -> None:
    image = make(tmp_path / "a.hds")
    theirs = json.loads(oracles.run("qemu-img", "map", "--output=json", str(image)))
    ours = image_command("map", "--output", "json", image).json()
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        same_fields(one, other)


@pytest.mark.parametrize(
    ("damage", "code", "word"),
    [
        (lambda p: None, 0, ""),
        (lambda p: set_word(p, 44, IN_USE), 2, "in use"),
        (lambda p: set_entry(p, 30, 3), 2, "BAT[30]"),
        (lambda p: set_entry(p, 30, 99), 2, "BAT[30]"),
        (lambda p: append(p, CLUSTER), 3, "leaked"),
        (lambda p: (append(p, CLUSTER), set_word(p, 44, IN_USE)), 2, "in use"),
    ],
)
def test_check_exit_codes(
    tmp_path: Path, image_command: Any, damage: Any, code: int, word: str
) -> None:
    image = make(tmp_path / "a.hds")
    damage(image)
    before = image.read_bytes()
    result = image_command("check", image)
    assert result.code == code
    assert word in result.out
    assert image.read_bytes() == before
    assert image_command("check", "-r", "all", image).code == 0
    assert image_command("check", image).code == 0


def test_check_that_is_not_completed(tmp_path: Path, image_command: Any) -> None:
    image = make(tmp_path / "a.hds")
    truncate(image, 100)
    result = image_command("check", image)
    assert (result.code, result.out) == (1, "")
    assert "bat_entries" in result.err
    assert image_command("check", tmp_path / "missing").code == 1
    assert image_command("check", "--no-such-option", image).code == 1
    assert image_command("check", "-r", "most", image).code == 1
    assert image_command("check").code == 1


def test_check_of_what_has_no_metadata(tmp_path: Path, image_command: Any) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(1 << 20))
    theirs = subprocess.run(["qemu-img", "check", "-f", "raw", str(raw)], check=False)
    assert image_command("check", raw).code == theirs.returncode == 63


def test_repair_says_what_it_did(tmp_path: Path, image_command: Any) -> None:
    image = make(tmp_path / "a.hds")
    set_entry(image, 30, 3)
    append(image, CLUSTER)
    result = image_command("check", "--repair", "all", "--output", "json", image).json()
    assert (result["corruptions-fixed"], result["corruptions"], result["leaks"]) == (1, 0, 0)
    assert all(one["fixed"] for one in result["details"])
    assert "repaired" not in image_command("check", image).out


def test_a_chain_is_checked_as_a_whole(tmp_path: Path, image_command: Any) -> None:
    make(tmp_path / "base.hds")
    append(make(tmp_path / "top.hds"), CLUSTER)
    names = [
        ("{00000000-0000-0000-0000-000000000001}", "Compressed", "base.hds"),
        ("{5fbaabe3-6958-40ff-92a7-860e329aab41}", "Compressed", "top.hds"),
    ]
    write_descriptor(tmp_path, SIZE, names, cluster_size=CLUSTER)
    result = image_command("check", "--output", "json", tmp_path)
    assert result.code == 3
    assert [one["leaks"] for one in result.json()] == [0, 1]
    info = image_command("info", "--output", "json", tmp_path).json()
    assert info["backing-filename"] == str(tmp_path / "base.hds")
    assert [layer["level"] for layer in info["layers"]] == [0, 1]
    assert "base.hds" in image_command("info", tmp_path).out
    assert "top.hds:" in image_command("check", tmp_path).out


def test_deltas_that_do_not_fit_together(tmp_path: Path, image_command: Any) -> None:
    make(tmp_path / "base.hds", version=1)
    make(tmp_path / "top.hds")
    truncate(tmp_path / "base.hds", 6 * CLUSTER)
    set_word(tmp_path / "top.hds", 32, 39)
    set_word(tmp_path / "top.hds", 36, 39 * 64)
    set_entry(tmp_path / "top.hds", 39, 0)
    names = [
        ("{00000000-0000-0000-0000-000000000001}", "Compressed", "base.hds"),
        ("{5fbaabe3-6958-40ff-92a7-860e329aab41}", "Compressed", "top.hds"),
    ]
    write_descriptor(tmp_path, SIZE, names, cluster_size=CLUSTER)
    result = image_command("check", tmp_path)
    assert result.code == 2
    assert "larger" in result.err


@pytest.mark.parametrize(("path", "code"), [("missing", 4), ("bad.hds", 11), ("vm", 13)])
def test_errors_have_their_exit_codes(
    tmp_path: Path, image_command: Any, path: str, code: int
) -> None:
    (tmp_path / "bad.hds").write_bytes(b"garbage" * 100)
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm" / "DiskDescriptor.xml").write_text("<!DOCTYPE a><a/>")
    for command in ("info", "map"):
        result = image_command(command, tmp_path / path)
        assert result.code == code
        assert result.err.count("\n") == 1
        assert str(tmp_path / path) in result.err


def test_help_is_quick() -> None:
    """Nothing heavy is imported for it."""
    code = "import sys; from ploopd.cli.image import image; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "trio", "construct"} & set(done.stdout.split())
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert time.monotonic() - begin < 1
