"""The control file, by hand and from tests; what is wrong in it is said."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.functional.faultfs.helpers import made, refused, shell, wait_for
from tests.support import oracles
from tests.support.faultfs import FaultFs, FaultFsError
from tests.support.faultfs.script import ScriptError

pytestmark = [pytest.mark.functional, pytest.mark.fuse, pytest.mark.timeout(60)]


def test_by_hand(storage: FaultFs) -> None:
    """echo and cat are enough; the file does not appear in listings."""
    made(storage, "file")
    seen = shell(
        storage,
        """
        exec 3<> file
        echo 'fail "f*" write errno=ENOSPC count=1   # once' > $C && cat $C; echo x >&3; echo y >&3
        printf '# comment\\n\\nhang hidden fsync\\nshort * read bytes=1k\\n' >> $C
        echo 'clear hidden' > $C; echo 'clear 7777' > $C; ls -A
        """,
    )
    assert "No space left on device" in seen.stderr
    assert "Invalid argument" in seen.stderr
    assert seen.stdout.endswith("}\nfile\n")
    before = json.loads(seen.stdout[: seen.stdout.rindex("}") + 1])
    assert before["open"][0]["path"] == "file"
    assert before["open"][0]["mode"] == "rw"
    report = storage.report()
    assert [(rule["rule"][:5], rule["hits"]) for rule in report["rules"]] == [
        ("fail ", 1),
        ("short", 0),
    ]
    assert report["error"] == "there is no rule 7777"
    assert report["open"] == []
    storage.script("reset", "clear f*")
    assert len(storage.report()["rules"]) == 1
    storage.script(f"clear {report['rules'][1]['id']}")
    assert storage.report()["rules"] == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("explode *", "'explode' is none of fail"),
        ("fail * write", "fail needs errno="),
        ("fail * write errno=EWHAT", "'EWHAT' is no errno"),
        ("fail * wriet errno=EIO", "'wriet' is no operation"),
        ("fail disk errno=EIO", "fail PATH OPERATION"),
        ("fail", "fail PATH OPERATION"),
        ("fail * write errno=EIO every=0", "'0' is no number from 1"),
        ("fail * write errno=EIO count=x", "'x' is no number from 1"),
        ("fail * fsync errno=EIO range=bat", "a range is for read and write"),
        ("fail * write errno=EIO range=here", "'here' is no range"),
        ("fail * write errno=EIO range=cluster:", "'' is no number from 0"),
        ("fail * write errno=EIO range=1x-2", "'1x' is no number of bytes"),
        ("short * read", "short needs bytes="),
        ("short * fsync bytes=3", "only read and write can be short"),
        ("delay * read", "delay needs seconds="),
        ("delay * read seconds=-1", "'-1' is no number of seconds"),
        ("cache * fsync=perhaps", "fsync=honest or fsync=lie"),
        ("hang * read bytes=3", "is no option of hang"),
        ("delay * read seconds=1 late=1", "is no option of delay"),
        ("lose a b", "at most one argument"),
        ("alive now", "takes no argument"),
        ("dead EWHAT", "is no errno"),
        ("dead EIO unsynced=much", "'much' is no number of bytes"),
        ("dead EIO keep=1", "at most one argument"),
        ("fail 'unclosed write errno=EIO", "No closing quotation"),
    ],
)
def test_a_wrong_line_says_what_is_wrong(line: str, says: str, storage: FaultFs) -> None:
    """…and nothing of what was written with it is in force."""
    with pytest.raises(ScriptError) as caught:
        storage.script("fail * read errno=EIO", line)
    assert says in str(caught.value)
    with storage.control.open("w", buffering=-1) as control:  # one write
        control.write(f"fail * read errno=EIO\n{line}\n")
        refused(errno.EINVAL, control.flush)
        refused(errno.EINVAL, control.close)
    assert says in storage.report()["error"]
    assert storage.report()["rules"] == []


def test_a_rule_that_is_not_there_is_an_error(storage: FaultFs) -> None:
    with pytest.raises(FaultFsError, match="there is no rule 9999"):
        storage.script("fail * read errno=EIO", "release 9999")
    assert storage.report()["rules"] == []


def test_it_starts_with_a_script_and_writes_back_at_the_end(tmp_path: Path) -> None:
    missing = oracles.missing_for_fuse()
    if missing is not None:
        pytest.skip(missing)
    source, mount, script = (tmp_path / name for name in ("source", "mount", "script"))
    source.mkdir()
    mount.mkdir()
    script.write_text("fail * mkdir errno=EDQUOT\ncache *\n")
    command = [sys.executable, "-m", "tests.support.faultfs", str(source), str(mount)]
    with subprocess.Popen(
        [*command, "--script", str(script)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == f"faultfs: {source} on {mount}, control file {mount}/.faultfs\n"
        wait_for((mount / ".faultfs").exists)
        refused(errno.EDQUOT, (mount / "d").mkdir)
        (mount / "file").write_text("cached")
        assert (source / "file").read_text() == ""
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert (source / "file").read_text() == "cached"
    assert list(mount.iterdir()) == []


@pytest.mark.parametrize("rule", ["", "delay * read seconds=50", "hang * read"])
def test_it_ends_though_somebody_still_has_a_file_open(tmp_path: Path, rule: str) -> None:
    """Also in the middle of an operation, which the kernel then answers."""
    missing = oracles.missing_for_fuse()
    if missing is not None:
        pytest.skip(missing)
    (tmp_path / "source").mkdir()
    with FaultFs(tmp_path / "source", tmp_path / "mount") as storage:
        storage.script("cache *", *([rule] if rule else []))
        path = made(storage, "file", 8192)
        command = "exec 3<> file; echo cached >&3; head -c 1 <&3 | cat; exec sleep 100"
        with subprocess.Popen(["sh", "-c", command], cwd=storage.mountpoint) as user:
            wait_for(lambda: storage.status()["seen"].get("read", 0) > 0)
            assert path.exists()
            began = time.monotonic()
            storage.close()
            took = time.monotonic() - began
            user.kill()
    assert took < 5
    assert storage.ended == 0
    assert (tmp_path / "source" / "file").read_bytes().startswith(b"cached")


@pytest.mark.parametrize(
    ("script", "says"), [("nonsense", "'nonsense' is none of"), (None, "is not a directory")]
)
def test_a_wrong_start_is_one_line(script: str | None, says: str, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(script or "")
    source = str(tmp_path if script else tmp_path / "nowhere")
    command = [sys.executable, "-m", "tests.support.faultfs", source, str(tmp_path)]
    ended = subprocess.run(
        [*command, "--script", str(tmp_path / "script")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert says in ended.stderr
    assert ended.stderr.count("\n") == 1
