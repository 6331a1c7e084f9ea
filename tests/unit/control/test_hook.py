"""Recovery commands: what they are told, how they end, and that none outlives its time."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import trio

from ploopd.control import hook
from ploopd.control.hook import run_hook


def script(directory: Path, text: str) -> list[str]:
    path = directory / "hook.sh"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return [str(path)]


@pytest.mark.trio
async def test_what_it_is_told_and_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    monkeypatch.setenv("INHERITED", "yes")
    command = script(
        tmp_path,
        'echo "$PLOOPD_DEVICE,$INHERITED,$NOTIFY_SOCKET,$1,$PWD" >&2; echo lost; exit 3',
    )
    result = await run_hook([*command, "a b; $(c)"], {"PLOOPD_DEVICE": "root"}, 10)
    assert (result.status, result.timed_out) == (3, False)
    assert result.stderr == "root,yes,,a b; $(c),/"
    assert 0 <= result.elapsed < 5


@pytest.mark.trio
async def test_ploopctl_can_be_found(tmp_path: Path) -> None:
    result = await run_hook(script(tmp_path, 'echo "$PATH" >&2'), {}, 10)
    assert result.stderr.split(":")[-1] == os.path.dirname(sys.executable)


@pytest.mark.trio
async def test_only_the_end_of_a_long_output_is_kept(tmp_path: Path) -> None:
    command = script(tmp_path, "i=0; while [ $i -lt 20000 ]; do echo line $i >&2; i=$((i+1)); done")
    result = await run_hook(command, {}, 30)
    assert result.stderr.endswith("line 19999")
    assert len(result.stderr) <= hook.KEPT


@pytest.mark.trio
async def test_the_time_is_up_for_the_whole_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "GRACE", 0.2)
    pids = tmp_path / "pids"
    command = script(tmp_path, f"trap '' TERM; sleep 60 & echo $$ $! > {pids}; wait; wait")
    began = time.monotonic()
    result = await run_hook(command, {}, 0.3)
    assert result.timed_out
    assert result.status == -9
    assert time.monotonic() - began < 5
    await _all_gone(pids)


async def _all_gone(pids: Path) -> None:
    """The processes have ended, or are zombies that nobody has waited for yet."""
    started = pids.read_text().split()  # noqa: ASYNC240
    with trio.fail_after(5):
        for pid in started:
            while _alive(pid):  # noqa: ASYNC110
                await trio.sleep(0.01)


def _alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.trio
async def test_cancelled_it_is_stopped(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    command = script(tmp_path, f"sleep 60 & echo $$ $! > {pids}; wait")
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_hook, command, {}, 60)
            while not pids.exists() or not pids.read_text().endswith("\n"):  # noqa: ASYNC110
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        await _all_gone(pids)


@pytest.mark.trio
async def test_a_child_that_keeps_stderr_open_holds_nobody_up(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    command = script(tmp_path, f"sleep 20 & echo $! > {pids}; echo said >&2; exit 0")
    with trio.fail_after(5):
        result = await run_hook(command, {}, 10)
    os.kill(int(pids.read_text()), 9)
    assert (result.status, result.stderr) == (0, "said")


@pytest.mark.trio
async def test_what_cannot_be_run_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await run_hook([str(tmp_path / "none")], {}, 1)
