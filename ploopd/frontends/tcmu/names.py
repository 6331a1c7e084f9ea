"""Names of TCMU devices: what the kernel calls them, and what a configuration string means.

The kernel's name of a device is `tcm-user/HBA/BACKSTORE/SUBTYPE/CONFIG`.  Our subtype is `ploop`,
and CONFIG is the name of one of the daemon's devices or the absolute path of an image.  configfs
takes at most 255 bytes, ends a value at a comma or newline, and rtslib refuses colons and cuts at
spaces; a path that has such characters is written with %XX.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from ploopd.errors import UsageError

SUBTYPE: Final = "ploop"
MAX_CONFIG: Final = 255
_SAFE: Final = "/._-+=@~"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HINT: Final = "write a device's name or the absolute path of an image, with %XX for odd characters"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelName:
    """A device as the kernel names it: `hba` is the N of core/user_N, `config` what follows the
    subtype, still escaped."""

    hba: str
    backstore: str
    subtype: str
    config: str

    @property
    def configfs(self) -> str:
        """Its directory below configfs' target/core."""
        return f"user_{self.hba}/{self.backstore}"


def parse_kernel_name(name: str) -> KernelName | None:
    """The parts of a uio device's name; None if it is not a TCMU device's."""
    parts = name.split("/", 4)
    if len(parts) < 4 or parts[0] != "tcm-user":
        return None
    config = parts[4] if len(parts) == 5 else ""
    return KernelName(hba=parts[1], backstore=parts[2], subtype=parts[3], config=config)


@dataclass(frozen=True, slots=True)
class Reference:
    """What a configuration string names: a device of the daemon, or an image by its path."""

    device: str | None = None
    image: str | None = None

    def __str__(self) -> str:
        return self.device or self.image or ""


def parse_config(config: str) -> Reference:
    """What CONFIG names.  Raises `UsageError` saying what is wrong with it and what to write."""

    def refused(message: str) -> UsageError:
        return UsageError(message, field="cfgstring", value=config[:300], hint=_HINT)

    if not config:
        raise refused("names nothing")
    length = len(config.encode(errors="surrogateescape")) + len(SUBTYPE) + 1
    if length > MAX_CONFIG:
        raise refused(f"is longer than {MAX_CONFIG} bytes: use a device's name")
    bad = re.search(r"[\s,:;=\0\x01-\x1f\x7f]", config)
    if bad is not None:
        raise refused(f"has the character {bad[0]!r}, which configfs does not keep")
    if re.search(r"%(?![0-9A-Fa-f]{2})", config):
        raise refused("has a % without two hexadecimal digits")
    if not config.startswith("/"):
        if _NAME.fullmatch(config) is None:
            raise refused("is neither a device's name nor an absolute path")
        return Reference(device=config)
    path = os.fsdecode(unquote_to_bytes(config.encode(errors="surrogateescape")))
    if "\0" in path:
        raise refused("has a null byte")
    if ".." in path.split("/"):
        raise refused("has `..` in its path")
    return Reference(image=os.path.normpath(path))


def format_config(reference: Reference) -> str:
    """The configuration string for `reference`.  Raises `UsageError` when it would be too long."""
    if reference.device is not None:
        config = reference.device
    else:
        config = quote(os.fsencode(reference.image or ""), safe=_SAFE.replace("=", ""))
    parse_config(config)
    return config
