"""The messages of the control socket: interface `org.ploopd.Control`.

The table `METHODS` at the end drives the server's dispatch, the client's types and the interface
description that `varlinkctl introspect` shows.  Sizes are bytes, times are seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

INTERFACE = "org.ploopd.Control"


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all parameters and replies."""


class Empty(Message, frozen=True, kw_only=True):
    """No parameters, or nothing to say but "done"."""


class DeviceName(Message, frozen=True, kw_only=True):
    """Which device: its name as `device list` shows it."""

    name: str


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
    standby_errnos: list[str] = []


class ShowReply(Message, frozen=True, kw_only=True):
    device: DeviceDetails


class ReplaceParameters(Message, frozen=True, kw_only=True):
    """Put `image` under the device instead of one of its deltas.

    Which: the top, or the delta of `level` (0 is the top) or `guid`.  `force` accepts an unclean
    image, `keep_name` renames `image` to the old file's name, `keep_descriptor` leaves the
    DiskDescriptor.xml as it is, `dry_run` only checks.
    """

    name: str
    image: str
    force: bool = False
    level: int | None = None
    guid: str | None = None
    keep_name: bool = False
    keep_descriptor: bool = False
    dry_run: bool = False


class ReloadParameters(Message, frozen=True, kw_only=True):
    """Close all files of the device and open them again; `dry_run` only checks."""

    name: str
    dry_run: bool = False


class RecoveryStep(Message, frozen=True, kw_only=True):
    """A step that was done, or in a dry run what it would do."""

    step: str
    elapsed: float
    detail: str = ""


class RecoveryReport(Message, frozen=True, kw_only=True):
    """A recovery that has succeeded, or would (`dry_run`).

    `image` is what is served now in the place of `previous`; `level` is None when everything was
    opened again.
    """

    device: str
    image: str
    previous: str
    identity: str
    level: int | None
    guid: str | None
    dry_run: bool
    elapsed: float
    steps: list[RecoveryStep]


class ReplaceStep(Message, frozen=True, kw_only=True):
    """One step of a recovery, sent when it is done; the last reply has `image` and `report` set.

    `elapsed` counts from the call.  `planned`: a dry run; the step was not done, and `detail` says
    what it would do.
    """

    step: str
    elapsed: float
    detail: str = ""
    planned: bool = False
    image: str | None = None
    report: RecoveryReport | None = None


class ResizeParameters(Message, frozen=True, kw_only=True):
    """Give the device and its image `size` bytes, rounded up to whole clusters."""

    name: str
    size: int


class ResizeStep(Message, frozen=True, kw_only=True):
    """One step of a resize, sent when it is done; the last reply has `size` and `previous` set.

    `elapsed` counts from the call.
    """

    step: str
    elapsed: float
    detail: str = ""
    size: int | None = None
    previous: int | None = None


class ClearLatchReply(Message, frozen=True, kw_only=True):
    """The failure that had made the device read-only."""

    failure: str


class StandbyState(Message, frozen=True, kw_only=True):
    """The state string: `not supported`, `on` or `off`.

    `executing`: requests that the storage has and has not answered; while there are none, a device
    in standby leaves its image alone."""

    standby: str
    executing: int = 0


class StandbyWaitParameters(Message, frozen=True, kw_only=True):
    """Wait until the state string is `standby`, for `timeout` seconds at most."""

    name: str
    standby: str
    timeout: float = 30.0


class EventsParameters(Message, frozen=True, kw_only=True):
    """Of which device; None is of all."""

    device: str | None = None


class DeviceEvent(Message, frozen=True, kw_only=True):
    """Something that happened to a device.

    `sequence` counts the daemon's events, `time` is in seconds since 1970, `event` the name of what
    happened, `details` text and numbers that say more.
    """

    sequence: int
    time: float
    event: str
    device: str
    details: dict[str, str | int | float]


class EventsReply(Message, frozen=True, kw_only=True):
    """Events, oldest first; `lost` is how many are missing before the first of them."""

    events: list[DeviceEvent]
    lost: int = 0


class LioExportParameters(Message, frozen=True, kw_only=True):
    """Export device `name` as a LUN of the kernel target's `iqn`.

    `portals`: `HOST:PORT`.  `acl`: initiator names, empty for all.  `chap_file`: a file with the
    account, read by the daemon.  `lun` None takes the first free one.  `insecure` allows a network
    address with neither ACL nor CHAP.
    """

    name: str
    iqn: str
    portals: list[str]
    acl: list[str] = []
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
    backstores: list[LioBackstore] = []


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


class ServiceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The reply of `org.varlink.service.GetInfo`."""

    vendor: str
    product: str
    version: str
    url: str
    interfaces: list[str]


class InterfaceName(msgspec.Struct, frozen=True, kw_only=True):
    interface: str


class InterfaceDescription(msgspec.Struct, frozen=True, kw_only=True):
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A row of the interface: name, types, whether it answers in steps, one line of help."""

    name: str
    parameters: type[Message]
    reply: type[Message]
    help: str
    more: bool = False

    @property
    def qualified_name(self) -> str:
        return f"{INTERFACE}.{self.name}"


GET_INFO = Method(
    name="GetInfo", parameters=Empty, reply=DaemonInfo, help="Version and portals of the daemon."
)
GET_CONFIG = Method(
    name="GetConfig",
    parameters=Empty,
    reply=ConfigText,
    help="The configuration as it is now, as a file for `ploopd run`.",
)
RELOAD = Method(
    name="Reload",
    parameters=ReloadAll,
    reply=ReloadReply,
    help="Read the configuration files again; a mistake in them changes nothing.",
)
LIST_DEVICES = Method(
    name="ListDevices",
    parameters=Empty,
    reply=DeviceList,
    help="All devices; never touches their storage.",
)
SHOW_DEVICE = Method(
    name="ShowDevice",
    parameters=DeviceName,
    reply=ShowReply,
    help="One device in full; never touches its storage.",
)
REPLACE_DEVICE = Method(
    name="ReplaceDevice",
    parameters=ReplaceParameters,
    reply=ReplaceStep,
    help="Replace a delta. With `more`, one reply for each step.",
    more=True,
)
RELOAD_DEVICE = Method(
    name="ReloadDevice",
    parameters=ReloadParameters,
    reply=ReplaceStep,
    help="Open all files of a device again. With `more`, one reply for each step.",
    more=True,
)
RESIZE_DEVICE = Method(
    name="ResizeDevice",
    parameters=ResizeParameters,
    reply=ResizeStep,
    help="Make a device and its image larger. With `more`, one reply for each step.",
    more=True,
)
CLEAR_LATCH = Method(
    name="ClearLatch",
    parameters=DeviceName,
    reply=ClearLatchReply,
    help="Let a device be written to again that a storage failure has made read-only.",
)
STANDBY_SHOW = Method(
    name="StandbyShow",
    parameters=DeviceName,
    reply=StandbyState,
    help="The standby state string of a device.",
)
STANDBY_ENTER = Method(
    name="StandbyEnter",
    parameters=DeviceName,
    reply=StandbyState,
    help="Park the requests of a device from now on.",
)
STANDBY_LEAVE = Method(
    name="StandbyLeave",
    parameters=DeviceName,
    reply=StandbyState,
    help="Go on with the same storage after StandbyEnter.",
)
STANDBY_WAIT = Method(
    name="StandbyWait",
    parameters=StandbyWaitParameters,
    reply=StandbyState,
    help="Answers when the state string is the wanted one.",
)

EVENTS = Method(
    name="Events",
    parameters=EventsParameters,
    reply=EventsReply,
    help="The last events. With `more`, those and all that follow.",
    more=True,
)

LIO_EXPORT = Method(
    name="LioExport",
    parameters=LioExportParameters,
    reply=LioReply,
    help="Export a device through the kernel's target.",
)
LIO_UNEXPORT = Method(
    name="LioUnexport",
    parameters=LioUnexportParameters,
    reply=LioReply,
    help="Take a device's LUNs of the kernel's target away.",
)
LIO_LIST = Method(
    name="LioList",
    parameters=Empty,
    reply=LioReply,
    help="What is exported through the kernel's target, and its backstores of our kind.",
)
LIO_RESTORE = Method(
    name="LioRestore",
    parameters=Empty,
    reply=LioReply,
    help="Make again what was exported and is not there.",
)

METHODS: tuple[Method, ...] = (
    GET_INFO,
    GET_CONFIG,
    RELOAD,
    LIST_DEVICES,
    SHOW_DEVICE,
    REPLACE_DEVICE,
    RELOAD_DEVICE,
    RESIZE_DEVICE,
    CLEAR_LATCH,
    STANDBY_SHOW,
    STANDBY_ENTER,
    STANDBY_LEAVE,
    STANDBY_WAIT,
    EVENTS,
    LIO_EXPORT,
    LIO_UNEXPORT,
    LIO_LIST,
    LIO_RESTORE,
)
