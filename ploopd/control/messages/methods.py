"""The methods of the interface `org.ploopd.Control`: one row each, and the table of all."""

from __future__ import annotations

from dataclasses import dataclass

from ploopd.control.messages.base import DeviceName, Empty, Message
from ploopd.control.messages.device import DeviceList, ShowReply
from ploopd.control.messages.events import EventsParameters, EventsReply
from ploopd.control.messages.info import ConfigText, DaemonInfo, ReloadAll, ReloadReply
from ploopd.control.messages.lio import LioExportParameters, LioReply, LioUnexportParameters
from ploopd.control.messages.recovery import (
    ClearLatchReply,
    ReloadParameters,
    ReplaceParameters,
    ReplaceStep,
    ResizeParameters,
    ResizeStep,
)
from ploopd.control.messages.standby import StandbyState, StandbyWaitParameters

INTERFACE = "org.ploopd.Control"


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
