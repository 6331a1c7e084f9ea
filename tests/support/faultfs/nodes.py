"""The files that the kernel knows: their numbers, names, descriptors and what sticks to them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.support.faultfs.unsynced import Unsynced

ROOT = 1
FIRST = 16
"""Numbers below are kept for the root and the control file."""


@dataclass(eq=False, slots=True)
class Handle:
    """An open descriptor of the mount: `descriptor` is the file below, `pid` who opened it."""

    descriptor: int
    node: Node
    writable: bool
    pid: int


@dataclass(eq=False, slots=True)
class Node:
    """One file or directory, with all its names relative to the source.

    `stuck` is the errno that every writing operation answers until the last of `culprits` (the
    handles that were open when it happened) is closed.  `lost`: reading answers it, too, because
    what was cached is gone.
    """

    number: int
    key: tuple[int, int]
    paths: set[str] = field(default_factory=set)
    handles: set[Handle] = field(default_factory=set)
    unsynced: Unsynced = field(default_factory=Unsynced)
    stuck: int = 0
    lost: bool = False
    culprits: set[Handle] = field(default_factory=set)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.paths))

    def stick(self, number: int, *, lost: bool) -> None:
        if not self.stuck:
            self.culprits = set(self.handles)
        if self.culprits:
            self.stuck = number
            self.lost |= lost

    def unstick(self) -> None:
        self.stuck = 0
        self.lost = False
        self.culprits.clear()

    def closed(self, handle: Handle) -> None:
        self.handles.discard(handle)
        self.culprits.discard(handle)
        if not self.culprits:
            self.unstick()


class NodeTable:
    """Files have the same number for as long as they exist, whatever the kernel forgets."""

    def __init__(self, source: str) -> None:
        self.source = source
        info = os.stat(source)
        root = Node(ROOT, (info.st_dev, info.st_ino), {""})
        self._by_number = {ROOT: root}
        self._by_key = {root.key: root}
        self._next = FIRST

    def __iter__(self) -> Iterator[Node]:
        return iter(list(self._by_number.values()))

    def __getitem__(self, number: int) -> Node:
        return self._by_number[number]

    def full(self, path: str) -> str:
        return os.path.join(self.source, path) if path else self.source

    def child(self, parent: int, name: bytes) -> str:
        """The path of a name in a directory.  Raises FileNotFoundError for a removed directory."""
        base = self.path_of(self[parent])
        return f"{base}/{os.fsdecode(name)}" if base else os.fsdecode(name)

    def path_of(self, node: Node) -> str:
        """One of its names.  Raises FileNotFoundError when it has none any more."""
        if not node.paths:
            raise FileNotFoundError(2, "unlinked")
        return min(node.paths)

    def found(self, path: str, info: os.stat_result) -> Node:
        """The node of a path that has just been looked at."""
        key = (info.st_dev, info.st_ino)
        node = self._by_key.get(key)
        if node is None:
            node = Node(self._next, key)
            self._next += 1
            self._by_key[key] = self._by_number[node.number] = node
        if path not in node.paths:
            self.removed(path, gone=False)
            node.paths.add(path)
        if len(node.paths) > 1:
            # A name may have gone without us, and its inode number been used again below.
            node.paths = {each for each in node.paths if self._is_at(each, key)}
        return node

    def _is_at(self, path: str, key: tuple[int, int]) -> bool:
        try:
            info = os.lstat(self.full(path))
        except OSError:
            return False
        return (info.st_dev, info.st_ino) == key

    def at(self, path: str) -> Node | None:
        return next((node for node in self._by_number.values() if path in node.paths), None)

    def removed(self, path: str, *, gone: bool = True) -> None:
        """A name has been unlinked; its inode number below may be used again."""
        node = self.at(path)
        if node is None:
            return
        node.paths.discard(path)
        if gone and not node.paths:
            self._by_key.pop(node.key, None)

    def exchanged(self, one: str, other: str) -> None:
        """Two names have changed places."""
        aside = f"{one}//"  # no path of a file
        self._rename(one, aside)
        self._rename(other, one)
        self._rename(aside, other)

    def moved(self, old: str, new: str) -> None:
        """A name, and all below it, has become another one."""
        self.removed(new)
        self._rename(old, new)

    def _rename(self, old: str, new: str) -> None:
        for node in self._by_number.values():
            for path in list(node.paths):
                if path == old or path.startswith(old + "/"):
                    node.paths.discard(path)
                    node.paths.add(new + path[len(old) :])
