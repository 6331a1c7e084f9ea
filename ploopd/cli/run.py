"""`ploopd run` and `ploopd check-config`: the files of /etc/ploopd in, and the daemon runs."""

from __future__ import annotations

from pathlib import Path

import click

CONFIG = click.option(
    "--config",
    type=click.Path(readable=False, path_type=Path),
    default=Path("/etc/ploopd/ploopd.toml"),
    show_default=True,
    metavar="FILE",
    help="The configuration; the files *.toml of the directory of the same name ending in .d are "
    "read after it.",
)


@click.command("run")
@CONFIG
def run_service(config: Path) -> None:
    """Serve the devices of the configuration files until SIGINT or SIGTERM; SIGHUP reads them
    again.

    The same daemon as `serve`, for a service manager: systemd is told when it is ready, and its
    watchdog is fed. If one of the devices cannot be served none is.
    """
    from ploopd.cli.running import print_exports, run_daemon
    from ploopd.config_file import RunConfig, check_config, load_config
    from ploopd.reload import ConfigSource

    def load() -> RunConfig:
        loaded = load_config(config)
        check_config(loaded)
        return loaded

    loaded = load()
    source = ConfigSource(load=load, log_level=loaded.log_level)
    run_daemon(loaded.serve, loaded.log_level, print_exports, source)


@click.command("check-config")
@CONFIG
def check(config: Path) -> None:
    """Check the configuration files without starting anything; the images are not looked at.

    Prints the files that were read and what would be served.
    """
    from ploopd.cli.render import echo_table
    from ploopd.config_file import check_config, load_config
    from ploopd.device_settings import device_luns, device_names

    loaded = load_config(config)
    check_config(loaded)
    for file in loaded.files:
        click.echo(f"read {file}", err=True)
    devices = loaded.serve.devices
    rows = [
        (lun, str(lun), name, "yes" if one.read_only else "no", one.recovery, one.image)
        for lun, name, one in zip(device_luns(devices), device_names(devices), devices, strict=True)
    ]
    table = [row for _, *row in sorted(rows)]
    echo_table(("LUN", "NAME", "READ-ONLY", "RECOVERY", "IMAGE"), table, right=frozenset({0}))
