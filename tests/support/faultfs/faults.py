"""The rules in force, what they do to an operation, and what has been seen."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import os
from collections import Counter
from dataclasses import dataclass, field

import trio

from tests.support.faultfs.nodes import Node, NodeTable
from tests.support.faultfs.regions import extent_of
from tests.support.faultfs.script import STICKY, Command, Rule, ScriptError, errno_of, parse


@dataclass(eq=False, slots=True)
class Active:
    """A rule in force: how many operations it concerned (`matched`), and was done to (`hits`)."""

    number: int
    rule: Rule
    matched: int = 0
    hits: int = 0
    hanging: int = 0
    released: trio.Event = field(default_factory=trio.Event)

    def due(self) -> bool:
        """Count one operation and say whether it is one of those to which it is done."""
        rule = self.rule
        self.matched += 1
        place = self.matched - rule.skip
        if place <= 0 or place % rule.every or (rule.count is not None and self.hits >= rule.count):
            return False
        self.hits += 1
        return True

    def release(self) -> None:
        """What hangs goes on; what comes later hangs again."""
        self.released.set()
        self.released = trio.Event()


@dataclass(frozen=True, slots=True)
class Operation:
    """What is about to be done to a file: `descriptor` is the file below, for data operations."""

    name: str
    paths: tuple[str, ...]
    node: Node | None = None
    descriptor: int = -1
    offset: int = 0
    length: int = 0


class Faults:
    """Rules by number, the errno of a dead mount, and counters of operations."""

    def __init__(self, nodes: NodeTable) -> None:
        self.nodes = nodes
        self.rules: dict[int, Active] = {}
        self.dead = 0
        self._death: Command | None = None
        self.seen: Counter[str] = Counter()
        self.last_error: str | None = None
        self._next = 1

    # -- operations ------------------------------------------------------------------------

    async def meet(self, operation: Operation) -> Rule | None:
        """Wait, hang or raise OSError as the first rule says that is due; returns that rule."""
        self.seen[operation.name] += 1
        self.require_alive()
        node = operation.node
        sticky = operation.name in STICKY or (operation.name == "read" and node and node.lost)
        if node is not None and node.stuck and sticky:
            raise OSError(node.stuck, "sticks to the inode")
        active = self._find(operation)
        if active is None:
            return None
        rule = active.rule
        if rule.seconds:
            await trio.sleep(rule.seconds)
        if rule.hang:
            active.hanging += 1
            try:
                await active.released.wait()
            finally:
                active.hanging -= 1
        self.require_alive()
        if rule.lose and node is not None:
            node.unsynced.forget()
        if rule.late:
            await trio.sleep(rule.late)
        if rule.errno:
            if rule.stick and node is not None:
                node.stick(rule.errno, lost=rule.lose)
            raise OSError(rule.errno, rule.text)
        return rule

    def require_alive(self) -> None:
        if self.dead:
            raise OSError(self.dead, "the mount is dead")

    def written(self) -> None:
        """A write has been acknowledged: die if it was the one that death waited for."""
        death = self._death
        if death is not None and self.unsynced >= death.unsynced:
            self._die(death)

    def _die(self, command: Command) -> None:
        self._death = None
        self.dead = errno_of(command.argument or "ENOTCONN")
        for active in self.rules.values():
            active.release()

    @property
    def unsynced(self) -> int:
        """Bytes that were acknowledged and not synced, of all files."""
        return sum(len(node.unsynced) for node in self.nodes)

    def _find(self, operation: Operation) -> Active | None:
        for active in self.rules.values():
            rule = active.rule
            if rule.cache is None and rule.concerns(operation.paths, operation.name):
                if rule.range is not None and not _touches(rule, operation):
                    continue
                if active.due():
                    return active
        return None

    def cache_of(self, node: Node) -> Active | None:
        """The rule that keeps writes to this file in memory."""
        for active in self.rules.values():
            if active.rule.cache is not None and active.rule.concerns(node.names, "write"):
                return active
        return None

    @property
    def hanging(self) -> int:
        return sum(active.hanging for active in self.rules.values())

    # -- the script ------------------------------------------------------------------------

    def execute(self, text: str) -> None:
        """Take rules and commands; nothing is done if one line is wrong.  Raises ScriptError."""
        try:
            parsed = parse(text)
            for each in parsed:
                if isinstance(each, Command) and each.name in ("clear", "release"):
                    self._chosen(each.argument)
        except ScriptError as error:
            self.last_error = str(error)
            raise
        self.last_error = None
        for each in parsed:
            if isinstance(each, Rule):
                self.rules[self._next] = Active(self._next, each)
                self._next += 1
            else:
                self._command(each)

    def _command(self, command: Command) -> None:
        match command.name:
            case "clear" | "release":
                for active in self._chosen(command.argument):
                    if command.name == "clear":
                        del self.rules[active.number]
                    active.release()
            case "lose" | "sync" | "unstick":
                for node in self._nodes(command.argument):
                    self._on_node(node, command)
            case "dead" if self.unsynced < command.unsynced:
                self._death = command
            case "dead":
                self._die(command)
            case "alive":
                self.dead = 0
                self._death = None
            case "reset":
                self.seen.clear()
                for active in self.rules.values():
                    active.matched = active.hits = 0

    def _on_node(self, node: Node, command: Command) -> None:
        if command.name == "unstick":
            node.unstick()
            return
        if not node.unsynced.pages:
            return
        descriptor = self.open_below(node)
        if descriptor is None:
            node.unsynced.forget()
            return
        try:
            if command.name == "sync":
                node.unsynced.write_back(descriptor)
                os.fsync(descriptor)
            else:
                node.unsynced.lose(descriptor, keep=command.keep, seed=command.seed)
        finally:
            os.close(descriptor)

    def open_below(self, node: Node) -> int | None:
        """The file below, opened for reading and writing, by a descriptor or by a name."""
        for handle in node.handles:
            return os.open(f"/proc/self/fd/{handle.descriptor}", os.O_RDWR | os.O_CLOEXEC)
        for path in node.paths:
            with contextlib.suppress(FileNotFoundError):  # gone without us
                return os.open(self.nodes.full(path), os.O_RDWR | os.O_CLOEXEC)
        return None

    def _chosen(self, argument: str | None) -> list[Active]:
        """Rules by number or by their path glob; all of them without an argument."""
        if argument is None:
            return list(self.rules.values())
        if argument.isdecimal():
            if int(argument) not in self.rules:
                raise ScriptError(f"there is no rule {argument}")
            return [self.rules[int(argument)]]
        return [each for each in self.rules.values() if each.rule.path == argument]

    def _nodes(self, glob: str | None) -> list[Node]:
        return [
            node
            for node in self.nodes
            if glob is None or any(fnmatch.fnmatchcase(path, glob) for path in node.paths)
        ]

    # -- what the control file shows -------------------------------------------------------

    def report(self) -> str:
        """JSON, one thing per line."""
        rules = [
            {"id": each.number, "rule": each.rule.text, "matched": each.matched, "hits": each.hits}
            | ({"hanging": each.hanging} if each.hanging else {})
            for each in self.rules.values()
        ]
        handles = [
            {"path": " ".join(node.names), "mode": "rw" if each.writable else "r", "pid": each.pid}
            for node in self.nodes
            for each in sorted(node.handles, key=lambda each: each.descriptor)
        ]
        sections: dict[str, object] = {
            "rules": rules,
            "open": handles,
            "unsynced": {
                " ".join(n.names): len(n.unsynced) for n in self.nodes if n.unsynced.pages
            },
            "stuck": {" ".join(n.names): errno.errorcode[n.stuck] for n in self.nodes if n.stuck},
            "seen": dict(sorted(self.seen.items())),
            "hanging": self.hanging,
            "dead": errno.errorcode[self.dead] if self.dead else None,
            "error": self.last_error,
        }
        return (
            "{\n"
            + ",\n".join(f'"{key}": {_lines(each)}' for key, each in sections.items())
            + "\n}\n"
        )


def _lines(value: object) -> str:
    if not isinstance(value, list) or not value:
        return json.dumps(value)
    return "[\n " + ",\n ".join(json.dumps(each) for each in value) + "]"


def _touches(rule: Rule, operation: Operation) -> bool:
    assert rule.range is not None
    extent = extent_of(rule.range, operation.descriptor)
    if extent is None:
        return False
    start, stop = extent
    return operation.offset + operation.length > start and (stop is None or operation.offset < stop)
