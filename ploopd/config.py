"""What a daemon is told to do: plain values, checked, whoever writes them.

The command line builds a `ServeConfig` today; a file of the same fields can build it as well.
Secrets are read from files that only their owner can read, never from arguments.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from ploopd.errors import DeniedError, ExitCode, PloopError, UsageError, open_error

DEFAULT_PORT = 3260
DEFAULT_PORTAL = f"127.0.0.1:{DEFAULT_PORT}"
IQN_PREFIX = "iqn.2026-11.org.ploopd"
DEFAULT_PARK_MAX = 20.0
_MAX_CHAP_FILE = 1 << 16
_MAX_NAME = 223  # RFC 7143 4.2.7.1

# RFC 3721 1.1, RFC 3722: after normalisation only these characters are left.
_IQN = re.compile(r"iqn\.\d{4}-(?:0[1-9]|1[0-2])\.[a-z0-9.-]+(?::[a-z0-9.:-]+)?")
_EUI = re.compile(r"eui\.[0-9A-Fa-f]{16}")
_NAA = re.compile(r"naa\.(?:[0-9A-Fa-f]{16}|[0-9A-Fa-f]{32})")


class ConfigError(PloopError):
    """A configuration that cannot be used."""

    exit_code = ExitCode.CONFIG


@dataclass(frozen=True, slots=True, kw_only=True)
class ChapAccount:
    """One account of a CHAP file.

    `user` and `secret` are what an initiator must prove; with `mutual_user` and `mutual_secret` the
    target proves itself to the initiator in turn.  The secrets are not part of the repr.
    """

    user: str
    secret: bytes
    mutual_user: str | None = None
    mutual_secret: bytes | None = None

    def __repr__(self) -> str:
        return f"ChapAccount(user={self.user!r}, mutual_user={self.mutual_user!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Everything that `ploopd serve` needs.

    `images`: paths, LUN 0 first.  `port` 0 picks a free one.  `control` None is the default path.
    `park_max`: seconds, None is for ever.  `acl` None lets every initiator in; an empty tuple none.
    """

    images: tuple[str, ...]
    iqn: str
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    read_only: bool = False
    control: Path | None = None
    write_cache: bool = True
    standby: bool = True
    cache: Literal["writeback", "none"] = "writeback"
    io: Literal["auto", "inline", "io_uring", "threads"] = "auto"
    park_max: float | None = DEFAULT_PARK_MAX
    image_root: Path | None = None
    chap: tuple[ChapAccount, ...] = ()
    acl: tuple[str, ...] | None = None
    insecure: bool = False

    def check(self) -> None:
        """Raises `ConfigError` or `UsageError` for values that contradict each other."""
        check_iscsi_name(self.iqn, "iqn")
        for name in self.acl or ():
            check_iscsi_name(name, "acl")
        if not self.images:
            raise UsageError("no image is named")
        users = [account.user for account in self.chap]
        if len(users) != len(set(users)):
            raise ConfigError("two CHAP files have the same user", field="user", value=users[0])
        if not (self.insecure or self.chap or self.acl is not None or is_loopback(self.host)):
            raise ConfigError(
                "anybody in the network could write to the images",
                field="portal",
                value=portal_text(self.host, self.port),
                hint="give it --chap-file FILE or --acl IQN, or accept that with --insecure",
            )


def check_iscsi_name(name: str, field: str) -> None:
    """Raises `ConfigError` unless `name` is an iSCSI name in normal form (RFC 7143 4.2.7)."""
    fits = any(form.fullmatch(name) for form in (_IQN, _EUI, _NAA))
    if not fits or len(name) > _MAX_NAME:
        raise ConfigError(
            "is not an iSCSI name in lower case",
            field=field,
            value=name,
            hint="write iqn.YYYY-MM.DOMAIN:NAME, for instance iqn.2026-11.com.example:disks",
        )


def default_iqn() -> str:
    """`iqn.2026-11.org.ploopd:HOSTNAME`: stays the same as long as the host keeps its name."""
    host = re.sub(r"[^a-z0-9.-]+", "-", socket.gethostname().lower()).strip("-.")
    return f"{IQN_PREFIX}:{host or 'localhost'}"


def parse_portal(text: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, `HOST`, `[V6]:PORT` or `[V6]`.

    Raises `UsageError` when it is none of those.  The host is an address or a name.
    """
    match = re.fullmatch(
        r"(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^:\[\]\s]+))(?::(?P<port>\d{1,5}))?", text
    )
    if match is None or int(match["port"] or 0) > 65535:
        raise UsageError(
            "is not HOST:PORT",
            field="portal",
            value=text,
            hint="write 127.0.0.1:3260 or [::1]:3260",
        )
    port = DEFAULT_PORT if match["port"] is None else int(match["port"])
    return match["v6"] or match["host"], port


def portal_text(host: str, port: int) -> str:
    """`HOST:PORT`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Can only this machine reach `host`?  A name other than `localhost` is not trusted to."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


class _ChapFile(msgspec.Struct, forbid_unknown_fields=True):
    """The TOML of a CHAP file."""

    user: str
    secret: str
    mutual_user: str | None = None
    mutual_secret: str | None = None


def read_chap_file(path: str | os.PathLike[str]) -> ChapAccount:
    """The account in a TOML file with the keys `user`, `secret`, `mutual_user`, `mutual_secret`.

    Raises `DeniedError` when others than the owner can read the file, `ConfigError` when its
    content is not an account.  No message ever has a secret in it.
    """
    content = _read_private(path)
    try:
        fields = msgspec.convert(tomllib.loads(content.decode()), _ChapFile)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"is not TOML: {error}", path=path) from None
    except (msgspec.ValidationError, UnicodeDecodeError) as error:
        hint = 'write user = "NAME" and secret = "12 to 255 characters"'
        raise ConfigError(f"is not a CHAP account: {error}", path=path, hint=hint) from None
    if (fields.mutual_user is None) != (fields.mutual_secret is None):
        raise ConfigError("mutual_user and mutual_secret go together", path=path)
    if fields.secret == fields.mutual_secret:
        # RFC 7143 12.1.3: one secret for both directions can be reflected.
        raise ConfigError("secret and mutual_secret must be different", path=path)
    for field in ("secret", "mutual_secret"):
        value = getattr(fields, field)
        if value is not None and not 12 <= len(value.encode()) <= 255:
            raise ConfigError(
                "a CHAP secret has 12 to 255 bytes (RFC 7143 12.1.3)",
                path=path,
                field=f"length of {field}",
                value=len(value.encode()),
            )
    return ChapAccount(
        user=fields.user,
        secret=fields.secret.encode(),
        mutual_user=fields.mutual_user,
        mutual_secret=None if fields.mutual_secret is None else fields.mutual_secret.encode(),
    )


def _read_private(path: str | os.PathLike[str]) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise open_error(error, path) from error
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError("is not a regular file", path=path)
        if status.st_mode & 0o077:
            raise DeniedError(
                "holds a secret and can be read or written by others",
                path=path,
                field="mode",
                value=f"{stat.S_IMODE(status.st_mode):04o}",
                hint=f"chmod 600 {os.fspath(path)}",
            )
        content = file.read(_MAX_CHAP_FILE + 1)
    if len(content) > _MAX_CHAP_FILE:
        raise ConfigError(f"is longer than {_MAX_CHAP_FILE} bytes", path=path)
    return content
