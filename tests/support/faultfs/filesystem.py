"""The mounted tree: every operation asks the faults first, then does the same to the source."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from typing import Any

import pyfuse3
import trio

from tests.support.faultfs.faults import Faults, Operation
from tests.support.faultfs.nodes import ROOT, Handle, Node, NodeTable
from tests.support.faultfs.script import Rule, ScriptError

CONTROL = b".faultfs"
CONTROL_NUMBER = 2
_CONTROL_HANDLES = 1 << 40
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def as_fuse_error() -> Iterator[None]:
    """OSError → the error that FUSE sends to the kernel."""
    try:
        yield
    except OSError as error:
        raise pyfuse3.FUSEError(error.errno or errno.EIO) from error


class FaultFileSystem(pyfuse3.Operations):
    """Passes through to `source`; files are opened with direct I/O, so no cache answers."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.nodes = NodeTable(source)
        self.faults = Faults(self.nodes)
        self._handles: dict[int, Handle] = {}
        self._listings: dict[int, tuple[Node, list[str]]] = {}
        self._reports: dict[int, bytes] = {}
        self._next_number = _CONTROL_HANDLES

    def _node(self, inode: int) -> Node:
        if inode == CONTROL_NUMBER:
            raise pyfuse3.FUSEError(errno.EPERM)
        return self.nodes[inode]

    def _number(self) -> int:
        self._next_number += 1
        return self._next_number

    async def _meet(self, name: str, node: Node, *paths: str) -> Rule | None:
        return await self.faults.meet(Operation(name, node.names + paths, node))

    async def _meet_name(self, name: str, *paths: str) -> None:
        await self.faults.meet(Operation(name, paths))

    # -- names and attributes --------------------------------------------------------------

    def _entry(self, node: Node, info: os.stat_result) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = node.number
        for name in ("mode", "nlink", "uid", "gid", "rdev", "size", "blocks", "blksize"):
            setattr(entry, f"st_{name}", getattr(info, f"st_{name}"))
        for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            setattr(entry, name, getattr(info, name))
        entry.st_size = max(info.st_size, node.unsynced.end)
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    def _control_entry(self) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = CONTROL_NUMBER
        entry.st_mode = stat.S_IFREG | 0o600
        entry.st_nlink, entry.st_uid, entry.st_gid = 1, os.geteuid(), os.getegid()
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    def _look(self, path: str) -> pyfuse3.EntryAttributes:
        info = os.lstat(self.nodes.full(path))
        return self._entry(self.nodes.found(path, info), info)

    def _status(self, node: Node) -> os.stat_result:
        for handle in node.handles:
            return os.fstat(handle.descriptor)
        return os.lstat(self._full(node))

    def _full(self, node: Node) -> str:
        return self.nodes.full(self.nodes.path_of(node))

    async def lookup(self, parent: int, name: bytes, ctx: Any = None) -> Any:
        if parent == ROOT and name == CONTROL:
            return self._control_entry()
        with as_fuse_error():
            path = self.nodes.child(parent, name)
            await self._meet_name("lookup", path)
            return self._look(path)

    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        if inode == CONTROL_NUMBER:
            return self._control_entry()
        node = self._node(inode)
        with as_fuse_error():
            await self._meet("getattr", node)
            return self._entry(node, self._status(node))

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: Any, ctx: Any) -> Any:
        if inode == CONTROL_NUMBER:  # opened with O_TRUNC, as `>` does
            return self._control_entry()
        node = self._node(inode)
        with as_fuse_error():
            if fields.update_size:
                await self._meet("truncate", node)
                self._truncate(node, attr.st_size)
            rest = ("mode", "uid", "gid", "atime", "mtime")
            if any(getattr(fields, f"update_{name}") for name in rest):
                await self._meet("setattr", node)
                self._set_attributes(node, attr, fields)
            return self._entry(node, self._status(node))

    def _truncate(self, node: Node, size: int) -> None:
        descriptor = self.faults.open_below(node)
        if descriptor is None:
            raise FileNotFoundError(errno.ENOENT, "unlinked")
        try:
            os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)
        node.unsynced.truncate(size)

    def _set_attributes(self, node: Node, attr: Any, fields: Any) -> None:
        handle = next(iter(node.handles), None)
        where = self._full(node) if handle is None else f"/proc/self/fd/{handle.descriptor}"
        follow = handle is not None
        if fields.update_mode:
            os.chmod(where, stat.S_IMODE(attr.st_mode))
        if fields.update_uid or fields.update_gid:
            user = attr.st_uid if fields.update_uid else -1
            os.chown(where, user, attr.st_gid if fields.update_gid else -1, follow_symlinks=follow)
        if fields.update_atime or fields.update_mtime:
            now = os.stat(where, follow_symlinks=follow)
            accessed = attr.st_atime_ns if fields.update_atime else now.st_atime_ns
            modified = attr.st_mtime_ns if fields.update_mtime else now.st_mtime_ns
            os.utime(where, ns=(accessed, modified), follow_symlinks=follow)

    # -- open files ------------------------------------------------------------------------

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        if inode == CONTROL_NUMBER:
            number = self._number()
            self._reports[number] = self.faults.report().encode()
            return pyfuse3.FileInfo(fh=number, direct_io=True)
        node = self._node(inode)
        with as_fuse_error():
            await self._meet("open", node)
            if flags & os.O_TRUNC:
                await self._meet("truncate", node)
                node.unsynced.truncate(0)
            return self._opened(self._full(node), node, flags, ctx.pid)

    def _opened(self, full: str, node: Node | None, flags: int, pid: int) -> pyfuse3.FileInfo:
        """A handle; reading is always possible below, because pages may have to be filled."""
        mode = os.O_RDONLY if flags & os.O_ACCMODE == os.O_RDONLY else os.O_RDWR
        below = flags & (os.O_TRUNC | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
        descriptor = os.open(full, mode | below | os.O_CLOEXEC, 0o600)
        if node is None:
            node = self.nodes.found(os.path.relpath(full, self.nodes.source), os.fstat(descriptor))
        handle = Handle(descriptor, node, mode == os.O_RDWR, pid)
        node.handles.add(handle)
        self._handles[descriptor] = handle
        return pyfuse3.FileInfo(fh=descriptor, direct_io=True)

    async def create(self, parent: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        with as_fuse_error():
            path = self.nodes.child(parent, name)
            await self._meet_name("create", path)
            info = self._opened(self.nodes.full(path), None, flags | os.O_CREAT, ctx.pid)
            os.fchmod(info.fh, stat.S_IMODE(mode & ~ctx.umask))
            return info, self._look(path)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        if fh in self._reports:
            return self._reports[fh][off : off + size]
        handle = self._handles[fh]
        node = handle.node
        with as_fuse_error():
            rule = await self._meet_data("read", handle, off, size)
            if rule is not None and rule.short is not None:
                size = min(size, rule.short)
            if node.unsynced.pages:
                return node.unsynced.read(fh, off, size)
            return os.pread(fh, size, off)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        if fh in self._reports:
            return self._control(buf)
        handle = self._handles[fh]
        node = handle.node
        with as_fuse_error():
            rule = await self._meet_data("write", handle, off, len(buf))
            if rule is not None and rule.short is not None:
                buf = buf[: rule.short]
            cache = self.faults.cache_of(node)
            if cache is None and not node.unsynced.pages:
                return os.pwrite(fh, buf, off)
            if cache is not None:
                cache.matched += 1
                cache.hits += 1
            node.unsynced.write(fh, off, buf)
            self.faults.written()
            return len(buf)

    def _control(self, text: bytes) -> int:
        try:
            self.faults.execute(text.decode(errors="replace"))
        except ScriptError as error:
            raise pyfuse3.FUSEError(errno.EINVAL) from error
        except OSError as error:
            self.faults.last_error = str(error)
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from error
        return len(text)

    async def _meet_data(self, name: str, handle: Handle, offset: int, length: int) -> Rule | None:
        node = handle.node
        return await self.faults.meet(
            Operation(name, node.names, node, handle.descriptor, offset, length)
        )

    async def fsync(self, fh: int, datasync: bool) -> None:
        if fh in self._reports:
            return
        node = self._handles[fh].node
        with as_fuse_error():
            await self._meet("fsync", node)
            if node.unsynced.pages:
                cache = self.faults.cache_of(node)
                if cache is not None and cache.rule.cache == "lie":
                    return
                node.unsynced.write_back(fh)
            await trio.to_thread.run_sync(os.fdatasync if datasync else os.fsync, fh)

    async def flush(self, fh: int) -> None:
        if fh in self._reports:
            return
        with as_fuse_error():
            await self._meet("flush", self._handles[fh].node)

    async def release(self, fh: int) -> None:
        if self._reports.pop(fh, None) is not None:
            return
        handle = self._handles[fh]
        try:
            with as_fuse_error():
                await self._meet("release", handle.node)
        finally:
            del self._handles[fh]
            if len(handle.node.handles) == 1 and not handle.node.paths:
                handle.node.unsynced.forget()
            handle.node.closed(handle)
            os.close(fh)

    # -- directories -----------------------------------------------------------------------

    async def opendir(self, inode: int, ctx: Any) -> int:
        node = self._node(inode)
        with as_fuse_error():
            await self._meet("readdir", node)
            number = self._number()
            self._listings[number] = (node, sorted(os.listdir(self._full(node))))
            return number

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        node, names = self._listings[fh]
        with as_fuse_error():
            self.faults.require_alive()
            base = self.nodes.path_of(node)
        for number, name in enumerate(names[start_id:], start_id + 1):
            path = f"{base}/{name}" if base else name
            try:
                entry = self._look(path)
            except FileNotFoundError:
                continue
            if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, number):
                return

    async def releasedir(self, fh: int) -> None:
        del self._listings[fh]

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        node, _ = self._listings[fh]
        with as_fuse_error():
            await self._meet("fsyncdir", node)
            descriptor = os.open(self._full(node), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: Any) -> Any:
        with as_fuse_error():
            path = self.nodes.child(parent, name)
            await self._meet_name("mkdir", path)
            os.mkdir(self.nodes.full(path), mode & ~ctx.umask)
            return self._look(path)

    async def rmdir(self, parent: int, name: bytes, ctx: Any) -> None:
        with as_fuse_error():
            path = self.nodes.child(parent, name)
            await self._meet_name("rmdir", path)
            os.rmdir(self.nodes.full(path))
            self.nodes.removed(path)

    async def unlink(self, parent: int, name: bytes, ctx: Any) -> None:
        with as_fuse_error():
            path = self.nodes.child(parent, name)
            await self._meet_name("unlink", path)
            os.unlink(self.nodes.full(path))
            self.nodes.removed(path)

    async def rename(
        self, old: int, name: bytes, new: int, new_name: bytes, flags: int, ctx: Any
    ) -> None:
        with as_fuse_error():
            before, after = self.nodes.child(old, name), self.nodes.child(new, new_name)
            await self._meet_name("rename", before, after)
            paths = [os.fsencode(self.nodes.full(path)) for path in (before, after)]
            if _libc.renameat2(-100, paths[0], -100, paths[1], flags):
                raise OSError(ctypes.get_errno(), "renameat2")
            if flags & pyfuse3.RENAME_EXCHANGE:
                self.nodes.exchanged(before, after)
            else:
                self.nodes.moved(before, after)

    async def link(self, inode: int, new: int, new_name: bytes, ctx: Any) -> Any:
        with as_fuse_error():
            path = self.nodes.child(new, new_name)
            await self._meet_name("link", path)
            target = self.nodes.full(path)
            os.link(self._full(self._node(inode)), target, follow_symlinks=False)
            return self._look(path)

    async def symlink(self, parent: int, name: bytes, target: bytes, ctx: Any) -> Any:
        with as_fuse_error():
            path = self.nodes.child(parent, name)
            await self._meet_name("symlink", path)
            os.symlink(target, self.nodes.full(path))
            return self._look(path)

    async def readlink(self, inode: int, ctx: Any) -> bytes:
        node = self._node(inode)
        with as_fuse_error():
            await self._meet("readlink", node)
            return os.fsencode(os.readlink(self._full(node)))

    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, ctx: Any) -> Any:
        with as_fuse_error():
            path = self.nodes.child(parent, name)
            await self._meet_name("mknod", path)
            os.mknod(self.nodes.full(path), mode & ~ctx.umask, rdev)
            return self._look(path)

    # -- the rest --------------------------------------------------------------------------

    async def statfs(self, ctx: Any) -> Any:
        with as_fuse_error():
            await self._meet("statfs", self.nodes[ROOT])
            info = os.statvfs(self.nodes.source)
        reply = pyfuse3.StatvfsData()
        for name in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail"):
            setattr(reply, f"f_{name}", getattr(info, f"f_{name}"))
        reply.f_namemax = info.f_namemax
        return reply

    def write_back(self) -> None:
        """At an orderly end a client writes what it has."""
        self.faults.execute("sync")
