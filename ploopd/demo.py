"""`python -m ploopd.demo [IMAGE]`: what `make run` does.

Serves IMAGE, or a small demo image with an ext4 file system in it, which is made first if it is
not there.  No root is needed: mkfs.ext4 fills a plain file, whose data is then written into an
empty ploop image.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from ploopd.config import parse_portal
from ploopd.errors import PloopError, StorageError
from ploopd.frontends.iscsi.config import DEFAULT_PORT, format_address

if TYPE_CHECKING:
    from ploopd.storage.volume import Volume

DEMO_IMAGE = Path("build/demo/demo.hds")
DEFAULT_HOST = "127.0.0.1"
DEMO_SIZE = 64 << 20
_CHUNK = 1 << 20
_PORTS = 20
_WELCOME = """\
This file system is in a ploop image, and ploopd serves it over iSCSI.
Write something here, log out, and find it again.
"""


def main() -> None:
    """Make the demo image if needed, choose a portal, become `ploopd serve`."""
    parser = argparse.ArgumentParser(prog="python -m ploopd.demo", description=__doc__)
    parser.add_argument("image", nargs="?", help=f"default: {DEMO_IMAGE}, made if it is missing")
    parser.add_argument("--portal", help="HOST:PORT; default: the first free port from 3260 on")
    arguments = parser.parse_args()
    try:
        image = arguments.image or str(demo_image(DEMO_IMAGE))
        portal = arguments.portal or free_portal()
        parse_portal(portal)
    except PloopError as error:
        print(f"ploopd: {error}", file=sys.stderr)
        raise SystemExit(int(error.exit_code)) from None
    command = [sys.executable, "-m", "ploopd.cli.ploopd", "serve", "--hints"]
    os.execv(sys.executable, [*command, "--portal", portal, image])  # noqa: S606 - no shell


def free_portal() -> str:
    """The first address from 127.0.0.1:3260 on at which nothing listens."""
    for port in range(DEFAULT_PORT, DEFAULT_PORT + _PORTS):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((DEFAULT_HOST, port))
            except OSError:
                print(f"Port {port} is taken; trying the next one.", file=sys.stderr)
                continue
        return format_address(DEFAULT_HOST, port)
    return format_address(DEFAULT_HOST, 0)


def demo_image(path: Path) -> Path:
    """`path`, made if it does not exist.  Raises `PloopError` if mkfs.ext4 is missing or fails."""
    if path.exists():
        return path
    print(f"Making the demo image {path}.", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        raw = Path(directory) / "raw"
        make_ext4(raw, Path(directory) / "content")
        made = Path(directory) / "demo.hds"
        trio.run(copy_into_ploop, raw.read_bytes(), made)
        os.rename(made, path)
        sidecar = Path(f"{made}.uuid")
        if sidecar.exists():
            os.rename(sidecar, f"{path}.uuid")
    return path


def make_ext4(raw: Path, content: Path) -> None:
    """An ext4 file system of DEMO_SIZE bytes in the file `raw`, with a file of welcome in it."""
    mkfs = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if mkfs is None:
        raise PloopError(
            "mkfs.ext4 is needed to make the demo image",
            hint="apt-get install e2fsprogs, or name an image: make run IMAGE=path",
        )
    content.mkdir()
    (content / "README").write_text(_WELCOME)
    with raw.open("wb") as file:
        file.truncate(DEMO_SIZE)
    command = [mkfs, "-q", "-F", "-L", "ploop-demo", "-d", str(content), str(raw)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if result.returncode:
        raise PloopError(f"mkfs.ext4 failed: {result.stderr.strip()}", path=raw)


async def copy_into_ploop(content: bytes, image: Path) -> None:
    """Make the ploop image `image` with this content; clusters of zeros stay holes."""
    from ploopd.fileio.engine import make_engine
    from ploopd.storage.create import create_image
    from ploopd.storage.opener import OpenOptions, open_volume

    create_image(image, len(content))
    engine = make_engine("auto")
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        volume = await trio.to_thread.run_sync(open_volume, str(image), OpenOptions(), engine)
        await nursery.start(volume.run)
        for offset in range(0, len(content), _CHUNK):
            chunk = content[offset : offset + _CHUNK]
            if chunk.count(0) != len(chunk):
                await _write(volume, offset, chunk)
        await volume.close()
        nursery.cancel_scope.cancel()
    engine.close()


async def _write(volume: Volume, offset: int, data: bytes) -> None:
    ended = trio.Event()
    result: list[StorageError | None] = []

    def done(error: StorageError | None) -> None:
        result.append(error)
        ended.set()

    volume.write(offset, memoryview(data), done)
    volume.kick()
    await ended.wait()
    if result[0] is not None:
        raise result[0]


if __name__ == "__main__":
    main()
