"""`ploopctl shell`: the daemon as a tree, with targetcli's manners.

The only module that imports configshell.  The tree is read from the daemon before each command;
the commands are what `ploopctl` can do, by the same control socket.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
from configshell_fb import ConfigNode, ConfigShell, ExecutionError

from ploopd import __version__
from ploopd.cli.device import detail_fields
from ploopd.cli.errors import one_line
from ploopd.cli.options import TIMEOUT
from ploopd.control import messages
from ploopd.control.client import ControlClient
from ploopd.errors import PloopError, open_error
from ploopd.units import format_size

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

HISTORY = "~/.ploopctl"
"""Where the history and the settings of an interactive shell are kept."""

MessageT = TypeVar("MessageT", bound="Message")
Summary = tuple[str, bool | None]


class Daemon:
    """The daemon, one connection for each call: a shell may be open for days."""

    def __init__(self, control: Path | None, timeout: float) -> None:
        self._control = control
        self._timeout = timeout

    def call(
        self, method: Method, reply: type[MessageT], parameters: Message | None = None
    ) -> MessageT:
        """One call; raises ExecutionError, from the PloopError."""
        with _errors(), ControlClient(self._control, timeout=self._timeout) as client:
            waiting = f"{method.name} to be answered"
            if parameters is None:
                return client.call(method, reply, waiting=waiting)
            return client.call(method, reply, parameters, waiting=waiting)

    def steps(self, method: Method, parameters: Message, show: Callable[[str], object]) -> None:
        """A call that is answered step by step."""
        with _errors(), ControlClient(self._control, timeout=self._timeout) as client:
            for step in client.stream(
                method, messages.ReplaceStep, parameters, waiting=f"the next step of {method.name}"
            ):
                show(f"{step.elapsed:8.3f} s  {step.step}")


@contextmanager
def _errors() -> Iterator[None]:
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

    def show_fields(self, fields: Sequence[tuple[str, str]]) -> None:
        for name, value in fields:
            self.show(f"{name}: {value}")


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
            force=self.ui_eval_param(force, "bool", False),
            dry_run=self.ui_eval_param(dry_run, "bool", False),
        )
        self.daemon.steps(messages.REPLACE_DEVICE, parameters, self.show)

    def ui_complete_replace(
        self, parameters: Mapping[str, str], text: str, current_param: str
    ) -> list[str]:
        if current_param in ("force", "dry_run"):
            return [word for word in ("true", "false") if word.startswith(text)]
        return _complete_path(text) if current_param == "image" else []

    def ui_command_reload(self) -> None:
        """Close the device's files and open them again."""
        parameters = messages.ReloadParameters(name=self.name)
        self.daemon.steps(messages.RELOAD_DEVICE, parameters, self.show)

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

    def ui_command_clear_latch(self) -> None:
        """Let the device be written again after an error has made it read-only."""
        name = messages.DeviceName(name=self.name)
        self.daemon.call(messages.CLEAR_LATCH, messages.ClearLatchReply, name)


class DevicesNode(Node):
    """/devices"""

    def fill(self, devices: DeviceList) -> None:
        for device in devices.devices:
            DeviceNode(self, self.daemon, device)

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

    def summary(self) -> Summary:
        each = self.backstore
        text = f"{each.config} ({format_size(each.size)})"
        if each.device:
            return text, True
        why = "" if each.error is None else f": {one_line(each.error)}"
        return f"{text} is not served{why}", False


class LioNode(Node):
    """/lio"""

    def __init__(self, parent: Node, daemon: Daemon) -> None:
        super().__init__("lio", parent, daemon)
        self.problem = ""

    def fill(self) -> None:
        try:
            reply = self.daemon.call(messages.LIO_LIST, messages.LioReply)
        except ExecutionError as error:
            self.problem = str(error).split(";")[0]
            return
        for backstore in reply.backstores:
            exports = [each for each in reply.exports if each.device == backstore.name]
            BackstoreNode(self, self.daemon, backstore, exports)

    def summary(self) -> Summary:
        return self.problem or f"backstores: {len(self.children)}", None

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
            insecure=self.ui_eval_param(insecure, "bool", False),
        )
        self._tell(self.daemon.call(messages.LIO_EXPORT, messages.LioReply, parameters))

    def ui_complete_export(
        self, parameters: Mapping[str, str], text: str, current_param: str
    ) -> list[str]:
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
        if current_param != "device":
            return []
        return [f"{each.name} " for each in self.children if each.name.startswith(text)]

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


class Root(Node):
    """/"""

    def __init__(self, shell: ConfigShell, daemon: Daemon) -> None:
        ConfigNode.__init__(self, "/", shell=shell)
        self.daemon = daemon
        self.version = ""

    def refresh(self) -> None:
        """Read the tree from the daemon."""
        info = self.daemon.call(messages.GET_INFO, messages.DaemonInfo)
        devices = self.daemon.call(messages.LIST_DEVICES, messages.DeviceList)
        for child in list(self.children):
            self.remove_child(child)
        self.version = info.version
        DevicesNode("devices", self, self.daemon).fill(devices)
        targets = LeafNode("targets", self, self.daemon, f"targets: {int(bool(info.portals))}")
        if info.portals:
            TargetNode(targets, self.daemon, info, devices)
        LioNode(self, self.daemon).fill()

    def summary(self) -> Summary:
        return f"ploopd {self.version}", None

    def ui_command_refresh(self) -> None:
        """Read the tree again; it is read before each command anyway."""

    def ui_command_version(self) -> None:
        """Show the versions of the shell and of the daemon."""
        self.show(f"ploopctl {__version__}, ploopd {self.version}")

    def ui_command_saveconfig(self, file: str = "ploopd.toml") -> None:
        """
        Write what the daemon serves now, with all settings, as a configuration file of `ploopd
        run`.

        A file that exists is kept beside it with the time in its name.  What is exported through
        the kernel's target is remembered by the daemon itself.
        """
        text = self.daemon.call(messages.GET_CONFIG, messages.ConfigText).toml
        with _errors():
            self.show(f"written: {_save(Path(os.path.abspath(file)), text)}")

    def ui_complete_saveconfig(
        self, parameters: Mapping[str, str], text: str, current_param: str
    ) -> list[str]:
        return _complete_path(text)


class Shell(ConfigShell):  # type: ignore[misc]  # configshell has no types
    """A shell whose tree is fresh for every command."""

    def __init__(self, daemon: Daemon, preferences: str | None) -> None:
        super().__init__(preferences)
        self._current_node: ConfigNode
        self.root = Root(self, daemon)

    def run_cmdline(self, cmdline: str) -> None:
        """Run one line where the shell is; raises ExecutionError."""
        words = cmdline.split(None, 1)
        if words and words[0] not in ("exit", "help"):
            path = self._current_node.path
            self.root.refresh()
            try:
                self._current_node = self.root.get_node(path)
            except ValueError:  # it has gone
                self._current_node = self.root
        super().run_cmdline(cmdline)


def _save(path: Path, text: str) -> Path:
    """Write `path` whole or not at all; raises PloopError."""
    new = path.with_name(f"{path.name}.new")
    try:
        with new.open("w") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        if path.exists():
            os.link(path, path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise open_error(error, path) from error
    return path


def _complete_path(text: str) -> list[str]:
    directory, _, start = text.rpartition("/")
    try:
        names = sorted(os.listdir(f"{directory}/" if "/" in text else "."))
    except OSError:
        return []
    prefix = f"{directory}/" if "/" in text else ""
    found = [f"{prefix}{name}" for name in names if name.startswith(start)]
    return [f"{each}/" if os.path.isdir(each) else f"{each} " for each in found]


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, metavar="[PATH] [COMMAND] [ARGUMENT]...")
@TIMEOUT
@click.pass_obj
def shell(control: Path | None, words: tuple[str, ...], timeout: float) -> None:
    """The daemon as a tree, as targetcli shows the kernel's target.

    With arguments one command is run: `ploopctl shell ls /devices`, `ploopctl shell /devices/disk
    info`. Without, and with a terminal, commands are asked for; otherwise they are read from
    standard input, one on each line, until the first error. `help` lists the commands.
    """
    interactive = not words and sys.stdin.isatty()
    daemon = Daemon(control, timeout)
    shell = Shell(daemon, HISTORY if interactive else None)
    if not interactive:
        shell.prefs["color_mode"] = False
    try:
        if words:
            shell.run_cmdline(" ".join(words))
        elif interactive:
            _converse(shell)
        else:
            for line in sys.stdin:
                if line.strip() and not line.lstrip().startswith("#"):
                    shell.run_cmdline(line.strip())
    except ExecutionError as error:
        raise (
            error.__cause__
            if isinstance(error.__cause__, PloopError)
            else PloopError(str(error), hint="try: ploopctl shell help")
        ) from None


def _converse(shell: Shell) -> None:
    """Until `exit`; an error does not end it."""
    shell.root.refresh()
    while True:
        try:
            shell.run_interactive()
            return
        except ExecutionError as error:
            click.echo(str(error), err=True)
