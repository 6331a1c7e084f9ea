"""The files of `ploopd run`: TOML in, a `ServeConfig` out; every mistake is named with its place.

`/etc/ploopd/ploopd.toml` and the files of `ploopd.d` beside it, in the order of their names.  Each
file is checked by itself, so that an error names the file that has it.  What a later file says in
`[daemon]`, `[iscsi]`, `[lio]` and `[defaults]` takes the place of what an earlier one said, key by
key; `[[device]]` entries are added.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from ploopd.config import (
    ConfigError,
    DeviceConfig,
    ServeConfig,
    credentials_directory,
    default_iqn,
    parse_portal,
    read_chap_files,
)
from ploopd.errors import HARMLESS_ERRNOS, PloopError, open_error
from ploopd.frontends.iscsi.config import IscsiConfig, Portal
from ploopd.units import parse_size

DEFAULT_PATH: Final = Path("/etc/ploopd/ploopd.toml")
_MAX_FILE: Final = 1 << 20
_SECTIONS: Final = ("daemon", "iscsi", "lio", "defaults", "device")
_CREDENTIAL: Final = "credential:"
_ERRNOS: Final = {name: number for number, name in errno.errorcode.items()}

LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What the files say: the daemon, how much is logged, and which files those were."""

    serve: ServeConfig
    log_level: LogLevel
    files: tuple[Path, ...]


class _Section(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Base of all tables: a key that is not there is UNSET."""


class _Daemon(_Section):
    control: str | UnsetType = UNSET
    sysfs: str | UnsetType = UNSET
    log_level: LogLevel | UnsetType = UNSET


class _Iscsi(_Section):
    portals: list[str] | UnsetType = UNSET
    iqn: str | UnsetType = UNSET
    acl: list[str] | UnsetType = UNSET
    chap_files: list[str] | UnsetType = UNSET
    insecure: bool | UnsetType = UNSET


class _Lio(_Section):
    serve: bool | UnsetType = UNSET


class _Defaults(_Section):
    """What may be said of all devices and of each."""

    read_only: bool | UnsetType = UNSET
    write_cache: bool | UnsetType = UNSET
    physical_block_size: Literal[512, 4096] | UnsetType = UNSET
    standby: bool | UnsetType = UNSET
    cache: Literal["writeback", "none"] | UnsetType = UNSET
    io: Literal["auto", "inline", "io_uring", "threads"] | UnsetType = UNSET
    park_max: float | Literal["forever"] | UnsetType = UNSET
    extra_standby_errnos: list[str] | UnsetType = UNSET
    image_root: str | UnsetType = UNSET
    journal: Literal["auto", "on", "off"] | UnsetType = UNSET
    journal_size: int | str | UnsetType = UNSET
    recovery: Literal["manual", "reopen", "command"] | UnsetType = UNSET
    recovery_command: list[str] | UnsetType = UNSET
    recovery_delay: float | UnsetType = UNSET
    recovery_delay_max: float | UnsetType = UNSET
    recovery_timeout: float | UnsetType = UNSET


class _Device(_Defaults, kw_only=True):
    image: str
    name: str | UnsetType = UNSET
    lun: int | UnsetType = UNSET
    candidates: list[str] | UnsetType = UNSET


SectionT = TypeVar("SectionT", bound=_Section)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Origin:
    """Where a value stands: the file, its text, and the table as an error calls it."""

    path: Path
    text: str
    table: str

    def error(
        self, message: str, key: str | None, value: object = None, *, hint: str | None = None
    ) -> ConfigError:
        """The error for one key of the table, with its line where that is certain."""
        if key is not None and (line := self._line(key)) is not None:
            message = f"line {line}: {message}"
        where = self.table if key is None else f"{self.table}.{key}"
        return ConfigError(message, path=self.path, field=where, value=value, hint=hint)

    def _line(self, key: str) -> int | None:
        """The line that sets `key`, if only one does."""
        setting = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*(=|$)")
        lines = [n for n, line in enumerate(self.text.splitlines(), 1) if setting.match(line)]
        return lines[0] if len(lines) == 1 else None


@dataclass(slots=True, kw_only=True)
class _Merged:
    """The tables of all files: for each key its value and where that came from."""

    daemon: dict[str, tuple[Any, _Origin]] = field(default_factory=dict)
    iscsi: dict[str, tuple[Any, _Origin]] = field(default_factory=dict)
    lio: dict[str, tuple[Any, _Origin]] = field(default_factory=dict)
    defaults: dict[str, tuple[Any, _Origin]] = field(default_factory=dict)
    devices: list[tuple[_Origin, dict[str, tuple[Any, _Origin]]]] = field(default_factory=list)


def load_config(path: str | os.PathLike[str] = DEFAULT_PATH) -> RunConfig:
    """Read `path` and the files `*.toml` of its directory of the same name that ends in `.d`.

    Raises `ConfigError`, which names file, key and value, and what `open` raises for a file that
    cannot be read.  Images are not looked at.
    """
    main = Path(os.path.abspath(path))
    files = (main, *_drop_ins(main))
    merged = _Merged()
    for file in files:
        _merge(merged, file)
    lio = "serve" in merged.lio and merged.lio["serve"][0]
    if not merged.devices and not lio:
        raise ConfigError(
            "names no device",
            path=main,
            hint='add [[device]] with image = "/path/to/image", or [lio] with serve = true',
        )
    return RunConfig(
        serve=ServeConfig(
            devices=_devices(merged),
            iscsi=_iscsi(merged.iscsi, main, listen=not lio),
            control=_path_of(merged.daemon, "control"),
            sysfs=_path_of(merged.daemon, "sysfs"),
            lio=lio,
            backstores=_backstores(merged),
        ),
        log_level=merged.daemon["log_level"][0] if "log_level" in merged.daemon else "info",
        files=files,
    )


def check_config(config: RunConfig) -> None:
    """Raise `ConfigError` for values that make no sense together."""
    try:
        config.serve.check()
    except PloopError as error:
        raise _located(error, config.files[0]) from error


def _drop_ins(main: Path) -> list[Path]:
    directory = main.with_suffix(".d")
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise open_error(error, directory) from error
    return [directory / n for n in names if n.endswith(".toml") and not n.startswith(".")]


# -- one file ----------------------------------------------------------------------------------


def _merge(merged: _Merged, path: Path) -> None:
    """Add what the file says."""
    text = _read(path)
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"is not TOML: {error}", path=path) from error
    for name in content:
        if name not in _SECTIONS:
            raise _Origin(path=path, text=text, table="").error(
                f"there is no such table or key: {name}",
                None,
                hint=_nearest(
                    name, _SECTIONS, "[daemon], [iscsi], [lio], [defaults] and [[device]]"
                ),
            )

    def origin(table: str) -> _Origin:
        return _Origin(path=path, text=text, table=table)

    for name, kind, into in (
        ("daemon", _Daemon, merged.daemon),
        ("iscsi", _Iscsi, merged.iscsi),
        ("lio", _Lio, merged.lio),
        ("defaults", _Defaults, merged.defaults),
    ):
        into.update(_values(content.get(name, {}), kind, origin(name)))
    devices = content.get("device", [])
    if not isinstance(devices, list):
        raise origin("device").error("is one table", None, hint="write [[device]]")
    for number, table in enumerate(devices, 1):
        place = origin(f"device {number}")
        merged.devices.append((place, dict(_values(table, _Device, place))))


def _read(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise open_error(error, path) from error
    if len(content) > _MAX_FILE:
        raise ConfigError(f"is longer than {_MAX_FILE} bytes", path=path)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8: {error}", path=path) from error


def _values(
    table: object, kind: type[_Section], origin: _Origin
) -> Iterator[tuple[str, tuple[Any, _Origin]]]:
    """The keys that a table sets, with their values."""
    if not isinstance(table, dict):
        raise origin.error("is no table", None, table, hint=f"write [{origin.table}]")
    names = [one.name for one in msgspec.structs.fields(kind)]
    for key in table:
        if key not in names:
            raise origin.error(
                f"there is no such key: {key}", key, table[key], hint=_nearest(key, names)
            )
    for one in msgspec.structs.fields(kind):
        if one.name not in table:
            if one.required:
                raise origin.error(f"has no {one.name}", None, hint=f'add {one.name} = "…"')
            continue
        try:
            value = msgspec.convert(table[one.name], one.type)
        except msgspec.ValidationError as error:
            message = str(error).replace("Expected", "expected").split(" - at ")[0]
            raise origin.error(message, one.name, table[one.name]) from error
        yield one.name, (_checked(one.name, value, origin), origin)


def _nearest(name: str, known: Sequence[str], otherwise: str | None = None) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are {otherwise or ', '.join(known)}"


# -- values ------------------------------------------------------------------------------------


def _checked(key: str, value: Any, origin: _Origin) -> Any:
    """A value as a `DeviceConfig` or `ServeConfig` has it."""
    if key in ("control", "sysfs", "image_root"):
        return Path(_absolute(key, value, origin))
    if key == "image":
        return _absolute(key, value, origin)
    if key == "candidates":
        return tuple(_absolute(key, one, origin) for one in value)
    if key == "chap_files":
        return tuple(_secret_file(key, one, origin) for one in value)
    if key == "recovery_command":
        if value:
            _absolute(key, value[0], origin)
        return tuple(value)
    if key == "extra_standby_errnos":
        return tuple(_errno(key, one, origin) for one in value)
    if key == "park_max":
        return None if value == "forever" else value
    if key == "journal_size" and isinstance(value, str):
        try:
            return parse_size(value)
        except PloopError as error:
            raise origin.error(error.message, key, value, hint=error.hint) from error
    if key == "portals":
        return tuple(_portal(key, one, origin) for one in value)
    return tuple(value) if isinstance(value, list) else value


def _absolute(key: str, value: str, origin: _Origin) -> str:
    if not os.path.isabs(value):
        raise origin.error("is not an absolute path", key, value, hint="begin it with /")
    return os.path.normpath(value)


def _secret_file(key: str, value: str, origin: _Origin) -> str:
    """A path, or `credential:NAME`: what the service manager has been told to load."""
    if not value.startswith(_CREDENTIAL):
        return _absolute(key, value, origin)
    name = value.removeprefix(_CREDENTIAL)
    if not name or "/" in name or name.startswith("."):
        raise origin.error("is not the name of a credential", key, value)
    directory = credentials_directory()
    if directory is None:
        hint = f"give the unit LoadCredential={name}:/path/to/file, or set CREDENTIALS_DIRECTORY"
        raise origin.error("the service manager gave no credentials", key, value, hint=hint)
    return os.path.join(directory, name)


def _errno(key: str, name: str, origin: _Origin) -> int:
    if name not in _ERRNOS:
        hint = _nearest(name, list(_ERRNOS), "names like ESTALE and EBADFD")
        raise origin.error("is not the name of an errno", key, name, hint=hint)
    if _ERRNOS[name] in HARMLESS_ERRNOS:
        hint = "it says nothing about the storage's health, and initiators are told what it means"
        raise origin.error("cannot put a device into standby", key, name, hint=hint)
    return _ERRNOS[name]


def _portal(key: str, text: str, origin: _Origin) -> Portal:
    try:
        return parse_portal(text)
    except PloopError as error:
        raise origin.error(error.message, key, text, hint=error.hint) from error


# -- all files ---------------------------------------------------------------------------------


def _devices(merged: _Merged) -> tuple[DeviceConfig, ...]:
    devices = []
    taken: dict[tuple[str, str | int], _Origin] = {}
    for origin, own in merged.devices:
        keys = {**merged.defaults, **own}
        if "recovery" in own and own["recovery"][0] != "command" and "recovery_command" not in own:
            keys.pop("recovery_command", None)  # the default's, which is for the others
        device = DeviceConfig(**{key: value for key, (value, _) in keys.items()})
        try:
            device.check()
        except PloopError as error:
            raise _device_error(error, keys, origin) from error
        for key, value in (("name", device.name), ("lun", device.lun)):
            if value is None:
                continue
            first = taken.setdefault((key, value), origin)
            if first is not origin:
                raise origin.error(f"{first.path}: {first.table} has that {key}", key, value)
        devices.append(device)
    return tuple(devices)


def _backstores(merged: _Merged) -> DeviceConfig:
    """What the defaults say of images that the kernel's target names."""
    values = {key: value for key, (value, _) in merged.defaults.items()}
    values.pop("recovery_command", None)  # they are recovered by hand
    values.pop("recovery", None)
    config = DeviceConfig(image="", **values)
    try:
        config.check()
    except PloopError as error:
        origin = next(iter(merged.defaults.values()))[1]
        raise _device_error(error, merged.defaults, origin) from error
    return config


def _device_error(
    error: PloopError, keys: Mapping[str, tuple[Any, _Origin]], origin: _Origin
) -> ConfigError:
    """The error of a whole device at the place of the value that it speaks of."""
    key = error.field if error.field in msgspec.structs.asdict(_Device(image="")) else None
    place = origin if key is None or key not in keys else keys[key][1]
    message = error.message if error.path is None else f"{error.path}: {error.message}"
    return place.error(message, key, error.value, hint=error.hint)


def _iscsi(values: Mapping[str, tuple[Any, _Origin]], main: Path, *, listen: bool) -> IscsiConfig:
    """The embedded target.  Unless it is told where, it listens only if `listen`: where the
    kernel's target is in use, that has the port."""

    def get(key: str, otherwise: Any) -> Any:
        return values[key][0] if key in values else otherwise

    iscsi = IscsiConfig(
        portals=get("portals", (Portal(),) if listen else ()),
        iqn=get("iqn", default_iqn()),
        chap=read_chap_files(get("chap_files", ())),
        acl=get("acl", None),
        insecure=get("insecure", False),
    )
    if listen and not iscsi.portals:
        raise values["portals"][1].error("names no portal", "portals", [])
    try:
        iscsi.check()
    except PloopError as error:
        key = "portals" if error.field == "portal" else error.field
        hint = error.hint and error.hint.replace("say --insecure", "insecure = true")
        if key is not None and key in values:
            raise values[key][1].error(error.message, key, error.value, hint=hint) from error
        raise _located(error, main) from error
    return iscsi


def _path_of(values: Mapping[str, tuple[Any, _Origin]], key: str) -> Path | None:
    return values[key][0] if key in values else None


def _located(error: PloopError, path: Path) -> ConfigError:
    message = error.message if error.path is None else f"{error.path}: {error.message}"
    return ConfigError(message, path=path, field=error.field, value=error.value, hint=error.hint)
