"""`ploopctl completion SHELL` and the completion of device names."""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from ploopd.errors import PloopError

_ANSWER_SECONDS = 1.0


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.option(
    "--program",
    type=click.Choice(["ploopctl", "ploopd"]),
    default="ploopctl",
    show_default=True,
    help="Which command to complete.",
)
def completion(shell: str, program: str) -> None:
    """Print the completion script of SHELL.

    For bash: `ploopctl completion bash > /etc/bash_completion.d/ploopctl`.
    """
    found = get_completion_class(shell)
    assert found is not None
    command = click.Group(program)
    click.echo(found(command, {}, program, f"_{program.upper()}_COMPLETE").source())


def complete_device(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The daemon's device names; none when no daemon answers at once."""
    from ploopd.control import messages
    from ploopd.control.client import ControlClient

    control = context.find_root().params.get("control")
    path = control if isinstance(control, Path) else None
    try:
        with ControlClient(path, timeout=_ANSWER_SECONDS) as client:
            reply = client.call(
                messages.LIST_DEVICES, messages.DeviceList, waiting="the device list"
            )
    except PloopError:
        return []
    return [
        CompletionItem(one.name, help=one.image)
        for one in reply.devices
        if one.name.startswith(incomplete)
    ]
