"""Running the program that brings a device's storage back: no shell, but a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import trio

KEPT = 2048
"""Bytes of the end of stderr that are kept."""

GRACE = 3.0
"""Seconds between SIGTERM and SIGKILL."""

_LEFT_BEHIND = 0.5  # seconds for what a program that has ended may still write
_OURS = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM")


@dataclass(frozen=True, slots=True, kw_only=True)
class HookResult:
    """How a program ended: its exit code, or minus the signal; `elapsed` seconds; the end of its
    stderr.  `timed_out`: it was stopped."""

    status: int
    elapsed: float
    stderr: str
    timed_out: bool


async def run_hook(
    command: Sequence[str], variables: Mapping[str, str], limit: float
) -> HookResult:
    """Run `command` with `variables` added to the environment, for `limit` seconds at most.

    It runs in a session of its own; when the time is up, or the caller is cancelled, the whole
    session gets SIGTERM and then SIGKILL.  Raises OSError if it cannot be started.
    """
    began = trio.current_time()
    process = await trio.lowlevel.open_process(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=_environment(variables),
        cwd="/",
        start_new_session=True,
    )
    kept = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_read, process, kept)
        try:
            with trio.move_on_after(limit) as in_time:
                await process.wait()
        finally:
            if process.returncode is None:
                with trio.CancelScope(shield=True):
                    await _stop(process)
        nursery.cancel_scope.deadline = trio.current_time() + _LEFT_BEHIND
    assert process.stderr is not None
    await trio.aclose_forcefully(process.stderr)
    assert process.returncode is not None
    return HookResult(
        status=process.returncode,
        elapsed=trio.current_time() - began,
        stderr=bytes(kept).decode(errors="replace").strip(),
        timed_out=in_time.cancelled_caught,
    )


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Ours, without what is between the service manager and us; ploopctl can be found in PATH."""
    inherited = {name: value for name, value in os.environ.items() if name not in _OURS}
    path = inherited.get("PATH", os.defpath)
    inherited["PATH"] = f"{path}{os.pathsep}{os.path.dirname(sys.executable)}"
    return inherited | dict(variables)


async def _read(process: trio.Process, kept: bytearray) -> None:
    """Keep the end of what it writes; it must never wait for us."""
    assert process.stderr is not None
    async for data in process.stderr:
        kept += data
        del kept[:-KEPT]


async def _stop(process: trio.Process) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with trio.move_on_after(GRACE):
        await process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
