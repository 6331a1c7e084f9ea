"""`python -m tests.support.faultfs SOURCE MOUNTPOINT [--control FILE]`."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path

import pyfuse3
import trio

from tests.support.faultfs.filesystem import CONTROL, FaultFileSystem
from tests.support.faultfs.script import ScriptError

TASKS = 100_000
"""Operations that may hang at once; each waits in a task of its own."""

LAST_OPERATIONS = 0.5
"""Seconds for operations that are under way when a signal comes."""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    source, mountpoint = options.source.resolve(), options.mountpoint.resolve()
    for place in (source, mountpoint):
        if not place.is_dir():
            print(f"faultfs: {place} is not a directory", file=sys.stderr)
            return 2
    tree = FaultFileSystem(str(source))
    try:
        if options.script is not None:
            tree.faults.execute(options.script.read_text())
    except (ScriptError, OSError) as error:
        print(f"faultfs: {options.script}: {error}", file=sys.stderr)
        return 2
    mount_options = {"fsname=faultfs"} | ({"allow_other"} if options.allow_other else set())
    # An answer that comes after the unmount finds nobody: no error of this program.
    logging.getLogger("pyfuse3").setLevel(logging.CRITICAL)
    pyfuse3.init(tree, str(mountpoint), mount_options)
    hidden = mountpoint / CONTROL.decode()
    control: Path = options.control or hidden
    try:
        if control != hidden:
            if control.is_symlink():
                control.unlink()
            control.symlink_to(hidden)
        print(f"faultfs: {source} on {mountpoint}, control file {control}", flush=True)
        trio.run(serve, tree)
    finally:
        if control != hidden and control.is_symlink():
            control.unlink()
        pyfuse3.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.faultfs",
        description="Show SOURCE under MOUNTPOINT, with operations that fail, wait or hang.",
        epilog="The language of the control file: docs/testing.md.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("mountpoint", type=Path, metavar="MOUNTPOINT")
    parser.add_argument(
        "--control", type=Path, metavar="FILE", help="a name for the control file elsewhere"
    )
    parser.add_argument("--script", type=Path, metavar="FILE", help="rules to begin with")
    parser.add_argument("--allow-other", action="store_true", help="for other users, too")
    return parser


async def serve(tree: FaultFileSystem) -> None:
    """Until it is unmounted or a signal comes; what hangs goes on then, and what is slow ends."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_end_on_signal, tree, nursery.cancel_scope)
        await pyfuse3.main(min_tasks=1, max_tasks=TASKS)
        nursery.cancel_scope.cancel()
    tree.write_back()


async def _end_on_signal(tree: FaultFileSystem, everything: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            tree.faults.execute("clear")
            pyfuse3.terminate()
            everything.deadline = trio.current_time() + LAST_OPERATIONS


if __name__ == "__main__":
    sys.exit(main())
