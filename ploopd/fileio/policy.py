"""How the operations of one file are executed, by its file system and the kernel.

The promise behind the table: a storage that stalls never stalls the event loop.  So only what
cannot wait for storage is done inline.  docs/decisions/0001-file-io-policy.md has the measurements.
"""

from __future__ import annotations

import errno
import os
from enum import Enum
from pathlib import Path

from ploopd.errors import UsageError


class CacheMode(Enum):
    """Whose cache stands between the disk and its file; the values are qemu-img's words."""

    WRITEBACK = "writeback"
    NONE = "none"


class Policy(Enum):
    """How data operations are executed.

    INLINE: plain preadv/pwritev in the loop (memory file systems).  NOWAIT: RWF_NOWAIT reads in the
    loop, the engine for misses and all writes.  RING, THREADS: the engine for everything, by
    io_uring or by worker threads.
    """

    INLINE = "inline"
    NOWAIT = "nowait"
    RING = "io_uring"
    THREADS = "threads"


IO_CHOICES = ("auto", *(policy.value for policy in Policy))

_MEMORY_TYPES = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})
_LOCAL_TYPES = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs"})


def filesystem_type(device: int, mountinfo: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the file system with the device number `st_dev`, "unknown" if nobody says.

    Source: proc(5), mountinfo: the type follows the field "-".
    """
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = mountinfo.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return "unknown"
    for line in lines:
        fields = line.split()
        if len(fields) > 6 and fields[2] == wanted and "-" in fields:
            return fields[fields.index("-") + 1]
    return "unknown"


def in_memory(filesystem: str) -> bool:
    """Does this type of file system live in memory, so that there is no cache to bypass?"""
    return filesystem in _MEMORY_TYPES


def may_stall(filesystem: str) -> bool:
    """Can this type of file system make a thread sleep that only submits an operation?

    Local ones and memory cannot.  Everything with a server behind it can, and so may what nobody
    knows.
    """
    return filesystem not in _MEMORY_TYPES and filesystem not in _LOCAL_TYPES


def may_lose_written(filesystem: str) -> bool:
    """Can what was written, and not synced, vanish from this type of file system while the machine
    goes on?

    Everything with a server behind it can: its client drops its cache when the server is gone, or
    the server restarts without what it had not stored.  Memory and local file systems keep it in
    this kernel's page cache; so does overlay, whose upper layer is a local one.
    """
    return may_stall(filesystem) and filesystem != "overlay"


def choose(io: str, cache: CacheMode, filesystem: str, engine_kind: str | None) -> Policy:
    """The policy for a file; raises `UsageError` when `io` asks for what cannot be.

    `engine_kind` is None for files without an engine: all they do is inline.
    """
    if io not in IO_CHOICES:
        raise UsageError(
            "unknown I/O policy", field="io", value=io, hint=f"use one of {', '.join(IO_CHOICES)}"
        )
    if engine_kind is None:
        return Policy.INLINE
    engine = Policy.RING if engine_kind == "io_uring" else Policy.THREADS
    if io == "io_uring" and engine is not Policy.RING:
        raise UsageError("io_uring is not to be had here", field="io", value=io)
    if io != "auto":
        policy = Policy(io)
        if cache is CacheMode.NONE and policy in (Policy.INLINE, Policy.NOWAIT):
            raise UsageError(
                "O_DIRECT always waits for the disk", field="io", value=io, hint="use io=auto"
            )
        return policy
    if cache is CacheMode.NONE:
        return engine
    if in_memory(filesystem):
        return Policy.INLINE
    if filesystem in _LOCAL_TYPES:
        return Policy.NOWAIT
    # btrfs and overlay show anonymous device numbers that mountinfo may not have; FUSE, NFS and
    # whatever else there is may hang at any time.
    return engine


def answers_nowait(fd: int) -> bool:
    """Does this file do RWF_NOWAIT reads?  One byte is asked for; a miss is an answer, too."""
    try:
        os.preadv(fd, (bytearray(1),), 0, os.RWF_NOWAIT)
    except OSError as error:
        return error.errno == errno.EAGAIN
    return True
