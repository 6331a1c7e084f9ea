"""`ploopd`: the daemon's command line."""

from __future__ import annotations

from typing import Any

import click

from ploopd import __version__
from ploopd.cli.errors import run
from ploopd.cli.lazy import LazyGroup

_COMMANDS = {
    "serve": ("ploopd.cli.serve:serve", "Serve images over iSCSI until SIGINT or SIGTERM."),
    "run": ("ploopd.cli.run:run_service", "Serve what the configuration files say."),
    "check-config": ("ploopd.cli.run:check", "Check the configuration files."),
}


@click.group(
    cls=LazyGroup, lazy=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("--debug", is_flag=True, help="Print the traceback when something fails.")
@click.version_option(__version__, prog_name="ploopd")
def cli(**_: Any) -> None:
    """Serve ploop disk images over iSCSI, and keep the disk alive while its storage is not."""


def main() -> None:
    """Entry point of the `ploopd` command."""
    run("ploopd", cli)


if __name__ == "__main__":
    main()
