"""The view as a mounted file system: pyfuse3 and the kernel's descriptor, and nothing decided.

pyfuse3 gets one end of a socket instead of the kernel's descriptor (libfuse takes /dev/fd/N for a
mount point).  Between the two is a `Channel`, which answers requests for the data of disks itself.
No system call here goes through the mount in the event loop's thread: it would wait for itself.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from ploopd.errors import ExitCode, PloopError
from ploopd.frontends.fuse import mount, wire
from ploopd.frontends.fuse.attributes import Attribute, ServedDevice, ServedDevices
from ploopd.frontends.fuse.channel import Channel, Handles
from ploopd.frontends.fuse.disk import Disk
from ploopd.frontends.fuse.tree import Directory, DiskFile, Link, Node, Tree, join, standby_path
from ploopd.frontends.fuse.watch import Toucher
from scst_shim import StandbyState

BATCH = 64
"""Messages taken from the kernel before others have their turn."""

CHECK_SECONDS = 10.0
UNMOUNT_SECONDS = 10.0
NAME_TIMEOUT = 1.0
"""Seconds for which the kernel may remember a name; attributes it asks for every time."""

_READY = int(select.POLLIN | select.POLLOUT)
_CHANGED = int(select.POLLPRI | select.POLLERR)
"""The events of poll(2), as kernfs has them."""
_WRITING = os.O_WRONLY | os.O_RDWR

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, eq=False)
class _OpenAttribute:
    """An attribute that a process has open: its text as of the last read from the beginning."""

    path: str
    attribute: Attribute
    text: bytes = b""
    seen: int = -1
    poll: pyfuse3.PollHandle | None = None


class FuseView:
    """The view of `devices`, which may come and go, mounted on a directory.

    `everybody`: other users may look at it; by default if the daemon is root's.
    """

    def __init__(
        self, devices: ServedDevices, mountpoint: Path, *, everybody: bool | None = None
    ) -> None:
        self.mountpoint = Path(os.path.abspath(mountpoint))
        self._devices = devices
        self._everybody = os.geteuid() == 0 if everybody is None else everybody
        self._scope = trio.CancelScope()
        self._ended: trio.Event | None = None
        self._session: _Session | None = None

    def users(self, device: ServedDevice) -> int:
        """How often the file of the device's disk is open."""
        return 0 if self._session is None else self._session.users(device)

    async def check(self) -> None:
        """Raise the `PloopError` that `serve` would raise, as far as it can be told before."""
        with trio.move_on_after(CHECK_SECONDS):
            await trio.to_thread.run_sync(mount.check, self.mountpoint, abandon_on_cancel=True)
            return
        raise PloopError(
            f"does not answer within {CHECK_SECONDS:g} s",
            path=self.mountpoint,
            field="sysfs",
            value=os.fspath(self.mountpoint),
            hint="name a directory on a local file system",
            exit_code=ExitCode.TIMEOUT,
        )

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Mount, serve until `stop`, and unmount.

        Ends early when the view is unmounted from outside.  Raises `PloopError` when it cannot be
        mounted.  Files that somebody still has open fail with ENOTCONN afterwards.
        """
        session = self._session = await self._mount()
        self._ended = ended = trio.Event()
        running = trio.CancelScope(shield=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.run, running, ended)
            log.info("event=view-mounted path=%s", self.mountpoint)
            task_status.started()
            try:
                with self._scope:
                    await ended.wait()
            finally:
                if ended.is_set():
                    log.warning("event=view-ended path=%s", self.mountpoint)
                else:
                    session.close()
                    with trio.move_on_after(UNMOUNT_SECONDS, shield=True):
                        await self._unmount()
                running.cancel()

    async def stop(self) -> None:
        """Unmount, from under those who use it if need be, and wait for that."""
        self._scope.cancel()
        if self._ended is not None:
            await self._ended.wait()

    async def _mount(self) -> _Session:
        # Not to be abandoned: a mount that nobody serves would hang whoever looks at it.
        kernel = await trio.to_thread.run_sync(
            partial(mount.mount, self.mountpoint, everybody=self._everybody)
        )
        try:
            return _Session(self._devices, self.mountpoint, kernel)
        except RuntimeError as error:
            os.close(kernel)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(mount.unmount, self.mountpoint)
            raise PloopError(
                f"libfuse does not serve it: {error}",
                path=self.mountpoint,
                hint="it must be libfuse 3.3 or later",
            ) from error

    async def _unmount(self) -> None:
        try:
            alone = await trio.to_thread.run_sync(
                mount.unmount, self.mountpoint, abandon_on_cancel=True
            )
        except PloopError as error:
            log.warning("event=view-unmount-failed path=%s error=%r", self.mountpoint, str(error))
            return
        if not alone:
            log.warning("event=view-still-used path=%s", self.mountpoint)


class _Session:
    """One mount, from its descriptor to its end."""

    def __init__(self, devices: ServedDevices, mountpoint: Path, kernel: int) -> None:
        self._devices = devices
        self._shown: dict[ServedDevice, Callable[[], None]] = {}
        self._kernel = kernel
        self._handles = Handles()
        self._channel = Channel(handles=self._handles, to_kernel=self._to_kernel)
        self._toucher = Toucher(mountpoint)
        self._nursery: trio.Nursery | None = None
        self._closed = False
        self._sendable = trio.Event()
        self._operations = _Operations(self._shown, self._handles)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.setblocking(False)
        pyfuse3.init(self._operations, f"/dev/fd/{theirs.detach()}", set())
        self._library = trio.socket.from_stdlib_socket(ours)

    async def run(self, scope: trio.CancelScope, ended: trio.Event) -> None:
        """Serve until the kernel says that it is unmounted, or `scope` is cancelled."""
        self._devices_changed()
        unwatch = self._devices.watch(self._devices_changed)
        try:
            with scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(pyfuse3.main)
                    nursery.start_soon(self._to_library)
                    nursery.start_soon(self._from_library)
                    nursery.start_soon(self._toucher.run)
                    await self._from_kernel()
                    nursery.cancel_scope.cancel()
        except Exception:  # the disks go on without the view
            log.exception("event=view-failed")
        finally:
            ended.set()
            self._nursery = None
            self._closed = True
            unwatch()
            for device in tuple(self._shown):
                self._hide(device)
            self._library.close()
            pyfuse3.close(unmount=False)
            os.close(self._kernel)

    def close(self) -> None:
        """Answer what is parked: processes that wait for it must not keep the mount busy."""
        self._operations.closing = True
        self._channel.close()

    def users(self, device: ServedDevice) -> int:
        """How often the file of the device's disk is open."""
        disk = self._operations.disks.get(device.name)
        return 0 if disk is None else self._handles.count(disk)

    def _devices_changed(self) -> None:
        """Show the devices that have come; those that have gone are not there any more."""
        now = list(self._devices)
        for device in [each for each in self._shown if each not in now]:
            self._hide(device)
        for device in now:
            if device not in self._shown:
                device.bind()
                self._shown[device] = self._watch(device)
                self._operations.disks[device.name] = Disk(device, later=self._later)

    def _hide(self, device: ServedDevice) -> None:
        self._shown.pop(device)()
        self._handles.forget(self._operations.disks.pop(device.name))
        if not self._closed:
            self._operations.changed(standby_path(device.name))
        device.unbind()

    def _watch(self, device: ServedDevice) -> Callable[[], None]:
        def changed(state: StandbyState) -> None:
            path = standby_path(device.name)
            self._operations.changed(path)
            self._toucher.changed(path)

        return device.gate.flags.watcher.subscribe(changed)

    # -- messages --------------------------------------------------------------------------

    async def _from_kernel(self) -> None:
        """Take what has arrived, answer what can be answered, start the rest; until unmounted."""
        memory = memoryview(bytearray(wire.MESSAGE_SIZE))
        channel = self._channel
        while True:
            await trio.lowlevel.wait_readable(self._kernel)
            for _ in range(BATCH):
                try:
                    length = os.readv(self._kernel, [memory])
                except BlockingIOError:
                    break
                except InterruptedError:
                    continue
                except OSError as error:
                    if error.errno == errno.ENOENT:  # was interrupted before it was read
                        continue
                    if error.errno == errno.ENODEV:
                        return
                    raise
                channel.from_kernel(memory[:length])
            channel.kick()
            if channel.queue:
                self._sendable.set()

    def _to_kernel(self, pieces: Sequence[bytes | bytearray | memoryview]) -> None:
        if self._closed:
            return
        try:
            os.writev(self._kernel, pieces)
        except OSError as error:
            # ENOENT: nobody waits for it any more; ENODEV: unmounted.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                log.warning("event=view-answer-failed error=%r", str(error))

    async def _to_library(self) -> None:
        while True:
            await self._sendable.wait()
            self._sendable = trio.Event()
            while self._channel.may_send():
                await self._library.send(self._channel.sent())

    async def _from_library(self) -> None:
        while answer := bytearray(await self._library.recv(wire.MESSAGE_SIZE)):
            self._channel.from_library(answer)
            if self._channel.may_send():
                self._sendable.set()

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        async def wait() -> None:
            await trio.sleep(seconds)
            call()

        if self._nursery is not None:
            self._nursery.start_soon(wait)


class _Operations(pyfuse3.Operations):
    """The tree, as pyfuse3 asks for it."""

    def __init__(
        self,
        devices: Iterable[ServedDevice],
        handles: Handles,
    ) -> None:
        super().__init__()
        self.closing = False
        self._tree = Tree(lambda: devices)
        self.disks: dict[str, Disk] = {}
        self._disk_handles = handles
        self._open: dict[int, _OpenAttribute] = {}
        self._directories: dict[int, list[tuple[str, str, Node]]] = {}
        self._next = 0
        self._changes: dict[str, int] = {}
        self._times: dict[str, int] = {}
        self._started = time.time_ns()

    # -- change ----------------------------------------------------------------------------

    def changed(self, path: str) -> None:
        """The attribute at `path` reads differently: wake who polls it."""
        self._changes[path] = self._changes.get(path, 0) + 1
        self._times[path] = time.time_ns()
        for opened in self._open.values():
            if opened.path == path and opened.poll is not None:
                handle, opened.poll = opened.poll, None
                handle.notify()

    async def poll(self, inode: int, fh: int, poll_handle: Any, ctx: Any) -> int:
        opened = self._open.get(fh)
        if opened is None:
            return _READY
        opened.poll = poll_handle
        changed = opened.seen != self._changes.get(opened.path, 0)
        return _READY | _CHANGED if changed else _READY

    # -- names and attributes --------------------------------------------------------------

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> Any:
        directory = self._path(parent_inode)
        text = os.fsdecode(name)
        if text == ".":
            path = directory
        elif text == "..":
            path = directory.rpartition("/")[0]
        else:
            path = join(directory, text)
        return self._entry(path)

    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        return self._entry(self._path(inode))

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: Any, ctx: Any) -> Any:
        """Times may be set, which changes nothing; a size only to what it is."""
        path = self._path(inode)
        node = self._node(path)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise pyfuse3.FUSEError(errno.EPERM)
        if fields.update_size and isinstance(node, DiskFile) and attr.st_size != node.device.size:
            raise pyfuse3.FUSEError(errno.EINVAL)
        return self._entry(path)

    async def readlink(self, inode: int, ctx: Any) -> bytes:
        node = self._node(self._path(inode))
        if not isinstance(node, Link):
            raise pyfuse3.FUSEError(errno.EINVAL)
        return os.fsencode(node.target)

    async def statfs(self, ctx: Any) -> Any:
        reply = pyfuse3.StatvfsData()
        reply.f_bsize = reply.f_frsize = 4096
        reply.f_namemax = 255
        return reply

    # -- directories -----------------------------------------------------------------------

    async def opendir(self, inode: int, ctx: Any) -> int:
        path = self._path(inode)
        node = self._node(path)
        if not isinstance(node, Directory):
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        handle = self._handle()
        entries = sorted(node.entries.items())
        self._directories[handle] = [(name, join(path, name), each) for name, each in entries]
        return handle

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        for number, (name, path, node) in enumerate(self._directories[fh][start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(
                token, os.fsencode(name), self._as_entry(path, node), number
            ):
                return

    async def releasedir(self, fh: int) -> None:
        del self._directories[fh]

    # -- files -----------------------------------------------------------------------------

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        if self.closing:
            raise pyfuse3.FUSEError(errno.ENODEV)
        path = self._path(inode)
        node = self._node(path)
        if isinstance(node, DiskFile):
            disk = self.disks[node.device.name]
            if flags & _WRITING and not disk.writable:
                raise pyfuse3.FUSEError(errno.EROFS)
            handle = self._disk_handles.open(disk)
            return pyfuse3.FileInfo(fh=handle, direct_io=True, keep_cache=False)
        if not isinstance(node, Attribute):
            raise pyfuse3.FUSEError(errno.EISDIR)
        if flags & _WRITING and node.store is None:
            raise pyfuse3.FUSEError(errno.EACCES)  # as sysfs says, even to root
        handle = self._handle()
        self._open[handle] = _OpenAttribute(path=path, attribute=node)
        return pyfuse3.FileInfo(fh=handle, direct_io=True, keep_cache=False)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        opened = self._open[fh]
        if off == 0:
            opened.seen = self._changes.get(opened.path, 0)
            opened.text = self._show(opened).encode("utf-8", "surrogateescape")
        return opened.text[off : off + size]

    def _show(self, opened: _OpenAttribute) -> str:
        node = self._tree.find(opened.path)
        if not isinstance(node, Attribute):
            raise pyfuse3.FUSEError(errno.ENODEV)
        try:
            return node.show()
        except Exception as error:
            log.exception("event=attribute-failed path=%s", opened.path)
            raise pyfuse3.FUSEError(errno.EIO) from error

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        opened = self._open[fh]
        if opened.attribute.store is None:
            raise pyfuse3.FUSEError(errno.EACCES)
        if self._tree.find(opened.path) is None:
            raise pyfuse3.FUSEError(errno.ENODEV)
        if off:
            raise pyfuse3.FUSEError(errno.EINVAL)
        try:
            opened.attribute.store(buf.decode())
        except (ValueError, PloopError) as error:
            log.warning("event=attribute-refused path=%s error=%r", opened.path, str(error))
            raise pyfuse3.FUSEError(errno.EINVAL) from error
        log.info(
            "event=attribute-set path=%s value=%r", opened.path, opened.attribute.show().strip()
        )
        return len(buf)

    async def release(self, fh: int) -> None:
        if fh in self._disk_handles:
            self._disk_handles.close(fh)
        else:
            self._open.pop(fh, None)

    # -- help ------------------------------------------------------------------------------

    def _handle(self) -> int:
        self._next += 1
        return self._next

    def _path(self, inode: int) -> str:
        path = self._tree.path(inode)
        if path is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return path

    def _node(self, path: str) -> Node:
        node = self._tree.find(path)
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return node

    def _entry(self, path: str) -> Any:
        return self._as_entry(path, self._node(path))

    def _as_entry(self, path: str, node: Node) -> Any:
        status = self._tree.status(path, node)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = status.inode
        entry.st_mode = status.mode
        entry.st_size = status.size
        entry.st_blocks = status.blocks
        entry.st_nlink = status.links
        entry.st_uid, entry.st_gid = os.geteuid(), os.getegid()
        when = self._times.get(path, self._started)
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = when
        entry.st_blksize = 1 << 17 if stat.S_ISREG(status.mode) and status.blocks else 4096
        entry.entry_timeout, entry.attr_timeout = NAME_TIMEOUT, 0
        return entry
