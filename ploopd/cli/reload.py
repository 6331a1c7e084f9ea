"""`ploopctl reload`: a running daemon reads its configuration files again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from ploopd.cli.options import TIMEOUT
from ploopd.cli.render import OUTPUT, echo_json
from ploopd.errors import ExitCode

if TYPE_CHECKING:
    from ploopd.control.messages import ReloadReply


@click.command()
@click.option(
    "--force",
    is_flag=True,
    help="Remove devices in standby, too, if they are not configured any more: what waits for "
    "them fails.",
)
@OUTPUT
@TIMEOUT
@click.pass_context
def reload(context: click.Context, force: bool, output: str, timeout: float) -> None:
    """Read the configuration files of `ploopd run` again.

    A mistake in them changes nothing. Devices are added and removed, and what can change while it
    is in use is changed; the rest is named. Exit code 6 if something was not done because it is in
    use. `ploopctl device reload` opens the files of an image again, which is something else.
    """
    from ploopd.control import messages
    from ploopd.control.client import ControlClient

    with ControlClient(context.obj, timeout=timeout) as client:
        reply = client.call(
            messages.RELOAD,
            messages.ReloadReply,
            messages.ReloadAll(force=force),
            waiting="the configuration to be read",
        )
    if output == "json":
        echo_json(reply)
    else:
        for line in report_lines(reply):
            click.echo(line)
    if reply.refused:
        context.exit(ExitCode.BUSY)


def report_lines(reply: ReloadReply) -> Iterator[str]:
    """What was done and what was not, for people."""
    for what, names in (
        ("added", reply.added),
        ("removed", reply.removed),
        ("changed", reply.changed),
        ("after the next start", reply.needs_restart),
    ):
        if names:
            yield f"{what}: {', '.join(names)}"
    for each in reply.refused:
        yield f"not done: {each.device}: {each.reason}"
    if not (reply.added or reply.removed or reply.changed or reply.refused or reply.needs_restart):
        yield "nothing has changed"
