"""`ploopctl events`: what has happened to the devices, and what happens now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from ploopd.cli.completion import complete_device
from ploopd.cli.errors import one_line
from ploopd.cli.options import TIMEOUT
from ploopd.cli.render import OUTPUT, echo_json

if TYPE_CHECKING:
    from ploopd.control.messages import DeviceEvent


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens, until interrupted.")
@click.option(
    "--device",
    metavar="DEVICE",
    shell_complete=complete_device,
    help="Only the events of this device.",
)
@OUTPUT
@TIMEOUT
@click.pass_obj
def events(
    control: Path | None, follow: bool, device: str | None, output: str, timeout: float
) -> None:
    """Show the last events of the devices: come and gone, standby, replacements, limits.

    With `--follow` and `--output json` each event is one line. Events that were lost because this
    program was too slow are counted on stderr.
    """
    from ploopd.control import messages
    from ploopd.control.client import ControlClient

    parameters = messages.EventsParameters(device=device)
    with ControlClient(control, timeout=timeout) as client:
        if not follow:
            reply = client.call(
                messages.EVENTS, messages.EventsReply, parameters, waiting="the events"
            )
            _warn(reply.lost)
            if output == "json":
                echo_json(reply.events)
            else:
                _echo_lines(reply.events)
            return
        for reply in client.stream(
            messages.EVENTS, messages.EventsReply, parameters, waiting="an event", patient=True
        ):
            _warn(reply.lost)
            if output == "json":
                for event in reply.events:
                    click.echo(msgspec.json.encode(event).decode())
            else:
                _echo_lines(reply.events)


def _warn(lost: int) -> None:
    if lost:
        click.echo(f"{lost} events were lost here", err=True)


def _echo_lines(found: Iterable[DeviceEvent]) -> None:
    for line in event_lines(found):
        click.echo(line)


def event_lines(found: Iterable[DeviceEvent]) -> Iterator[str]:
    """A line for each event, in local time."""
    for event in found:
        when = datetime.fromtimestamp(event.time).astimezone()
        details = " ".join(f"{key}={_value(value)}" for key, value in event.details.items())
        stamp = when.isoformat(sep=" ", timespec="milliseconds")
        yield one_line(f"{stamp}  {event.device}  {event.event}  {details}".rstrip())


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    return repr(text) if not text or any(c.isspace() or c in "\"'=" for c in text) else text
