"""`ploopd serve`: options in, a `ServeConfig` out, and the daemon runs."""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ploopd.cli.hints import usage_hints
from ploopd.cli.options import ON_OFF, parse_size_option, seconds_or_forever

if TYPE_CHECKING:
    from ploopd.config import ServeConfig
    from ploopd.daemon import Export
    from ploopd.frontends.iscsi.config import Portal


@click.command()
@click.argument(
    "images", nargs=-1, required=True, metavar="IMAGE...", type=click.Path(readable=False)
)
@click.option(
    "--portal",
    metavar="HOST:PORT",
    help="Where to listen; port 0 picks a free one. Default: 127.0.0.1:3260, and with --lio on "
    "nowhere.",
)
@click.option(
    "--iqn", help="Name of the target; default: iqn.2026-11.org.ploopd:HOSTNAME of this host."
)
@click.option("--read-only", is_flag=True, help="Never write to the images.")
@click.option(
    "--control",
    type=click.Path(readable=False, path_type=Path),
    envvar="PLOOPD_CONTROL",
    help="Path of the control socket for ploopctl; its default is ploopctl's.",
)
@click.option(
    "--write-cache",
    type=ON_OFF,
    default="on",
    show_default=True,
    help="off: every write is on stable storage before it is acknowledged.",
)
@click.option(
    "--physical-block-size",
    type=click.Choice(["512", "4096"]),
    default="4096",
    show_default=True,
    help="What initiators are told, for alignment; logical blocks are always of 512 bytes.",
)
@click.option(
    "--standby",
    type=ON_OFF,
    default="on",
    show_default=True,
    help="on: EBUSY, ENOTCONN and EIO of the storage park the requests instead of failing them.",
)
@click.option(
    "--cache",
    type=click.Choice(["writeback", "none"]),
    default="writeback",
    show_default=True,
    help="none: past the host's page cache (O_DIRECT).",
)
@click.option(
    "--io",
    type=click.Choice(["auto", "inline", "io_uring", "threads"]),
    default="auto",
    show_default=True,
    help="How files are read and written; auto chooses by file system and kernel.",
)
@click.option(
    "--park-max",
    default="20",
    show_default=True,
    metavar="SECONDS|forever",
    callback=seconds_or_forever,
    help="A request parked for longer is answered BUSY, for the initiator to repeat.",
)
@click.option(
    "--journal",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Keep acknowledged writes in memory until they are flushed, for `device replace`; auto: "
    "for images on network file systems and FUSE.",
)
@click.option(
    "--journal-size",
    callback=parse_size_option,
    default="64M",
    show_default=True,
    metavar="SIZE",
    help="Memory that the journal of a disk may use; a flush is forced before it is full.",
)
@click.option(
    "--image-root",
    type=click.Path(readable=False, path_type=Path),
    metavar="DIR",
    help="Deltas named by a descriptor may lie anywhere below DIR; default: the descriptor's own "
    "directory.",
)
@click.option(
    "--lio",
    type=ON_OFF,
    default="off",
    show_default=True,
    help="on: be the handler of the kernel target's backstores of the kind user:ploop, too.",
)
@click.option(
    "--sysfs",
    type=click.Path(readable=False, path_type=Path),
    metavar="DIR",
    help="Mount a view of the disks on the empty directory DIR: block/DISK/queue/standby and more, "
    "as sysfs has it, and disk/DISK, the content as one file.",
)
@click.option(
    "--chap-file",
    "chap_files",
    multiple=True,
    type=click.Path(readable=False),
    envvar="PLOOPD_CHAP_FILE",
    metavar="FILE",
    help="TOML file, mode 0600, with user, secret and, if wanted, initiator, mutual_user, "
    "mutual_secret and allow_md5. May be repeated.",
)
@click.option(
    "--acl", multiple=True, metavar="IQN", help="Only these initiators may log in. May be repeated."
)
@click.option(
    "--insecure",
    is_flag=True,
    help="Listen on a network address although there is neither CHAP nor an ACL.",
)
@click.option(
    "--recovery",
    type=click.Choice(["manual", "reopen", "command"]),
    default="manual",
    show_default=True,
    help="Who ends a standby after a storage error: an operator, ploopd by opening the image "
    "again, or a program.",
)
@click.option(
    "--candidate",
    "candidates",
    multiple=True,
    type=click.Path(readable=False),
    metavar="FILE",
    help="A replica of the image, for --recovery reopen. May be repeated.",
)
@click.option(
    "--recovery-command",
    metavar="COMMAND",
    help="The program and its arguments for --recovery command; there is no shell.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="How much goes to stderr.",
)
@click.option(
    "--hints", is_flag=True, help="When ready, say on stderr what to type to use the disks."
)
def serve(
    images: tuple[str, ...],
    portal: str | None,
    iqn: str | None,
    read_only: bool,
    control: Path | None,
    write_cache: str,
    physical_block_size: str,
    standby: str,
    cache: str,
    io: str,
    park_max: float | None,
    journal: str,
    journal_size: int,
    image_root: Path | None,
    lio: str,
    sysfs: Path | None,
    chap_files: tuple[str, ...],
    acl: tuple[str, ...],
    insecure: bool,
    recovery: str,
    candidates: tuple[str, ...],
    recovery_command: str | None,
    log_level: str,
    hints: bool,
) -> None:
    """Serve each IMAGE as one LUN of an iSCSI target until SIGINT or SIGTERM.

    IMAGE is a ploop delta, a raw file, a DiskDescriptor.xml or the directory that holds one. When
    all are ready one line for each is printed on stdout: iscsi://HOST:PORT/IQN/LUN, the image and
    its size. If one of them cannot be served none is.
    """
    from ploopd.config import DeviceConfig, ServeConfig, default_iqn, read_chap_files
    from ploopd.frontends.iscsi.config import IscsiConfig

    if candidates and len(images) > 1:
        raise click.BadParameter("goes with one IMAGE", param_hint="--candidate")
    iscsi = IscsiConfig(
        portals=_portals(portal, lio=lio == "on"),
        iqn=iqn or default_iqn(),
        chap=read_chap_files(chap_files),
        acl=acl or None,
        insecure=insecure,
    )
    device = DeviceConfig(
        image="",
        read_only=read_only,
        write_cache=write_cache == "on",
        physical_block_size=512 if physical_block_size == "512" else 4096,
        standby=standby == "on",
        cache="none" if cache == "none" else "writeback",
        io=io,  # type: ignore[arg-type]  # click has checked it
        park_max=park_max,
        journal=journal,  # type: ignore[arg-type]  # click has checked it
        journal_size=journal_size,
        image_root=image_root,
        recovery=recovery,  # type: ignore[arg-type]  # click has checked it
        candidates=tuple(os.path.abspath(candidate) for candidate in candidates),
        recovery_command=_command(recovery_command),
    )
    config = ServeConfig(
        devices=tuple(replace(device, image=os.path.abspath(image)) for image in images),
        iscsi=iscsi,
        control=control,
        lio=lio == "on",
        backstores=device,
        sysfs=None if sysfs is None else Path(os.path.abspath(sysfs)),
    )
    config.check()
    _run(config, log_level, hints=hints)


def _portals(text: str | None, *, lio: bool) -> tuple[Portal, ...]:
    """Where the kernel's target is in use, that has the port."""
    from ploopd.config import parse_portal
    from ploopd.frontends.iscsi.config import Portal as At

    if text is None:
        return () if lio else (At(),)
    return (parse_portal(text),)


def _command(text: str | None) -> tuple[str, ...] | None:
    """The words of a command; its program is made an absolute path."""
    if text is None:
        return None
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: {error}", param_hint="--recovery-command") from error
    if not words:
        raise click.BadParameter("names no program", param_hint="--recovery-command")
    program = shutil.which(words[0])
    if program is None:
        raise click.BadParameter(
            f"{words[0]!r} is not a program that can be run", param_hint="--recovery-command"
        )
    return (os.path.abspath(program), *words[1:])


def _run(config: ServeConfig, log_level: str, *, hints: bool) -> None:
    """Run the daemon until it is stopped."""
    from ploopd.cli.running import print_exports, run_daemon

    def announce(exports: list[Export], control_path: Path) -> None:
        print_exports(exports, control_path)
        if hints:
            click.echo(usage_hints(exports[0], control_path), err=True)

    run_daemon(config, log_level, announce)
