"""Exports through the kernel's target."""

from __future__ import annotations

import msgspec

from ploopd.control.messages.base import Message


class LioExportParameters(Message, frozen=True, kw_only=True):
    """Export device `name` as a LUN of the kernel target's `iqn`.

    `portals`: `HOST:PORT`.  `acl`: initiator names, empty for all.  `chap_file`: a file with the
    account, read by the daemon.  `lun` None takes the first free one.  `insecure` allows a network
    address with neither ACL nor CHAP.
    """

    name: str
    iqn: str
    portals: list[str]
    acl: list[str] = msgspec.field(default_factory=list)
    chap_file: str | None = None
    lun: int | None = None
    insecure: bool = False


class LioUnexportParameters(Message, frozen=True, kw_only=True):
    """Take the LUNs of device `name` away: that of `iqn`, or all."""

    name: str
    iqn: str | None = None


class LioExport(Message, frozen=True, kw_only=True):
    """One LUN of the kernel's target that was made by this daemon; `error` says why it is not there
    (LioRestore)."""

    device: str
    iqn: str
    lun: int
    portals: list[str]
    acl: list[str]
    chap: bool
    error: str | None = None


class LioBackstore(Message, frozen=True, kw_only=True):
    """A backstore of the kind user:ploop; `config` is what it names, `luns` are `IQN/LUN`,
    `device` the device that serves it, if one does, and `error` why none can."""

    name: str
    config: str
    size: int
    luns: list[str]
    device: str | None
    error: str | None = None


class LioReply(Message, frozen=True, kw_only=True):
    exports: list[LioExport]
    backstores: list[LioBackstore] = msgspec.field(default_factory=list)
