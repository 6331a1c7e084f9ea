"""Which policy a file gets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ploopd.errors import UsageError
from ploopd.fileio.policy import CacheMode, Policy, choose, filesystem_type

W, N = CacheMode.WRITEBACK, CacheMode.NONE


@pytest.mark.parametrize(
    ("filesystem", "cache", "engine", "policy"),
    [
        ("tmpfs", W, "io_uring", Policy.INLINE),
        ("ramfs", W, "threads", Policy.INLINE),
        ("ext4", W, "io_uring", Policy.NOWAIT),
        ("xfs", W, "threads", Policy.NOWAIT),
        ("ext4", N, "io_uring", Policy.RING),
        ("xfs", N, "threads", Policy.THREADS),
        ("fuse.mfs", W, "io_uring", Policy.RING),
        ("fuse", W, "threads", Policy.THREADS),
        ("nfs4", W, "io_uring", Policy.RING),
        ("cifs", W, "io_uring", Policy.RING),
        ("unknown", W, "io_uring", Policy.RING),
        ("something-new", W, "threads", Policy.THREADS),
        ("fuse", W, None, Policy.INLINE),
    ],
)
def test_auto(filesystem: str, cache: CacheMode, engine: str | None, policy: Policy) -> None:
    assert choose("auto", cache, filesystem, engine) is policy


@pytest.mark.parametrize("io", ["inline", "nowait", "io_uring", "threads"])
def test_a_named_policy_is_what_one_gets(io: str) -> None:
    assert choose(io, W, "fuse", "io_uring").value == io


@pytest.mark.parametrize(
    ("io", "cache", "engine"),
    [
        ("io_uring", W, "threads"),
        ("inline", N, "io_uring"),
        ("nowait", N, "io_uring"),
        ("fast", W, "io_uring"),
        ("", W, "io_uring"),
    ],
)
def test_what_cannot_be_had_is_a_usage_error(io: str, cache: CacheMode, engine: str) -> None:
    with pytest.raises(UsageError):
        choose(io, cache, "ext4", engine)


def test_the_type_of_a_file_system(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "22 27 0:21 / /proc rw shared:3 - proc proc rw\n"
        "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        "31 26 0:30 / /mnt/a\\040b rw shared:7 master:2 - fuse.mfs mfs#x rw\n"
        "broken line\n"
    )
    assert filesystem_type(os.makedev(254, 0), table) == "ext4"
    assert filesystem_type(os.makedev(0, 30), table) == "fuse.mfs"
    assert filesystem_type(os.makedev(9, 9), table) == "unknown"
    assert filesystem_type(os.makedev(254, 0), tmp_path / "none") == "unknown"
    assert filesystem_type(os.stat("/proc").st_dev) == "proc"
