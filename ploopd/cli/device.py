"""`ploopctl device`: list, show, standby; what recovers a device is in `device_recovery`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ploopd.cli.completion import complete_device
from ploopd.cli.device_recovery import clear_latch, reload, replace, resize
from ploopd.cli.options import TIMEOUT
from ploopd.cli.render import OUTPUT, echo_fields, echo_json, echo_table
from ploopd.errors import UsageError
from ploopd.units import format_size, format_size_exact

if TYPE_CHECKING:
    from ploopd.control.client import ControlClient
    from ploopd.control.messages import DeviceDetails, JournalDetails, StandbyState

_DEVICE = click.argument("device", shell_complete=complete_device)


@click.group()
def device() -> None:
    """The disks of a running daemon."""


device.add_command(replace)
device.add_command(reload)
device.add_command(resize)
device.add_command(clear_latch)


def _client(control: Path | None, timeout: float) -> ControlClient:
    from ploopd.control.client import ControlClient

    return ControlClient(control, timeout=timeout)


@device.command("list")
@OUTPUT
@TIMEOUT
@click.pass_obj
def list_devices(control: Path | None, output: str, timeout: float) -> None:
    """List the devices; answers even while their storage hangs."""
    from ploopd.control import messages

    with _client(control, timeout) as client:
        devices = client.call(
            messages.LIST_DEVICES, messages.DeviceList, waiting="the device list"
        ).devices
    if output == "json":
        echo_json(devices)
        return
    rows = [
        (one.name, format_size(one.size), one.standby, " ".join(one.urls), one.image)
        for one in devices
    ]
    echo_table(("NAME", "SIZE", "STANDBY", "URL", "IMAGE"), rows, right=frozenset({1}))


@device.command()
@_DEVICE
@OUTPUT
@TIMEOUT
@click.pass_obj
def show(control: Path | None, device: str, output: str, timeout: float) -> None:
    """Show everything that is known of DEVICE."""
    from ploopd.control import messages

    with _client(control, timeout) as client:
        details = client.call(
            messages.SHOW_DEVICE,
            messages.ShowReply,
            messages.DeviceName(name=device),
            waiting=f"what is known of {device}",
        ).device
    if output == "json":
        echo_json(details)
        return
    echo_fields(detail_fields(details))


def detail_fields(details: DeviceDetails) -> list[tuple[str, str]]:
    """What `device show` prints: names and values."""
    version = f"ploop v{details.format_version}" if details.format_version else "raw"
    fields = [
        ("name", details.name),
        ("image", details.image),
        ("size", format_size_exact(details.size)),
        ("format", version),
        ("cluster size", format_size_exact(details.cluster_size)),
        ("allocated", format_size_exact(details.allocated)),
        ("read-only", "yes" if details.read_only else "no"),
        ("identity", details.identity),
        ("standby", details.standby),
        (
            "state",
            details.state if details.reason is None else f"{details.state}: {details.reason}",
        ),
        ("latched", details.latched or "no"),
        ("full", details.full or "no"),
        ("parked", f"{details.parked_requests} requests, {format_size(details.parked_bytes)}"),
        ("journal", "off" if details.journal is None else _journal(details.journal)),
        ("recovery", details.recovery),
        ("errnos", " ".join(details.standby_errnos)),
    ]
    fields += [("url", url) for url in details.urls]
    fields += [(f"layer {one.level}", f"{one.path} ({one.kind})") for one in details.layers]
    fields += [("note", note) for note in details.notes]
    return fields


def _journal(journal: JournalDetails) -> str:
    return (
        f"{journal.requests} requests, {format_size(journal.data)}; "
        f"{format_size(journal.used)} of {format_size(journal.limit)} used"
    )


@device.command()
@_DEVICE
@click.argument("action", type=click.Choice(["show", "enter", "leave", "wait"]))
@click.option("--state", type=click.Choice(["on", "off"]), help="What `wait` waits for.")
@TIMEOUT
@click.pass_obj
def standby(
    control: Path | None, device: str, action: str, state: str | None, timeout: float
) -> None:
    """Show or change the standby state of DEVICE.

    `show` prints the state string: `not supported`, `on` or `off`. `enter` parks all requests until
    `leave`, which goes on with the same storage, or `device replace`; nothing recovers the device
    by itself meanwhile. It returns when those in execution have ended, so that the image can be
    copied. `wait --state on|off` returns when the state is reached, or fails with exit code 7.
    """
    if (action == "wait") != (state is not None):
        raise UsageError(
            "--state goes with `wait`, and `wait` needs it",
            hint=f"ploopctl device standby {device} wait --state off",
        )
    # The daemon keeps the time of `wait`, and says what it waited for; ours is a little longer.
    with _client(control, timeout + 2.0 if action == "wait" else timeout) as client:
        reached = _standby_call(client, device, action, state, timeout)
    if action == "show":
        click.echo(reached.standby)
        return
    click.echo(f"{device}: standby is {reached.standby}", err=True)
    if action == "enter" and reached.executing:
        click.echo(
            f"{device}: {reached.executing} requests have not come back from the storage: a copy "
            "of the image that is made now may lack them",
            err=True,
        )


def _standby_call(
    client: ControlClient, device: str, action: str, state: str | None, timeout: float
) -> StandbyState:
    """The state after `action`."""
    from ploopd.control import messages

    if action == "wait":
        assert state is not None
        parameters = messages.StandbyWaitParameters(name=device, standby=state, timeout=timeout)
        return client.call(
            messages.STANDBY_WAIT,
            messages.StandbyState,
            parameters,
            waiting=f"standby of {device} to be {state}",
        )
    method = {
        "show": messages.STANDBY_SHOW,
        "enter": messages.STANDBY_ENTER,
        "leave": messages.STANDBY_LEAVE,
    }[action]
    return client.call(
        method,
        messages.StandbyState,
        messages.DeviceName(name=device),
        waiting=f"{device} to answer `standby {action}`",
    )
