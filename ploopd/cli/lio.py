"""`ploopctl lio …`: devices as LUNs of the kernel's own iSCSI target."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ploopd.cli.completion import complete_device
from ploopd.cli.errors import one_line
from ploopd.cli.options import TIMEOUT
from ploopd.cli.render import OUTPUT, echo_json, echo_table
from ploopd.units import format_size

if TYPE_CHECKING:
    from ploopd.control.client import ControlClient
    from ploopd.control.messages import LioExport, LioReply

LOOPBACK = "127.0.0.1:3260"

PATIENCE = 60.0
"""Seconds at least: the kernel's target has the daemon wait for 30."""

_DEVICE = click.argument("device", shell_complete=complete_device)


@click.group()
def lio() -> None:
    """Devices as LUNs of the kernel's own iSCSI target (LIO)."""


def _client(control: Path | None, timeout: float) -> ControlClient:
    from ploopd.control.client import ControlClient

    return ControlClient(control, timeout=max(timeout, PATIENCE))


@lio.command()
@_DEVICE
@click.option("--iqn", required=True, help="The target; it is made if it does not exist.")
@click.option(
    "--portal",
    "portals",
    multiple=True,
    metavar="HOST:PORT",
    help="Where the target listens; without any: 127.0.0.1:3260. May be repeated.",
)
@click.option("--lun", type=click.IntRange(0, 65535), help="Default: the first free one.")
@click.option(
    "--acl", multiple=True, metavar="IQN", help="Only these initiators may log in. May be repeated."
)
@click.option(
    "--chap-file",
    type=click.Path(readable=False),
    metavar="FILE",
    help="TOML file, mode 0600, with user, secret and, if wanted, mutual_user, mutual_secret.",
)
@click.option(
    "--insecure", is_flag=True, help="Listen on a network address with neither ACL nor CHAP."
)
@OUTPUT
@TIMEOUT
@click.pass_obj
def export(
    control: Path | None,
    device: str,
    iqn: str,
    portals: tuple[str, ...],
    lun: int | None,
    acl: tuple[str, ...],
    chap_file: str | None,
    insecure: bool,
    output: str,
    timeout: float,
) -> None:
    """Export DEVICE as a LUN of the kernel's target.

    Backstore, target, portal, ACL and LUN are made as far as they do not exist. Nothing stays
    behind when a step fails. What was made is remembered, so that `unexport` takes away no more
    than that, and `restore` can make it again.
    """
    from ploopd.control import messages

    parameters = messages.LioExportParameters(
        name=device,
        iqn=iqn,
        portals=list(portals) or [LOOPBACK],
        acl=list(acl),
        chap_file=None if chap_file is None else os.path.abspath(chap_file),
        lun=lun,
        insecure=insecure,
    )
    with _client(control, timeout) as client:
        reply = client.call(
            messages.LIO_EXPORT, messages.LioReply, parameters, waiting=f"the export of {device}"
        )
    if output == "json":
        echo_json(reply.exports)
        return
    for each in reply.exports:
        for url in _urls(each):
            click.echo(url)


def _urls(export: LioExport) -> list[str]:
    return [f"iscsi://{portal}/{export.iqn}/{export.lun}" for portal in export.portals]


@lio.command()
@_DEVICE
@click.option("--iqn", help="Only from this target; default: from all.")
@TIMEOUT
@click.pass_obj
def unexport(control: Path | None, device: str, iqn: str | None, timeout: float) -> None:
    """Take the LUNs of DEVICE away, and what was made for them and nobody else uses."""
    from ploopd.control import messages

    parameters = messages.LioUnexportParameters(name=device, iqn=iqn)
    with _client(control, timeout) as client:
        reply = client.call(
            messages.LIO_UNEXPORT,
            messages.LioReply,
            parameters,
            waiting=f"{device} to be taken away",
        )
    for each in reply.exports:
        click.echo(f"{each.device}: is not exported as {each.iqn}/{each.lun} any more", err=True)


@lio.command("list")
@OUTPUT
@TIMEOUT
@click.pass_obj
def list_exports(control: Path | None, output: str, timeout: float) -> None:
    """List the kernel's backstores of the kind user:ploop and their LUNs, whoever made them, and
    why one is not served."""
    from ploopd.control import messages

    with _client(control, timeout) as client:
        reply = client.call(messages.LIO_LIST, messages.LioReply, waiting="the kernel's target")
    if output == "json":
        echo_json(reply)
    else:
        echo_backstores(reply)


def echo_backstores(reply: LioReply) -> None:
    """The table of the backstores and their LUNs."""
    ours = {(each.device, f"{each.iqn}/{each.lun}"): each for each in reply.exports}
    rows = []
    for backstore in reply.backstores:
        for lun in backstore.luns or ["-"]:
            export = ours.pop((backstore.name, lun), None)
            where = "-" if export is None else " ".join(export.portals)
            size, device = format_size(backstore.size), backstore.device or "-"
            problem = one_line(backstore.error or "-")
            rows.append((backstore.name, size, device, lun, where, problem))
    rows += [
        (name, "-", "-", lun, " ".join(export.portals), "is missing: ploopctl lio restore")
        for (name, lun), export in ours.items()
    ]
    header = ("BACKSTORE", "SIZE", "DEVICE", "LUN", "PORTALS", "PROBLEM")
    echo_table(header, rows, right=frozenset({1}))


@lio.command()
@TIMEOUT
@click.pass_obj
def restore(control: Path | None, timeout: float) -> None:
    """Make again what was exported and is not there: after the machine has started."""
    from ploopd.control import messages
    from ploopd.errors import PloopError

    with _client(control, timeout) as client:
        reply = client.call(
            messages.LIO_RESTORE, messages.LioReply, waiting="the exports to be restored"
        )
    failed = 0
    for each in reply.exports:
        failed += each.error is not None
        click.echo(f"{each.device}: {each.iqn}/{each.lun}: {each.error or 'exported'}", err=True)
    if failed:
        raise PloopError(f"{failed} of {len(reply.exports)} exports could not be restored")
