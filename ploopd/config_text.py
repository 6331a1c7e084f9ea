"""A `ServeConfig` as the text of a configuration file, for `ploopd run` to read again."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from ploopd.config import DeviceConfig, ServeConfig
from ploopd.frontends.iscsi.config import format_address


def config_text(config: ServeConfig, devices: Sequence[tuple[str, str]], *, listens: bool) -> str:
    """TOML of what is served now.

    `devices`: name and image of each, which a replace may have changed.  What has its default value
    is left out.  CHAP secrets are known, their files are not: a comment says so.
    """
    lines = ["[daemon]"]
    if config.control is not None:
        lines.append(f"control = {_value(config.control)}")
    if config.sysfs is not None:
        lines.append(f"sysfs = {_value(config.sysfs)}")
    lines += ["", "[iscsi]", *_iscsi(config, listens=listens)]
    if config.lio:
        lines += ["", "[lio]", "serve = true"]
    for number, (name, image) in enumerate(devices):
        lines += ["", "[[device]]", f"name = {_value(name)}", f"image = {_value(image)}"]
        if number < len(config.devices):
            lines += _device(config.devices[number])
    return "\n".join(lines) + "\n"


def _iscsi(config: ServeConfig, *, listens: bool) -> list[str]:
    iscsi = config.iscsi
    lines = [f"iqn = {_value(iscsi.iqn)}"]
    if listens:
        portals = [format_address(portal.host, portal.port) for portal in iscsi.portals]
        lines.append(f"portals = {_value(portals)}")
    if iscsi.acl is not None:
        lines.append(f"acl = {_value(list(iscsi.acl))}")
    if iscsi.insecure:
        lines.append("insecure = true")
    if iscsi.chap is not None:
        lines.append("# chap_files = [...]: name the files with the accounts here")
    return lines


def _device(config: DeviceConfig) -> list[str]:
    lines = []
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in ("image", "name") or value == _default(field.default):
            continue
        if field.name == "extra_standby_errnos":
            value = [errno.errorcode[number] for number in value]
        elif field.name == "park_max" and value is None:
            value = "forever"
        lines.append(f"{field.name} = {_value(value)}")
    return lines


def _default(value: object) -> object:
    return None if value is MISSING else value


def _value(value: object) -> str:
    """A TOML value."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str() | Path():
            return _quoted(str(value))
        case Mapping():
            raise TypeError("tables are not values here")
        case Sequence():
            return f"[{', '.join(_value(each) for each in value)}]"
        case _:
            raise TypeError(f"no TOML for {value!r}")


def _quoted(text: str) -> str:
    escaped = "".join(
        f"\\{each}" if each in '"\\' else each if each.isprintable() else f"\\u{ord(each):04x}"
        for each in text
    )
    return f'"{escaped}"'
