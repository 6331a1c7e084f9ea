"""The tree of the view: directories, links, attributes and disks, as a function of the devices.

Pure: nothing here knows FUSE.  The shape is that of sysfs: `block/<device>` is a symbolic link into
`devices/virtual/block/`, an attribute is a file of 4096 bytes whose content is shorter.  Inode
numbers are made from paths, so that a path has the same one for ever.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b

from ploopd.frontends.fuse.attributes import Attribute, Group, ServedDevice, device_group

ROOT = ""
ROOT_INODE = 1
ATTRIBUTE_SIZE = 4096
"""What sysfs says of every attribute: a page."""

BLOCK = "block"
VIRTUAL = "devices/virtual/block"
DISK = "disk"
STANDBY = "queue/standby"
SECTOR = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """Names and what they stand for, made when they are asked for."""

    make: Callable[[], Mapping[str, Node]]

    @property
    def entries(self) -> Mapping[str, Node]:
        return self.make()


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A symbolic link."""

    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFile:
    """The content of a device's disk as one file."""

    device: ServedDevice


Node = Directory | Link | DiskFile | Attribute


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What stat(2) tells: `mode` with the type, `size` in bytes, `blocks` of 512 bytes."""

    inode: int
    mode: int
    size: int = 0
    blocks: int = 0
    links: int = 1


def standby_path(device: str) -> str:
    """The path of a device's standby attribute, without a link in it."""
    return f"{VIRTUAL}/{device}/{STANDBY}"


def inode_number(path: str) -> int:
    """The inode number of `path` (no leading slash): made from its hash, and never the root's."""
    if path == ROOT:
        return ROOT_INODE
    digest = blake2b(path.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2 | 1 << 62


def join(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory else name


class Tree:
    """The nodes by path and by inode number; `devices()` are those there are now."""

    def __init__(self, devices: Callable[[], Iterable[ServedDevice]]) -> None:
        self._devices = devices
        self._paths: dict[int, str] = {ROOT_INODE: ROOT}

    def inode(self, path: str) -> int:
        """The inode number of a path that exists; `path` finds it again by that number."""
        number = inode_number(path)
        self._paths[number] = path
        return number

    def path(self, inode: int) -> str | None:
        """The path whose number was given out, None for a number that never was."""
        return self._paths.get(inode)

    def find(self, path: str) -> Node | None:
        """The node at `path`, None where there is nothing (any more)."""
        node: Node = self._root()
        for name in path.split("/") if path else ():
            if not isinstance(node, Directory):
                return None
            found = node.entries.get(name)
            if found is None:
                return None
            node = found
        return node

    def status(self, path: str, node: Node) -> Status:
        """The attributes of `node`, which is at `path`."""
        inode = self.inode(path)
        match node:
            case Directory():
                below = sum(isinstance(each, Directory) for each in node.entries.values())
                return Status(inode=inode, mode=stat.S_IFDIR | 0o755, links=2 + below)
            case Link():
                return Status(inode=inode, mode=stat.S_IFLNK | 0o777, size=len(node.target))
            case DiskFile():
                return _disk_status(inode, node.device)
            case Attribute():
                mode = 0o444 if node.store is None else 0o644
                return Status(inode=inode, mode=stat.S_IFREG | mode, size=ATTRIBUTE_SIZE)

    def _root(self) -> Directory:
        virtual = {"virtual": Directory(make=lambda: {"block": Directory(make=self._groups)})}
        return Directory(
            make=lambda: {
                BLOCK: Directory(make=self._links),
                "devices": Directory(make=lambda: virtual),
                DISK: Directory(make=self._disks),
            }
        )

    def _links(self) -> Mapping[str, Node]:
        return {each.name: Link(target=f"../{VIRTUAL}/{each.name}") for each in self._devices()}

    def _groups(self) -> Mapping[str, Node]:
        return {each.name: _device_directory(each) for each in self._devices()}

    def _disks(self) -> Mapping[str, Node]:
        return {each.name: DiskFile(device=each) for each in self._devices()}


def _device_directory(device: ServedDevice) -> Directory:
    return Directory(make=lambda: _nodes(device_group(device)))


def _nodes(group: Group) -> Mapping[str, Node]:
    return {name: _node(each) for name, each in group.items()}


def _node(each: Attribute | Group) -> Node:
    return each if isinstance(each, Attribute) else Directory(make=lambda: _nodes(each))


def _disk_status(inode: int, device: ServedDevice) -> Status:
    """Like a disk's device node it is for its owner only: attributes tell nothing secret, but this
    is the data."""
    mode = 0o400 if device.unit.write_protection() is not None else 0o600
    return Status(
        inode=inode,
        mode=stat.S_IFREG | mode,
        size=device.size,
        blocks=device.volume.mapped_bytes() // SECTOR,
    )
