"""The messages of the control socket: interface `org.ploopd.Control`.

The types are in one module per noun, named as in `ploopd.control.handlers`, and the methods in
`ploopd.control.messages.methods`: its table `METHODS` drives the server's dispatch, the client's
types and the interface description that `varlinkctl introspect` shows.  Users know all of them as
`messages.NAME`.  Sizes are bytes, times are seconds.
"""

from __future__ import annotations

from ploopd.control.messages.base import DeviceName, Empty, Message
from ploopd.control.messages.device import (
    DeviceDetails,
    DeviceList,
    DeviceSummary,
    JournalDetails,
    Layer,
    ShowReply,
)
from ploopd.control.messages.events import DeviceEvent, EventsParameters, EventsReply
from ploopd.control.messages.info import (
    ConfigText,
    DaemonInfo,
    ReloadAll,
    ReloadRefusal,
    ReloadReply,
)
from ploopd.control.messages.lio import (
    LioBackstore,
    LioExport,
    LioExportParameters,
    LioReply,
    LioUnexportParameters,
)
from ploopd.control.messages.methods import (
    CLEAR_LATCH,
    EVENTS,
    GET_CONFIG,
    GET_INFO,
    INTERFACE,
    LIO_EXPORT,
    LIO_LIST,
    LIO_RESTORE,
    LIO_UNEXPORT,
    LIST_DEVICES,
    METHODS,
    RELOAD,
    RELOAD_DEVICE,
    REPLACE_DEVICE,
    RESIZE_DEVICE,
    SHOW_DEVICE,
    STANDBY_ENTER,
    STANDBY_LEAVE,
    STANDBY_SHOW,
    STANDBY_WAIT,
    Method,
)
from ploopd.control.messages.recovery import (
    ClearLatchReply,
    RecoveryReport,
    RecoveryStep,
    ReloadParameters,
    ReplaceParameters,
    ReplaceStep,
    ResizeParameters,
    ResizeStep,
)
from ploopd.control.messages.standby import StandbyState, StandbyWaitParameters
from ploopd.control.messages.varlink import InterfaceDescription, InterfaceName, ServiceInfo

__all__ = [
    "CLEAR_LATCH",
    "EVENTS",
    "GET_CONFIG",
    "GET_INFO",
    "INTERFACE",
    "LIO_EXPORT",
    "LIO_LIST",
    "LIO_RESTORE",
    "LIO_UNEXPORT",
    "LIST_DEVICES",
    "METHODS",
    "RELOAD",
    "RELOAD_DEVICE",
    "REPLACE_DEVICE",
    "RESIZE_DEVICE",
    "SHOW_DEVICE",
    "STANDBY_ENTER",
    "STANDBY_LEAVE",
    "STANDBY_SHOW",
    "STANDBY_WAIT",
    "ClearLatchReply",
    "ConfigText",
    "DaemonInfo",
    "DeviceDetails",
    "DeviceEvent",
    "DeviceList",
    "DeviceName",
    "DeviceSummary",
    "Empty",
    "EventsParameters",
    "EventsReply",
    "InterfaceDescription",
    "InterfaceName",
    "JournalDetails",
    "Layer",
    "LioBackstore",
    "LioExport",
    "LioExportParameters",
    "LioReply",
    "LioUnexportParameters",
    "Message",
    "Method",
    "RecoveryReport",
    "RecoveryStep",
    "ReloadAll",
    "ReloadParameters",
    "ReloadRefusal",
    "ReloadReply",
    "ReplaceParameters",
    "ReplaceStep",
    "ResizeParameters",
    "ResizeStep",
    "ServiceInfo",
    "ShowReply",
    "StandbyState",
    "StandbyWaitParameters",
]
