"""A pass-through FUSE file system whose operations fail, wait or hang on demand.

It runs as its own process (`python -m tests.support.faultfs SOURCE MOUNTPOINT SOCKET`), shows the
files of SOURCE under MOUNTPOINT and takes rules, one JSON object per line, on a Unix socket.
`FaultFs` starts it and speaks to it.  Files are opened with direct I/O, so that the kernel's cache
answers nothing by itself.

FUSE has no fallocate in pyfuse3: it answers EOPNOTSUPP, as many network file systems do.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import pyfuse3
import trio

OPERATIONS = frozenset(
    {"read", "write", "fsync", "flush", "truncate", "open", "release", "getattr", "create"}
)


@dataclass(slots=True, kw_only=True)
class Rule:
    """What happens to matching operations: after `skip` of them, to `times` (None: all)."""

    path: str
    operations: frozenset[str]
    errno: int = 0
    skip: int = 0
    times: int | None = None
    delay: float = 0.0
    hang: bool = False
    hits: int = 0
    released: trio.Event = field(default_factory=trio.Event)

    def applies(self, path: str, operation: str) -> bool:
        """Count a matching operation and say whether the rule concerns it."""
        if operation not in self.operations or not fnmatch.fnmatchcase(path, self.path):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.times is not None and self.hits >= self.times:
            return False
        self.hits += 1
        return True


class Faults:
    """The rules in force and what has been seen."""

    def __init__(self) -> None:
        self.rules: list[Rule] = []
        self.seen: Counter[str] = Counter()
        self.hanging = 0

    async def apply(self, path: str, operation: str) -> None:
        """Wait, hang or raise FUSEError as the first matching rule says."""
        self.seen[operation] += 1
        for rule in self.rules:
            if not rule.applies(path, operation):
                continue
            if rule.delay:
                await trio.sleep(rule.delay)
            if rule.hang:
                self.hanging += 1
                try:
                    await rule.released.wait()
                finally:
                    self.hanging -= 1
            if rule.errno:
                raise pyfuse3.FUSEError(rule.errno)
            return

    def clear(self) -> None:
        for rule in self.rules:
            rule.released.set()
        self.rules.clear()

    def command(self, request: dict[str, Any]) -> dict[str, Any]:
        """One line of the control socket."""
        if request["do"] == "add":
            rule = dict(request["rule"])
            rule["operations"] = frozenset(rule["operations"])
            self.rules.append(Rule(**rule))
        elif request["do"] == "clear":
            self.clear()
        return {
            "seen": dict(self.seen),
            "hits": [rule.hits for rule in self.rules],
            "hanging": self.hanging,
        }


class PassThrough(pyfuse3.Operations):
    """Names and handles of the mounted tree; every operation asks the rules first."""

    def __init__(self, source: str, faults: Faults) -> None:
        super().__init__()
        self.faults = faults
        self.source = source
        self._paths: dict[int, str] = {pyfuse3.ROOT_INODE: ""}
        self._inodes: dict[str, int] = {"": pyfuse3.ROOT_INODE}
        self._handles: dict[int, str] = {}

    def _inode(self, path: str) -> int:
        number = self._inodes.get(path)
        if number is None:
            number = max(self._paths) + 1
            self._inodes[path] = number
            self._paths[number] = path
        return number

    def _full(self, path: str) -> str:
        return os.path.join(self.source, path) if path else self.source

    def _child(self, parent: int, name: bytes) -> str:
        base = self._paths[parent]
        child = os.fsdecode(name)
        return f"{base}/{child}" if base else child

    def _attributes(self, path: str) -> pyfuse3.EntryAttributes:
        with as_fuse_error():
            info = os.lstat(self._full(path))
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = self._inode(path)
        for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size"):
            setattr(entry, name, getattr(info, name))
        for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
            setattr(entry, name, getattr(info, name))
        entry.st_blksize = 4096
        entry.st_blocks = info.st_blocks
        entry.entry_timeout = 0
        entry.attr_timeout = 0
        return entry

    async def lookup(self, parent: int, name: bytes, ctx: Any = None) -> Any:
        path = self._paths[parent] if name == b"." else self._child(parent, name)
        return self._attributes(path)

    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        path = self._paths[inode]
        await self.faults.apply(path, "getattr")
        return self._attributes(path)

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: Any, ctx: Any) -> Any:
        path = self._paths[inode]
        if fields.update_size:
            await self.faults.apply(path, "truncate")
            with as_fuse_error():
                os.truncate(self._full(path), attr.st_size)
        if fields.update_mode:
            with as_fuse_error():
                os.chmod(self._full(path), stat.S_IMODE(attr.st_mode))
        return self._attributes(path)

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        path = self._paths[inode]
        await self.faults.apply(path, "open")
        return self._opened(path, flags & ~(os.O_DIRECT | os.O_APPEND))

    def _opened(self, path: str, flags: int, mode: int = 0o600) -> Any:
        with as_fuse_error():
            handle = os.open(self._full(path), flags | os.O_CLOEXEC, mode)
        self._handles[handle] = path
        return pyfuse3.FileInfo(fh=handle, direct_io=True)

    async def create(self, parent: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        path = self._child(parent, name)
        await self.faults.apply(path, "create")
        info = self._opened(path, (flags & ~os.O_DIRECT) | os.O_CREAT, mode)
        return info, self._attributes(path)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        await self.faults.apply(self._handles[fh], "read")
        with as_fuse_error():
            return os.pread(fh, size, off)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        await self.faults.apply(self._handles[fh], "write")
        with as_fuse_error():
            return os.pwrite(fh, buf, off)

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self.faults.apply(self._handles[fh], "fsync")
        with as_fuse_error():
            os.fdatasync(fh)

    async def flush(self, fh: int) -> None:
        await self.faults.apply(self._handles[fh], "flush")

    async def release(self, fh: int) -> None:
        path = self._handles.pop(fh)
        os.close(fh)
        await self.faults.apply(path, "release")

    async def unlink(self, parent: int, name: bytes, ctx: Any) -> None:
        path = self._child(parent, name)
        with as_fuse_error():
            os.unlink(self._full(path))
        self._paths.pop(self._inodes.pop(path, 0), None)

    async def rename(
        self, old: int, name: bytes, new: int, new_name: bytes, flags: int, ctx: Any
    ) -> None:
        before, after = self._child(old, name), self._child(new, new_name)
        with as_fuse_error():
            os.rename(self._full(before), self._full(after))
        inode = self._inodes.pop(before, None)
        self._inodes.pop(after, None)
        if inode is not None:
            self._paths[inode] = after
            self._inodes[after] = inode

    async def opendir(self, inode: int, ctx: Any) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        base = self._paths[fh]
        names = sorted(os.listdir(self._full(base)))
        for number, name in enumerate(names[start_id:], start_id + 1):
            path = f"{base}/{name}" if base else name
            if not pyfuse3.readdir_reply(token, os.fsencode(name), self._attributes(path), number):
                return

    async def statfs(self, ctx: Any) -> Any:
        info = os.statvfs(self.source)
        reply = pyfuse3.StatvfsData()
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files"):
            setattr(reply, name, getattr(info, name))
        reply.f_ffree, reply.f_favail, reply.f_namemax = info.f_ffree, info.f_favail, 255
        return reply


@contextlib.contextmanager
def as_fuse_error() -> Any:
    """OSError → the error that FUSE sends to the kernel."""
    try:
        yield
    except OSError as error:
        raise pyfuse3.FUSEError(error.errno or errno.EIO) from error


async def serve_control(path: str, faults: Faults) -> None:
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listener.bind(path)
    listener.listen()

    async def session(stream: trio.SocketStream) -> None:
        await control_session(stream, faults)

    await trio.serve_listeners(session, [trio.SocketListener(listener)])


async def control_session(stream: trio.SocketStream, faults: Faults) -> None:
    buffer = b""
    while chunk := await stream.receive_some(65536):
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            await stream.send_all(json.dumps(faults.command(json.loads(line))).encode() + b"\n")


async def serve(control: str, faults: Faults) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_control, control, faults)
        await pyfuse3.main(min_tasks=1, max_tasks=256)
        nursery.cancel_scope.cancel()


def main(source: str, mountpoint: str, control: str) -> None:
    faults = Faults()
    options = set(pyfuse3.default_options) | {"fsname=faultfs"}
    options.discard("default_permissions")
    pyfuse3.init(PassThrough(source, faults), mountpoint, options)
    try:
        trio.run(serve, control, faults)
    finally:
        pyfuse3.close()


class FaultFs:
    """The file system as tests use it: a context manager around the process.

    `mountpoint` shows the files of `source`.  Paths in rules are globs relative to `source`.
    """

    def __init__(self, source: Path, mountpoint: Path) -> None:
        self.source = source
        self.mountpoint = mountpoint
        self._directory = Path(tempfile.mkdtemp(prefix="faultfs."))
        self._control = self._directory / "control"
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def __enter__(self) -> FaultFs:
        self.mountpoint.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "tests.support.faultfs", str(self.source)]
        self._process = subprocess.Popen(
            [*command, str(self.mountpoint), str(self._control)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=Path(__file__).resolve().parents[2],
        )
        deadline = time.monotonic() + 20
        while not self._connect():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise RuntimeError(f"faultfs does not mount: {self._process.poll()}")
            time.sleep(0.02)
        return self

    def _connect(self) -> bool:
        if not self._control.exists() or not os.path.ismount(self.mountpoint):
            return False
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(self._control))
        except ConnectionRefusedError:  # between its bind and its listen
            connection.close()
            return False
        connection.settimeout(10)
        self._socket = connection
        return True

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._socket is not None
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        reply = b""
        while not reply.endswith(b"\n"):
            chunk = self._socket.recv(65536)
            if not chunk:
                raise RuntimeError("faultfs has ended")
            reply += chunk
        answer: dict[str, Any] = json.loads(reply)
        return answer

    def add(self, path: str, *operations: str, **rule: Any) -> None:
        """A rule for operations on matching paths: `errno`, `skip`, `times`, `delay`, `hang`."""
        unknown = set(operations) - OPERATIONS
        assert not unknown, f"faultfs knows no {unknown}"
        self._ask(do="add", rule={"path": path, "operations": sorted(operations), **rule})

    def fail(
        self, path: str, *operations: str, errno: int, skip: int = 0, times: int | None = None
    ) -> None:
        """Fail operations with `errno`: sticky, or the next `times` after `skip`."""
        self.add(path, *operations, errno=errno, skip=skip, times=times)

    def delay(self, path: str, *operations: str, seconds: float) -> None:
        self.add(path, *operations, delay=seconds)

    def hang(self, path: str, *operations: str, times: int | None = None) -> None:
        """Operations do not return before `clear`."""
        self.add(path, *operations, hang=True, times=times)

    def clear(self) -> None:
        """Drop all rules; what hangs goes on."""
        self._ask(do="clear")

    def status(self) -> dict[str, Any]:
        """`seen`: operations by name; `hits`: per rule; `hanging`: how many wait."""
        return self._ask(do="status")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let everything go on that hangs, unmount and end the process."""
        if self._socket is not None:
            with contextlib.suppress(OSError, RuntimeError):
                self.clear()
            self._socket.close()
        subprocess.run(["fusermount3", "-u", "-z", str(self.mountpoint)], check=False)
        assert self._process is not None
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._control.unlink(missing_ok=True)
        self._directory.rmdir()


if __name__ == "__main__":
    main(*sys.argv[1:4])
