"""The commands of docs/standby.md, "See it for yourself", do what the text says."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import oracles

pytestmark = [pytest.mark.functional, pytest.mark.fuse, pytest.mark.timeout(120)]

ROOT = Path(__file__).resolve().parents[2]
TITLE = "### See it for yourself"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def commands() -> str:
    """The shell blocks of the section, as they stand there."""
    text = (ROOT / "docs" / "standby.md").read_text()
    section = text.partition(TITLE)[2].partition("\n### ")[0]
    return "".join(re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL))


def log_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_what_the_section_shows_happens(tmp_path: Path) -> None:
    missing = oracles.missing_for_fuse()
    if missing is not None:
        pytest.skip(missing)
    if absent := oracles.have("qemu-io", "qemu-img", "iscsi-perf"):
        pytest.skip(f"{absent[0]} is not installed")
    script = commands()
    for written, here in (
        ("/tmp/see", str(tmp_path / "see")),
        ("127.0.0.1:3270", f"127.0.0.1:{free_port()}"),
        (".venv/bin/", f"{Path(sys.executable).parent}/"),
    ):
        assert written in script
        script = script.replace(written, here)
    # Job control as in a terminal.  Whatever still runs at the end is killed: the reader would go
    # on for its 30 seconds, and for ever without its target, as libiscsi tries again and again.
    ending = (
        'set +ex; for job in $(jobs -p); do kill -KILL -- "-$job"; done; '
        f'fusermount3 -quz "{tmp_path}/see/storage" 2>&-'
    )
    script = f"set -m -e\ntrap '{ending}' EXIT\n{script}"
    # Into files, not pipes: what a job leaves open must not keep the test waiting.
    with (tmp_path / "stdout").open("w+") as out, (tmp_path / "stderr").open("w+") as err:
        ended = subprocess.run(
            ["bash", "-x", "-c", script],
            cwd=ROOT,
            stdout=out,
            stderr=err,
            timeout=100,
            check=False,
        )
        out.seek(0)
        err.seek(0)
        stdout, stderr = out.read(), err.read()
    said = f"{stdout}\n{stderr}"
    if ended.returncode != 0:
        pytest.fail(f"exit status {ended.returncode}:\n{said}\n{log_of(tmp_path / 'see' / 'log')}")
    # iscsi-perf writes over its line: what comes next stands at the end of it.
    words = re.split(r"[\r\n]+|\s{4,}", stdout)
    assert words.index("on") < words.index("off"), said
    assert "state:        standby: " in said
    assert "32 requests" in said
    assert "recovered" in said
    assert "Pattern verification failed" not in said
    assert "No errors were found on the image." in said
    assert not (tmp_path / "see").exists()
