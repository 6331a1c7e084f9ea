"""The images under test: one filled raw content, as a raw file and as ploop images."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

from bench.servers import Images, StartError

MIB = 1 << 20


def make_images(directory: Path, size_mib: int) -> Images:
    """Fill `size_mib` MiB with random bytes and convert them; raises StartError.

    The content is the same for all servers and has no holes, so that no server can answer reads
    without touching its file.  `qemu-img compare` asserts that it is.
    """
    need = 3 * (size_mib + 2) * MIB
    free = shutil.disk_usage(directory).free
    if free < need:
        raise StartError(f"{directory} has {free >> 20} MiB free, {need >> 20} MiB are needed")
    images = Images(
        raw=directory / "disk.raw",
        ploop=directory / "disk.hds",
        ploop_peer=directory / "disk-peer.hds",
    )
    chunk = random.Random(20260101)
    with images.raw.open("wb") as file:
        for _ in range(size_mib):
            file.write(chunk.randbytes(MIB))
        file.flush()
        os.fsync(file.fileno())
    for target in (images.ploop, images.ploop_peer):
        _qemu_img("convert", "-f", "raw", "-O", "parallels", str(images.raw), str(target))
    _qemu_img("compare", "-f", "raw", "-F", "parallels", str(images.raw), str(images.ploop))
    return images


def drop_cache(images: Images) -> None:
    """Write back and forget the cached pages of the images (works without privileges)."""
    for path in (images.raw, images.ploop, images.ploop_peer):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _qemu_img(*arguments: str) -> None:
    try:
        result = subprocess.run(
            ["qemu-img", *arguments], check=False, capture_output=True, text=True
        )
    except FileNotFoundError as error:
        raise StartError("qemu-img is not installed: apt-get install qemu-utils") from error
    if result.returncode:
        raise StartError(f"qemu-img {' '.join(arguments)}: {result.stderr.strip()}")
