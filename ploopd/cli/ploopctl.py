"""`ploopctl`: images without a daemon, and a running daemon's devices."""

from __future__ import annotations

from pathlib import Path

import click

from ploopd import __version__
from ploopd.cli.errors import run
from ploopd.cli.lazy import LazyGroup

_COMMANDS = {
    "image": ("ploopd.cli.image:image", "Create, inspect and check images; needs no daemon."),
    "device": ("ploopd.cli.device:device", "The disks of a running daemon."),
    "lio": ("ploopd.cli.lio:lio", "Devices as LUNs of the kernel's own iSCSI target."),
    "reload": ("ploopd.cli.reload:reload", "Let a daemon read its configuration again."),
    "events": ("ploopd.cli.events:events", "What happened to the devices, and what happens."),
    "info": ("ploopd.cli.info:info", "Version, portals and uptime of a running daemon."),
    "shell": ("ploopd.cli.shell:shell", "The daemon as a tree, as targetcli has it."),
    "completion": ("ploopd.cli.completion:completion", "Print a shell's completion script."),
}


@click.group(
    cls=LazyGroup, lazy=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option(
    "--control",
    type=click.Path(readable=False, path_type=Path),
    envvar="PLOOPD_CONTROL",
    help="The daemon's control socket; default: /run/ploopd/control.sock for root, else "
    "$XDG_RUNTIME_DIR/ploopd/control.sock, else /tmp/ploopd-UID/control.sock.",
)
@click.option("--debug", is_flag=True, help="Print the traceback when something fails.")
@click.version_option(__version__, prog_name="ploopctl")
@click.pass_context
def cli(context: click.Context, control: Path | None, debug: bool) -> None:
    """Control ploopd and work on ploop images.

    Exit codes: 0 done, 1 error, 2 usage, 3 no daemon, 4 not found, 5 denied, 6 busy or locked,
    7 timeout, 8 standby, 9 read-only, 10 no space, 11 format, 12 corrupt, 13 descriptor,
    14 unclean, 15 address in use, 16 unsupported, 17 configuration. `image check` has qemu-img's.
    """
    context.obj = control


def main() -> None:
    """Entry point of the `ploopctl` command."""
    run("ploopctl", cli)


if __name__ == "__main__":
    main()
