"""`ploopctl device replace`, `reload`, `resize` and `clear-latch`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ploopd.cli.completion import complete_device
from ploopd.cli.options import NEW_SIZE, TIMEOUT
from ploopd.cli.render import OUTPUT, echo_json
from ploopd.errors import PloopError, UsageError
from ploopd.units import format_size, format_size_exact, parse_size

if TYPE_CHECKING:
    from ploopd.control.client import ControlClient
    from ploopd.control.messages import Message, Method, ReplaceStep

_DEVICE = click.argument("device", shell_complete=complete_device)
_DRY_RUN = click.option(
    "--dry-run", is_flag=True, help="Make all checks and print what would be done."
)


@click.command()
@_DEVICE
@click.option(
    "--image",
    required=True,
    type=click.Path(readable=False),
    help="The file that takes the delta's place.",
)
@click.option(
    "--level",
    type=click.IntRange(min=0),
    help="Which delta is replaced: 0, the default, is the top.",
)
@click.option("--guid", help="Which delta is replaced, by its GUID in the DiskDescriptor.xml.")
@click.option(
    "--keep-name",
    is_flag=True,
    help="Rename the new file to the name of the old one, which is lost.",
)
@click.option(
    "--keep-descriptor", is_flag=True, help="Leave the DiskDescriptor.xml naming the old file."
)
@click.option("--force", is_flag=True, help="Accept an image that was not closed cleanly.")
@_DRY_RUN
@OUTPUT
@TIMEOUT
@click.pass_obj
def replace(
    control: Path | None,
    device: str,
    image: str,
    level: int | None,
    guid: str | None,
    keep_name: bool,
    keep_descriptor: bool,
    force: bool,
    dry_run: bool,
    output: str,
    timeout: float,
) -> None:
    """Put another delta, or the same one again, under DEVICE.

    Ends the standby of DEVICE: parked requests are executed on the new delta, in their order. Each
    step is printed on stderr when it is done. When a step fails the device stays in standby and
    replace can be tried again. The DiskDescriptor.xml is changed to name the new file.
    """
    from ploopd.control import messages

    if level is not None and guid is not None:
        raise UsageError("give --level or --guid, not both", field="guid", value=guid)
    parameters = messages.ReplaceParameters(
        name=device,
        image=os.path.abspath(image),  # the daemon has another working directory
        force=force,
        level=level,
        guid=guid,
        keep_name=keep_name,
        keep_descriptor=keep_descriptor,
        dry_run=dry_run,
    )
    waiting = f"the next step of replacing {device}"
    _recover(control, timeout, messages.REPLACE_DEVICE, parameters, waiting, output)


@click.command()
@_DEVICE
@_DRY_RUN
@OUTPUT
@TIMEOUT
@click.pass_obj
def reload(control: Path | None, device: str, dry_run: bool, output: str, timeout: float) -> None:
    """Close the files of DEVICE and open them again.

    A DiskDescriptor.xml that was changed is taken up, as far as the disk keeps its size. Like
    `replace` it ends the standby of DEVICE, with the same steps.
    """
    from ploopd.control import messages

    parameters = messages.ReloadParameters(name=device, dry_run=dry_run)
    waiting = f"the next step of reloading {device}"
    _recover(control, timeout, messages.RELOAD_DEVICE, parameters, waiting, output)


@click.command()
@_DEVICE
@NEW_SIZE
@OUTPUT
@TIMEOUT
@click.pass_obj
def resize(control: Path | None, device: str, size: str, output: str, timeout: float) -> None:
    """Make the disk of DEVICE larger while it is served.

    The image is grown as `image resize` does it, while requests wait; initiators are told that the
    capacity has changed. Each step is printed on stderr when it is done. What cannot be done leaves
    DEVICE as it was. A device in standby does not grow. The size is rounded up to whole clusters.
    """
    from ploopd.control import messages
    from ploopd.control.client import ControlClient

    last: messages.ResizeStep | None = None
    with ControlClient(control, timeout=timeout) as client:
        parameters = messages.ResizeParameters(name=device, size=_wanted_size(client, device, size))
        waiting = f"the next step of resizing {device}"
        for last in client.stream(
            messages.RESIZE_DEVICE, messages.ResizeStep, parameters, waiting=waiting
        ):
            click.echo(_step_text(last.elapsed, last.step, last.detail), err=True)
    if last is None or last.size is None:
        raise PloopError(
            "the daemon sent no size", hint="are ploopd and ploopctl of the same version?"
        )
    if output == "json":
        echo_json({"device": device, "size": last.size, "previous": last.previous})
        return
    told = "has" if last.size == last.previous else f"{format_size(last.previous or 0)} →"
    click.echo(f"{device}: {told} {format_size_exact(last.size)}", err=True)


def _wanted_size(client: ControlClient, device: str, text: str) -> int:
    """Bytes; with a plus sign, more than the device has."""
    if not text.startswith("+"):
        return parse_size(text)
    from ploopd.control import messages

    added = parse_size(text[1:])
    reply = client.call(
        messages.SHOW_DEVICE,
        messages.ShowReply,
        messages.DeviceName(name=device),
        waiting=f"the size of {device}",
    )
    return reply.device.size + added


@click.command("clear-latch")
@_DEVICE
@TIMEOUT
@click.pass_obj
def clear_latch(control: Path | None, device: str, timeout: float) -> None:
    """Let DEVICE be written to again after a storage failure made it read-only."""
    from ploopd.control import messages
    from ploopd.control.client import ControlClient

    with ControlClient(control, timeout=timeout) as client:
        reply = client.call(
            messages.CLEAR_LATCH,
            messages.ClearLatchReply,
            messages.DeviceName(name=device),
            waiting=f"the latch of {device} to be cleared",
        )
    click.echo(f"{device}: was latched by: {reply.failure}", err=True)


def _recover(
    control: Path | None,
    timeout: float,
    method: Method,
    parameters: Message,
    waiting: str,
    output: str,
) -> None:
    """Call `method`, print its steps on stderr, and with JSON its report on stdout."""
    from ploopd.control import messages
    from ploopd.control.client import ControlClient

    last: ReplaceStep | None = None
    with ControlClient(control, timeout=timeout) as client:
        for last in client.stream(method, messages.ReplaceStep, parameters, waiting=waiting):
            _echo_step(last)
    if output == "json":
        if last is None or last.report is None:
            raise PloopError(
                "the daemon sent no report", hint="are ploopd and ploopctl of the same version?"
            )
        echo_json(last.report)


def _echo_step(step: ReplaceStep) -> None:
    if step.report is not None and step.planned:
        click.echo("nothing was changed", err=True)
        return
    elapsed = None if step.planned else step.elapsed
    click.echo(_step_text(elapsed, step.step, step.detail), err=True)


def _step_text(elapsed: float | None, step: str, detail: str) -> str:
    time = " " * 10 if elapsed is None else f"{elapsed:8.3f} s"
    return f"{time}  {step}: {detail}" if detail else f"{time}  {step}"
