"""The tree of `ploopctl shell`: what is in it, and its commands.

Each command is a call of the daemon by the control socket, as those of `ploopctl` are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from configshell_fb import ConfigNode, ExecutionError

from ploopd.cli.device import detail_fields
from ploopd.cli.errors import one_line
from ploopd.cli.events import event_lines
from ploopd.cli.lio import PATIENCE, echo_backstores
from ploopd.control import messages
from ploopd.control.client import ControlClient
from ploopd.errors import PloopError
from ploopd.units import format_size, parse_size

if TYPE_CHECKING:
    from ploopd.control.messages import (
        DaemonInfo,
        DeviceList,
        DeviceSummary,
        LioBackstore,
        LioExport,
        LioReply,
        Message,
        Method,
    )

MessageT = TypeVar("MessageT", bound="Message")
Summary = tuple[str, bool | None]

_SLOW = (messages.LIO_EXPORT, messages.LIO_UNEXPORT, messages.LIO_RESTORE)
"""What waits for the kernel's target."""


class Daemon:
    """The daemon, one connection for each call: a shell may be open for days."""

    def __init__(self, control: Path | None, timeout: float) -> None:
        self._control = control
        self._timeout = timeout

    def call(
        self, method: Method, reply: type[MessageT], parameters: Message | None = None
    ) -> MessageT:
        """One call; raises ExecutionError, from the PloopError."""
        timeout = max(self._timeout, PATIENCE) if method in _SLOW else self._timeout
        with translated_errors(), ControlClient(self._control, timeout=timeout) as client:
            waiting = f"{method.name} to be answered"
            if parameters is None:
                return client.call(method, reply, waiting=waiting)
            return client.call(method, reply, parameters, waiting=waiting)

    def steps(self, method: Method, parameters: Message, show: Callable[[str], object]) -> None:
        """A call that is answered step by step."""
        with translated_errors(), ControlClient(self._control, timeout=self._timeout) as client:
            waiting = f"the next step of {method.name}"
            for step in client.stream(method, method.reply, parameters, waiting=waiting):
                assert isinstance(step, messages.ReplaceStep | messages.ResizeStep)
                show(f"{step.elapsed:8.3f} s  {step.step}")


@contextmanager
def translated_errors() -> Iterator[None]:
    """PloopErrors as configshell's."""
    try:
        yield
    except PloopError as error:
        raise ExecutionError(str(error)) from error


class Node(ConfigNode):  # type: ignore[misc]  # configshell has no types
    """A place in the tree; `daemon` is whom its commands ask."""

    def __init__(self, name: str, parent: Node, daemon: Daemon) -> None:
        super().__init__(name, parent)
        self.daemon = daemon

    def show(self, text: str) -> None:
        self.shell.con.display(text)

    def show_events(self, device: str | None) -> None:
        """The last events of one device, or of all."""
        parameters = messages.EventsParameters(device=device)
        for line in event_lines(
            self.daemon.call(messages.EVENTS, messages.EventsReply, parameters).events
        ):
            self.show(line)

    def show_fields(self, fields: Sequence[tuple[str, str]]) -> None:
        for name, value in fields:
            self.show(f"{name}: {value}")


def flag(name: str, value: str) -> bool:
    """`name=true` or `name=false`.  Raises ExecutionError."""
    if value not in ("true", "false"):
        raise ExecutionError(f"{name}={value} is neither true nor false")
    return value == "true"


def complete_path(text: str) -> list[str]:
    """The files whose names begin with `text`."""
    directory, _, start = text.rpartition("/")
    try:
        names = sorted(os.listdir(f"{directory}/" if "/" in text else "."))
    except OSError:
        return []
    prefix = f"{directory}/" if "/" in text else ""
    found = [f"{prefix}{name}" for name in names if name.startswith(start)]
    return [f"{each}/" if os.path.isdir(each) else f"{each} " for each in found]


def complete_flag(text: str) -> list[str]:
    """true or false."""
    return [word for word in ("true", "false") if word.startswith(text)]


class DeviceNode(Node):
    """/devices/NAME"""

    def __init__(self, parent: Node, daemon: Daemon, device: DeviceSummary) -> None:
        super().__init__(device.name, parent, daemon)
        self.device = device

    def summary(self) -> Summary:
        standby = {"on": "standby", "off": "active"}.get(self.device.standby, self.device.standby)
        read_only = ", read-only" if self.device.read_only else ""
        text = f"{self.device.image} ({format_size(self.device.size)}{read_only}) {standby}"
        return text, self.device.standby != "on"

    def ui_command_info(self) -> None:
        """Show everything that is known of the device."""
        name = messages.DeviceName(name=self.name)
        reply = self.daemon.call(messages.SHOW_DEVICE, messages.ShowReply, name)
        self.show_fields(detail_fields(reply.device))

    def ui_command_replace(self, image: str, force: str = "false", dry_run: str = "false") -> None:
        """
        Put another file, or the same one again, under the device in the place of its top delta;
        that ends its standby.

        PARAMETERS
        ==========
        image: the file.  force=true accepts one that was not closed cleanly.  dry_run=true makes
        all checks and tells what would be done.
        """
        parameters = messages.ReplaceParameters(
            name=self.name,
            image=os.path.abspath(image),
            force=flag("force", force),
            dry_run=flag("dry_run", dry_run),
        )
        self.daemon.steps(messages.REPLACE_DEVICE, parameters, self.show)

    def ui_complete_replace(
        self, parameters: Mapping[str, str], text: str, current_param: str
    ) -> list[str]:
        if current_param in ("force", "dry_run"):
            return complete_flag(text)
        return complete_path(text) if current_param == "image" else []

    def ui_command_reload(self) -> None:
        """Close the device's files and open them again."""
        parameters = messages.ReloadParameters(name=self.name)
        self.daemon.steps(messages.RELOAD_DEVICE, parameters, self.show)

    def ui_command_resize(self, size: str) -> None:
        """
        Make the device and its image larger while it is served: size=20G, or size=+10G.
        """
        with translated_errors():
            new = parse_size(size.removeprefix("+"))
        if size.startswith("+"):
            name = messages.DeviceName(name=self.name)
            new += self.daemon.call(messages.SHOW_DEVICE, messages.ShowReply, name).device.size
        parameters = messages.ResizeParameters(name=self.name, size=new)
        self.daemon.steps(messages.RESIZE_DEVICE, parameters, self.show)

    def ui_command_standby(self, action: str = "show") -> None:
        """
        Show the standby state, or change it: standby [show|enter|leave].

        enter parks all requests until leave, or a replace.
        """
        methods = {
            "show": messages.STANDBY_SHOW,
            "enter": messages.STANDBY_ENTER,
            "leave": messages.STANDBY_LEAVE,
        }
        if action not in methods:
            raise ExecutionError(f"{action!r} is none of {', '.join(methods)}")
        name = messages.DeviceName(name=self.name)
        self.show(self.daemon.call(methods[action], messages.StandbyState, name).standby)

    def ui_complete_standby(
        self, parameters: Mapping[str, str], text: str, current_param: str
    ) -> list[str]:
        return [word for word in ("show", "enter", "leave") if word.startswith(text)]

    def ui_command_events(self) -> None:
        """Show what has happened to the device."""
        self.show_events(self.name)

    def ui_command_clear_latch(self) -> None:
        """Let the device be written again after an error has made it read-only."""
        name = messages.DeviceName(name=self.name)
        self.daemon.call(messages.CLEAR_LATCH, messages.ClearLatchReply, name)


class DevicesNode(Node):
    """/devices"""

    def fill(self, devices: DeviceList) -> None:
        for device in devices.devices:
            DeviceNode(self, self.daemon, device)

    def ui_command_events(self) -> None:
        """Show what has happened to all devices, and which have come and gone."""
        self.show_events(None)

    def summary(self) -> Summary:
        waiting = [each.name for each in self.children if each.device.standby == "on"]
        text = f"devices: {len(self.children)}"
        return (f"{text}, in standby: {', '.join(waiting)}", False) if waiting else (text, None)


class LeafNode(Node):
    """Something that has a line and no commands of its own."""

    def __init__(self, name: str, parent: Node, daemon: Daemon, line: str) -> None:
        super().__init__(name, parent, daemon)
        self._line = line

    def summary(self) -> Summary:
        return self._line, None


class TargetNode(Node):
    """/targets/IQN: the embedded target."""

    def __init__(self, parent: Node, daemon: Daemon, info: DaemonInfo, devices: DeviceList) -> None:
        super().__init__(info.iqn, parent, daemon)
        portals = LeafNode("portals", self, daemon, f"portals: {len(info.portals)}")
        for portal in info.portals:
            LeafNode(portal, portals, daemon, "listening")
        luns = LeafNode("luns", self, daemon, f"LUNs: {len(devices.devices)}")
        for device in devices.devices:
            for number in dict.fromkeys(url.rsplit("/", 1)[1] for url in device.urls):
                LeafNode(f"lun{number}", luns, daemon, f"/devices/{device.name}")

    def summary(self) -> Summary:
        return "embedded iSCSI target", None


class BackstoreNode(Node):
    """/lio/NAME: a backstore of the kernel and its LUNs."""

    def __init__(
        self, parent: Node, daemon: Daemon, backstore: LioBackstore, exports: Sequence[LioExport]
    ) -> None:
        super().__init__(backstore.name, parent, daemon)
        self.backstore = backstore
        portals = {f"{each.iqn}/{each.lun}": ", ".join(each.portals) for each in exports}
        for lun in backstore.luns:
            LeafNode(lun.replace("/", ":lun"), self, daemon, portals.get(lun, "not made here"))

    def luns(self, device: str | None) -> list[str]:
        """`IQN/LUN` of each LUN if the backstore is that of `device`, or whose ever."""
        return self.backstore.luns if device in (None, self.name) else []

    def summary(self) -> Summary:
        each = self.backstore
        text = f"{each.config} ({format_size(each.size)})"
        if each.device:
            return text, True
        why = "" if each.error is None else f": {one_line(each.error)}"
        return f"{text} is not served{why}", False


class LioNode(Node):
    """/lio; what is below is read when somebody looks: the kernel's target may be stuck, and the
    devices must be within reach then."""

    def __init__(self, parent: Node, daemon: Daemon) -> None:
        super().__init__("lio", parent, daemon)
        self._problem = ""
        self._filled = False

    @property
    def children(self) -> set[BackstoreNode]:
        """The backstores."""
        self._fill()
        found: set[BackstoreNode] = self._children
        return found

    def get_child(self, name: str) -> BackstoreNode:
        """Raises ValueError."""
        self._fill()
        child: BackstoreNode = super().get_child(name)
        return child

    def _fill(self) -> None:
        if self._filled:
            return
        self._filled = True
        try:
            reply = self.daemon.call(messages.LIO_LIST, messages.LioReply)
        except ExecutionError as error:
            self._problem = str(error).split(";")[0]
            return
        for backstore in reply.backstores:
            exports = [each for each in reply.exports if each.device == backstore.name]
            BackstoreNode(self, self.daemon, backstore, exports)

    def summary(self) -> Summary:
        count = len(self.children)
        return self._problem or f"backstores: {count}", None

    def ui_command_list(self) -> None:
        """Show the backstores of the kind user:ploop, their LUNs, and why one is not served."""
        echo_backstores(self.daemon.call(messages.LIO_LIST, messages.LioReply))

    def ui_command_export(
        self,
        device: str,
        iqn: str,
        portal: str = "127.0.0.1:3260",
        lun: str | None = None,
        acl: str = "",
        chap_file: str | None = None,
        insecure: str = "false",
    ) -> None:
        """
        Export a device as a LUN of the kernel's target.

        PARAMETERS
        ==========
        portal and acl take several values with commas between them; the rest is as in
        `ploopctl lio export`.
        """
        if lun is not None and not lun.isdecimal():
            raise ExecutionError(f"lun={lun} is not a number")
        parameters = messages.LioExportParameters(
            name=device,
            iqn=iqn,
            portals=portal.split(","),
            acl=[name for name in acl.split(",") if name],
            chap_file=None if chap_file is None else os.path.abspath(chap_file),
            lun=None if lun is None else int(lun),
            insecure=flag("insecure", insecure),
        )
        self._tell(self.daemon.call(messages.LIO_EXPORT, messages.LioReply, parameters))

    def ui_complete_export(
        self, parameters: Mapping[str, str], text: str, current_param: str
    ) -> list[str]:
        if current_param == "insecure":
            return complete_flag(text)
        if current_param == "chap_file":
            return complete_path(text)
        if current_param != "device":
            return []
        devices = self.get_node("/devices").children
        return [f"{each.name} " for each in devices if each.name.startswith(text)]

    def ui_command_unexport(self, device: str, iqn: str | None = None) -> None:
        """Take a device's LUNs away: that of iqn, or all."""
        parameters = messages.LioUnexportParameters(name=device, iqn=iqn)
        self.daemon.call(messages.LIO_UNEXPORT, messages.LioReply, parameters)

    def ui_complete_unexport(
        self, parameters: Mapping[str, str], text: str, current_param: str
    ) -> list[str]:
        found = {each.name for each in self.children}
        if current_param == "iqn":
            device = parameters.get("device")
            luns = (lun for each in self.children for lun in each.luns(device))
            found = {lun.rpartition("/")[0] for lun in luns}
        return [f"{each} " for each in sorted(found) if each.startswith(text)]

    def ui_command_restore(self) -> None:
        """Make again what was exported and is not there."""
        reply = self.daemon.call(messages.LIO_RESTORE, messages.LioReply)
        self._tell(reply)
        failed = sum(each.error is not None for each in reply.exports)
        if failed:
            raise ExecutionError(f"{failed} of {len(reply.exports)} exports could not be restored")

    def _tell(self, reply: LioReply) -> None:
        for each in reply.exports:
            for portal in each.portals:
                url = f"iscsi://{portal}/{each.iqn}/{each.lun}"
                self.show(url if each.error is None else f"{url}: {each.error}")
