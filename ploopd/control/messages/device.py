"""What is known of the devices."""

from __future__ import annotations

import msgspec

from ploopd.control.messages.base import Message


class DeviceSummary(Message, frozen=True, kw_only=True):
    """One line of `device list`.

    `standby` is the state string: `not supported`, `on` or `off`.  `urls` are where initiators
    find the device: `iscsi://HOST:PORT/IQN/LUN`.
    """

    name: str
    image: str
    size: int
    standby: str
    urls: list[str]
    read_only: bool = False


class DeviceList(Message, frozen=True, kw_only=True):
    """The devices in the order of their LUNs."""

    devices: list[DeviceSummary]


class Layer(Message, frozen=True, kw_only=True):
    """One file of the chain; the top is level 0."""

    path: str
    kind: str
    level: int
    guid: str | None = None
    version: int | None = None


class JournalDetails(Message, frozen=True, kw_only=True):
    """What is kept of acknowledged writes that are not flushed: requests, bytes of data and of
    memory (`used`), and how much memory it may be (`limit`)."""

    requests: int
    data: int
    used: int
    limit: int


class DeviceDetails(Message, frozen=True, kw_only=True):
    """Everything that is known of a device without touching its storage.

    `state` is the gate's: `active`, `standby` or `recovering`.  `reason` says why it is not active.
    `format_version` is 0 for a raw image.  `notes` are what was found or repaired at open.
    `latched` is the failure that made it read-only, `full` the last failure of a storage without
    room; None if there is no such thing.  `journal` is None when the journal is off.  `recovery`
    says who ends a standby, and how far that is.  `standby_errnos` are the names of the errors that
    put it into standby.
    """

    name: str
    image: str
    size: int
    standby: str
    urls: list[str]
    read_only: bool
    state: str
    reason: str | None
    parked_requests: int
    parked_bytes: int
    identity: str
    format_version: int
    cluster_size: int
    allocated: int
    layers: list[Layer]
    notes: list[str]
    latched: str | None = None
    full: str | None = None
    journal: JournalDetails | None = None
    recovery: str = "manual"
    standby_errnos: list[str] = msgspec.field(default_factory=list)


class ShowReply(Message, frozen=True, kw_only=True):
    device: DeviceDetails
