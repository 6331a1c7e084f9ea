"""What a daemon is told to do: plain values, checked, whoever writes them.

The command line of `ploopd serve` builds a `ServeConfig`, and so do the files of `ploopd run`.
Secrets are read from files that only their owner can read, never from arguments.
"""

from __future__ import annotations

import math
import os
import re
import socket
import stat
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec

from ploopd.errors import DeniedError, ExitCode, NotFoundError, PloopError, UsageError, open_error
from ploopd.frontends.iscsi.config import (
    DEFAULT_PORT,
    ChapAccount,
    ChapConfig,
    IscsiConfig,
    Portal,
)
from ploopd.scsi.target import MAX_LUN

IQN_PREFIX = "iqn.2026-11.org.ploopd"
DEFAULT_PARK_MAX = 20.0
DEFAULT_JOURNAL_SIZE = 64 << 20
MIN_JOURNAL_SIZE = 1 << 20
LONGEST_DELAY = 3600.0
_MAX_CHAP_FILE = 1 << 16
_CHAP_MD5 = 5
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_PORTAL = re.compile(
    r"(?:\[(?P<v6>[0-9A-Za-z:.%]+)\]|(?P<host>[^:\[\]\s]+))(?::(?P<port>\d{1,5}))?"
)


class ConfigError(PloopError):
    """A configuration that cannot be used."""

    exit_code = ExitCode.CONFIG


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """How one image is served.

    `name`: None makes one from the file name.  `lun`: its number, None is the lowest that no other
    device has.  `physical_block_size`: bytes, what initiators are
    told.  `cache` and `io`: the policy of its files.  `park_max`: seconds, None is for ever.
    `extra_standby_errnos`: numbers that put it into standby beside those of its file system.
    `image_root`: where the deltas of a descriptor may lie, None is the descriptor's own directory.
    `journal`: whether writes that were acknowledged and not yet flushed are kept, `journal_size`
    bytes at most.  `recovery`: who ends a standby; `candidates` are the other files that `reopen`
    may use, `recovery_command` is what `command` runs (a program and its arguments), for
    `recovery_timeout` seconds at most.  Between two attempts are `recovery_delay` seconds, doubled
    each time up to `recovery_delay_max`.
    """

    image: str
    name: str | None = None
    lun: int | None = None
    read_only: bool = False
    write_cache: bool = True
    physical_block_size: Literal[512, 4096] = 4096
    standby: bool = True
    cache: Literal["writeback", "none"] = "writeback"
    io: Literal["auto", "inline", "io_uring", "threads"] = "auto"
    park_max: float | None = DEFAULT_PARK_MAX
    extra_standby_errnos: tuple[int, ...] = ()
    image_root: Path | None = None
    journal: Literal["auto", "on", "off"] = "auto"
    journal_size: int = DEFAULT_JOURNAL_SIZE
    recovery: Literal["manual", "reopen", "command"] = "manual"
    candidates: tuple[str, ...] = ()
    recovery_command: tuple[str, ...] | None = None
    recovery_delay: float = 1.0
    recovery_delay_max: float = 30.0
    recovery_timeout: float = 60.0

    def check(self) -> None:
        """Raises a `PloopError` for values that are wrong or make no sense together."""
        if self.name is not None and _NAME.fullmatch(self.name) is None:
            raise UsageError(
                "a device's name has letters, digits, dots, dashes and underscores, 64 at most",
                field="name",
                value=self.name,
            )
        if self.lun is not None and not 0 <= self.lun <= MAX_LUN:
            raise UsageError(f"is not between 0 and {MAX_LUN}", field="lun", value=self.lun)
        if self.park_max is not None and not 0 < self.park_max < math.inf:
            raise UsageError(
                "is not a positive number of seconds", field="park_max", value=self.park_max
            )
        if self.image_root is not None and not self.image_root.is_dir():
            raise NotFoundError("is not a directory", path=self.image_root, hint="see --image-root")
        if self.journal_size < MIN_JOURNAL_SIZE:
            raise UsageError(
                f"must be at least {MIN_JOURNAL_SIZE} bytes",
                field="journal_size",
                value=self.journal_size,
            )
        self._check_recovery()

    def _check_recovery(self) -> None:
        if (self.recovery == "command") != bool(self.recovery_command):
            raise UsageError(
                "recovery = command and a recovery command go together",
                field="recovery",
                value=self.recovery,
                hint="name the program that the device's hook is, or another way of recovery",
            )
        for key in ("recovery_delay", "recovery_delay_max", "recovery_timeout"):
            value = getattr(self, key)
            if not 0.05 <= value <= LONGEST_DELAY:
                raise UsageError(
                    f"must be between 0.05 and {LONGEST_DELAY:g} seconds", field=key, value=value
                )
        if self.recovery_delay > self.recovery_delay_max:
            raise UsageError(
                f"is longer than recovery_delay_max, {self.recovery_delay_max:g} s",
                field="recovery_delay",
                value=self.recovery_delay,
            )
        if self.candidates and self.recovery != "reopen":
            raise UsageError(
                "candidates are for recovery = reopen", field="recovery", value=self.recovery
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Everything that a daemon needs.

    `devices`: LUN 0 first.  `control`: path of the control socket, None is the default.  `sysfs`:
    where the FUSE view is mounted, None is nowhere.  `lio`: serve backstores of the kernel's target
    that are of the kind user:ploop; `backstores` says how images are served that they name by their
    path (its own `image` and `name` mean nothing).
    """

    devices: tuple[DeviceConfig, ...]
    iscsi: IscsiConfig
    control: Path | None = None
    sysfs: Path | None = None
    lio: bool = False
    backstores: DeviceConfig = field(default_factory=lambda: DeviceConfig(image=""))

    def check(self) -> None:
        """Raises a `PloopError` for values that are wrong or make no sense together."""
        if not self.devices and not self.lio:
            raise UsageError("no image is named")
        self.iscsi.check()
        for device in self.devices:
            device.check()
        for key in ("name", "lun"):
            values = [
                value for device in self.devices if (value := getattr(device, key)) is not None
            ]
            for value in values:
                if values.count(value) > 1:
                    raise UsageError(f"two devices have that {key}", field=key, value=value)
        engines = {device.io for device in self.devices} & {"io_uring", "threads"}
        if len(engines) > 1:
            raise UsageError(
                "the daemon has one I/O engine: io_uring and threads do not go together",
                field="io",
                value=sorted(engines),
                hint="leave io = auto where it does not matter",
            )

    @property
    def engine(self) -> str:
        """The I/O engine that the devices ask for: `io_uring`, `threads` or `auto`."""
        named = {device.io for device in self.devices} & {"io_uring", "threads"}
        return named.pop() if named else "auto"


def default_iqn() -> str:
    """`iqn.2026-11.org.ploopd:HOSTNAME`: stays the same as long as the host keeps its name."""
    host = re.sub(r"[^a-z0-9.-]+", "-", socket.gethostname().lower()).strip("-.")
    return f"{IQN_PREFIX}:{host or 'localhost'}"


def parse_portal(text: str) -> Portal:
    """The portal `HOST:PORT`, `HOST`, `[V6]:PORT` or `[V6]`.

    Raises `UsageError` when it is none of those.  The host is an address or a name.
    """
    match = _PORTAL.fullmatch(text)
    if match is None or int(match["port"] or 0) > 65535:
        raise UsageError(
            "is not HOST:PORT",
            field="portal",
            value=text,
            hint="write 127.0.0.1:3260 or [::1]:3260",
        )
    port = DEFAULT_PORT if match["port"] is None else int(match["port"])
    return Portal(host=match["v6"] or match["host"], port=port)


class _ChapFile(msgspec.Struct, forbid_unknown_fields=True):
    """The TOML of a CHAP file."""

    user: str
    secret: str
    initiator: str | None = None
    mutual_user: str | None = None
    mutual_secret: str | None = None
    allow_md5: bool = False


def read_chap_files(paths: Sequence[str | os.PathLike[str]]) -> ChapConfig | None:
    """The CHAP configuration of some files, one account in each; None without a file.

    A file is TOML with the keys `user` and `secret` (what an initiator proves), and if wanted
    `initiator` (the only initiator name that may use it), `mutual_user` and `mutual_secret` (what
    the target proves in turn) and `allow_md5`.

    Raises `DeniedError` when others than the owner can read a file and `ConfigError` for content
    that is no account.  No message ever has a secret in it.
    """
    accounts: dict[str, ChapAccount] = {}
    mutual: ChapAccount | None = None
    md5 = False
    for path in paths:
        fields = _read_chap_file(path)
        if fields.user in accounts:
            raise ConfigError(
                "another file has that user", path=path, field="user", value=fields.user
            )
        accounts[fields.user] = ChapAccount(
            user=fields.user, secret=fields.secret.encode(), initiator=fields.initiator
        )
        if fields.mutual_user is not None and fields.mutual_secret is not None:
            wanted = ChapAccount(user=fields.mutual_user, secret=fields.mutual_secret.encode())
            if mutual not in (None, wanted):
                raise ConfigError("another file has a different mutual account", path=path)
            mutual = wanted
        md5 = md5 or fields.allow_md5
    if not accounts:
        return None
    chap = ChapConfig(accounts=tuple(accounts.values()), mutual=mutual)
    if md5:
        chap = replace(chap, algorithms=(*chap.algorithms, _CHAP_MD5))
    chap.check()
    return chap


def credentials_directory() -> str | None:
    """Where the service manager has put this process's credentials (systemd.exec(5))."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY", "")
    return os.path.normpath(directory) if os.path.isabs(directory) else None


def _is_credential(path: str | os.PathLike[str]) -> bool:
    """Nobody else comes into that directory, whatever the modes of the files say: systemd lets the
    service read root's file by an ACL, which shows as the group's right."""
    directory = credentials_directory()
    return directory is not None and os.path.dirname(os.path.normpath(path)) == directory


def _read_chap_file(path: str | os.PathLike[str]) -> _ChapFile:
    content = _read_private(path)
    # Not chained: the parsers' messages may quote the line, and the secret in it.
    try:
        fields = msgspec.convert(tomllib.loads(content.decode()), _ChapFile)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        raise ConfigError("is not TOML", path=path, hint='write user = "NAME"') from None
    except msgspec.ValidationError as error:
        hint = 'write user = "NAME" and secret = "12 to 255 characters"'
        raise ConfigError(f"is not a CHAP account: {error}", path=path, hint=hint) from None
    if (fields.mutual_user is None) != (fields.mutual_secret is None):
        raise ConfigError("mutual_user and mutual_secret go together", path=path)
    for key in ("secret", "mutual_secret"):
        value: str | None = getattr(fields, key)
        if value is not None and not 12 <= len(value.encode()) <= 255:
            raise ConfigError(
                "a CHAP secret has 12 to 255 bytes (RFC 7143 12.1.3)",
                path=path,
                field=f"length of {key}",
                value=len(value.encode()),
            )
    return fields


def _read_private(path: str | os.PathLike[str]) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise open_error(error, path) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError("is not a regular file", path=path)
        if status.st_mode & 0o077 and not _is_credential(path):
            raise DeniedError(
                "holds a secret, and others can read or write it",
                path=path,
                field="mode",
                value=f"{stat.S_IMODE(status.st_mode):04o}",
                hint=f"chmod 600 {os.fspath(path)}",
            )
        content = os.read(descriptor, _MAX_CHAP_FILE + 1)
    finally:
        os.close(descriptor)
    if len(content) > _MAX_CHAP_FILE:
        raise ConfigError(f"is longer than {_MAX_CHAP_FILE} bytes", path=path)
    return content
