"""Running the daemon in the foreground: what `ploopd serve` and `ploopd run` share."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from ploopd.cli.errors import one_line
from ploopd.daemon import Export, Ready, serve_images
from ploopd.logs import start_logging
from ploopd.systemd import Notifier
from ploopd.units import format_size_exact

if TYPE_CHECKING:
    from ploopd.config import ServeConfig
    from ploopd.reload import ConfigSource


def run_daemon(
    config: ServeConfig, log_level: str, ready: Ready, source: ConfigSource | None = None
) -> None:
    """Run until a signal ends it; `ready` is called when every LUN can be used.

    `source` is where the configuration can be read again.
    """
    # The soft limit protects programs that use select(); chains and sessions need more than 1024.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    log = start_logging(log_level, sys.stderr)
    try:
        with Notifier() as notifier:
            trio.run(serve_images, config, ready, notifier, source)
    finally:
        log.close()


def print_exports(exports: list[Export], _control_path: Path) -> None:
    """Print the line of each LUN on stdout: from now on it can be used.

    It begins with the device's name where the embedded target listens nowhere.
    """
    lines = [
        f"{one.url or one.device}  {one_line(one.image)}  {format_size_exact(one.size)}\n"
        for one in exports
    ]
    try:
        sys.stdout.write("".join(lines))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever started us has read enough; the disks are what matters.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
