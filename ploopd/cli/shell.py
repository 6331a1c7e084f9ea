"""`ploopctl shell`: the daemon as a tree, with targetcli's manners.

This module and `shell_tree` are the only ones that import configshell.  The tree is read from the
daemon before each command.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from configshell_fb import ConfigNode, ConfigShell, ExecutionError

from ploopd import __version__
from ploopd.cli.options import TIMEOUT
from ploopd.cli.reload import report_lines
from ploopd.cli.shell_tree import (
    Daemon,
    DevicesNode,
    LeafNode,
    LioNode,
    Node,
    Summary,
    TargetNode,
    complete_flag,
    complete_path,
    flag,
    translated_errors,
)
from ploopd.control import messages
from ploopd.errors import ExitCode, PloopError, open_error

HISTORY = "~/.ploopctl"
"""Where the history and the settings of an interactive shell are kept."""

_NAMED = re.compile(r"([\w-]+)=(.*)", re.DOTALL)


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
        LioNode(self, self.daemon)

    def summary(self) -> Summary:
        return f"ploopd {self.version}", None

    def ui_command_refresh(self) -> None:
        """Read the tree again; it is read before each command anyway."""

    def ui_command_version(self) -> None:
        """Show the versions of the shell and of the daemon."""
        self.show(f"ploopctl {__version__}, ploopd {self.version}")

    def ui_command_reload(self, force: str = "false") -> None:
        """
        Read the configuration files of `ploopd run` again.

        force=true also removes devices in standby that are not configured any more: what waits for
        them fails.  See `ploopctl reload`.
        """
        parameters = messages.ReloadAll(force=flag("force", force))
        reply = self.daemon.call(messages.RELOAD, messages.ReloadReply, parameters)
        for line in report_lines(reply):
            self.show(line)
        if reply.refused:
            with translated_errors():
                names = ", ".join(each.device for each in reply.refused)
                raise PloopError(
                    "not everything was done", field="devices", value=names, exit_code=ExitCode.BUSY
                )

    def ui_complete_reload(
        self, parameters: Mapping[str, str], text: str, current_param: str
    ) -> list[str]:
        return complete_flag(text)

    def ui_command_saveconfig(self, file: str = "ploopd.toml") -> None:
        """
        Write what the daemon serves now, with all settings, as a configuration file of `ploopd
        run`.

        A file that exists is kept beside it with the time in its name.  What is exported through
        the kernel's target is remembered by the daemon itself.
        """
        text = self.daemon.call(messages.GET_CONFIG, messages.ConfigText).toml
        with translated_errors():
            self.show(f"written: {_save(Path(os.path.abspath(file)), text)}")

    def ui_complete_saveconfig(
        self, parameters: Mapping[str, str], text: str, current_param: str
    ) -> list[str]:
        return complete_path(text)


class Shell(ConfigShell):  # type: ignore[misc]  # configshell has no types
    """A shell whose tree is fresh for every command."""

    def __init__(self, daemon: Daemon, preferences: str | None) -> None:
        super().__init__(preferences)
        self._current_node: ConfigNode
        self.root = Root(self, daemon)

    @property
    def ended(self) -> bool:
        """`exit` was said."""
        return bool(self._exit)

    def run_cmdline(self, cmdline: str) -> None:
        """Run one line where the shell is; words are quoted as in sh.  Raises ExecutionError."""
        try:
            words = shlex.split(cmdline)
        except ValueError as error:
            raise ExecutionError(f"{cmdline}: {str(error).lower()}") from error
        self.run_words(words)

    def run_words(self, words: Sequence[str]) -> None:
        """Run `[PATH] [COMMAND] [VALUE]... [NAME=VALUE]...`; raises ExecutionError.

        configshell's own parser knows no quotes, and silently leaves out what begins with a
        character that it does not know: of another image than was meant, for example.
        """
        left = list(words)
        if not left:
            return
        if left[0] not in ("exit", "help"):
            self._refresh()
        at = (
            left.pop(0)
            if left[0] in (".", "..", "*") or left[0][0] in "@/" or ("/" in left[0])
            else ""
        )
        command = left.pop(0) if left else ""
        named = {match[1]: match[2] for word in left if (match := _NAMED.fullmatch(word))}
        plain = [word for word in left if not _NAMED.fullmatch(word)]
        self._execute_command(at, command, plain, named)

    def _refresh(self) -> None:
        path = self._current_node.path
        self.root.refresh()
        try:
            self._current_node = self.root.get_node(path)
        except ValueError:  # it has gone
            self._current_node = self.root


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
        if len(words) == 1:
            shell.run_cmdline(words[0])
        elif words:
            shell.run_words(words)
        elif interactive:
            _converse(shell)
        else:
            for line in sys.stdin:
                if not line.lstrip().startswith("#"):
                    shell.run_cmdline(line)
                if shell.ended:
                    break
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
