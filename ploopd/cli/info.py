"""`ploopctl info`: the running daemon."""

from __future__ import annotations

from pathlib import Path

import click

from ploopd.cli.options import TIMEOUT
from ploopd.cli.render import OUTPUT, echo_fields, echo_json


@click.command()
@OUTPUT
@TIMEOUT
@click.pass_obj
def info(control: Path | None, output: str, timeout: float) -> None:
    """Show version, portals and uptime of a running daemon."""
    from ploopd.control import messages
    from ploopd.control.client import ControlClient

    with ControlClient(control, timeout=timeout) as client:
        reply = client.call(
            messages.GET_INFO, messages.DaemonInfo, waiting="the daemon to say who it is"
        )
    if output == "json":
        echo_json(reply)
        return
    echo_fields(
        [
            ("version", reply.version),
            ("pid", str(reply.pid)),
            ("uptime", f"{reply.uptime:.0f} s"),
            ("iqn", reply.iqn),
            ("portals", ", ".join(reply.portals)),
            ("devices", str(reply.devices)),
        ]
    )
