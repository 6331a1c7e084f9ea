"""The daemon as a whole: what it is, its configuration, and reading that again."""

from __future__ import annotations

from ploopd.control.messages.base import Message


class DaemonInfo(Message, frozen=True, kw_only=True):
    """The running daemon; `uptime` in seconds."""

    version: str
    pid: int
    uptime: float
    iqn: str
    portals: list[str]
    devices: int


class ConfigText(Message, frozen=True, kw_only=True):
    """The daemon's configuration as it is now, as a file for `ploopd run`."""

    toml: str


class ReloadAll(Message, frozen=True, kw_only=True):
    """Read the configuration files again.  `force`: devices in standby are removed, too, if the
    files do not name them any more; what waits for them fails."""

    force: bool = False


class ReloadRefusal(Message, frozen=True, kw_only=True):
    """Something that was not done for a device, and why."""

    device: str
    reason: str


class ReloadReply(Message, frozen=True, kw_only=True):
    """Names of devices that were added and removed, keys whose values hold now, what was not done,
    and keys whose values hold after the next start only (`daemon.sysfs`, `DEVICE.cache`)."""

    added: list[str]
    removed: list[str]
    changed: list[str]
    refused: list[ReloadRefusal]
    needs_restart: list[str]
