"""From a path to a `Volume`: find the files, lock them, verify them, mark the top as in use.

Nothing is written before everything has been verified, and nothing at all to what is opened
read-only.  Blocking: to be called in a worker thread.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

import trio

from image_format import HEADER_SIZE, SECTOR, BatReport
from ploopd.errors import (
    DescriptorError,
    LockedError,
    NotFoundError,
    PloopError,
    StorageError,
    open_error,
)
from ploopd.fileio.engine import IoEngine
from ploopd.fileio.file import File
from ploopd.fileio.locks import lock_image
from ploopd.fileio.oslayer import REAL, OsLayer
from ploopd.fileio.policy import CacheMode
from ploopd.storage.allocator import Allocator
from ploopd.storage.bat_writer import BatWriter
from ploopd.storage.chain_files import DiskFiles, ImageFile, locate
from ploopd.storage.core import Core, Source
from ploopd.storage.delta import Delta
from ploopd.storage.descriptor_change import (
    finish_growth,
    forget_growth,
    interrupted_growth,
)
from ploopd.storage.identity import load_identity
from ploopd.storage.mapping import ClusterMap
from ploopd.storage.probe import ImageFormat, probe_format
from ploopd.storage.space import Space
from ploopd.storage.stack import RAW_CLUSTER, Layer, Stack, inode_number
from ploopd.storage.sync_group import SyncGroup
from ploopd.storage.volume import Volume

PREALLOCATION: Final = 128 << 20
NO_SUBSTITUTES: Final[Mapping[str, str]] = MappingProxyType({})

_ZEROS: Final = 1 << 20
_COPY_MEMORY: Final = 64 << 20
_MOST_COPIES: Final = 32
_LOCK_ATTEMPTS: Final = 20
_LOCK_PAUSE: Final = 0.05
_ENTRY_VALUES: Final = 1 << 32


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """How an image is opened.

    `io`: "auto" or a `fileio.policy.Policy`.  `image_root`: where a descriptor's images may lie, if
    not beneath its own directory.  `preallocation`: bytes by which the file is extended at a time.
    `format`: what a single file is; AUTO refuses what may be a damaged delta.
    """

    read_only: bool = False
    cache: CacheMode = CacheMode.WRITEBACK
    io: str = "auto"
    image_root: Path | None = None
    preallocation: int = PREALLOCATION
    format: ImageFormat = ImageFormat.AUTO


def open_volume(
    path: str | os.PathLike[str],
    options: OpenOptions,
    engine: IoEngine,
    *,
    layer: OsLayer = REAL,
    substitutes: Mapping[str, str] = NO_SUBSTITUTES,
    inherit: Volume | None = None,
) -> Volume:
    """Open the disk at `path`: a delta, a raw file, a DiskDescriptor.xml or its directory.

    `substitutes`: files that take the place of those that a descriptor names, by GUID.  `inherit`:
    the volume that this one replaces; its identity is kept, and files that it still has locked need
    not be free.

    Raises `PloopError` of the kind that says whose fault it is; the files are as they were then.
    """
    name = os.fspath(path)
    files = locate(name, options.image_root, options.format).substituted(substitutes)
    opener = _Opener(options, engine, layer, inherit)
    stack = opener.open(files)
    try:
        stack.verify()
        verify_descriptor(files, stack)
        cluster_map, sources, report = stack.load_map()
        if inherit is not None:
            identity = inherit.identity
        else:
            identity = load_identity(files.path, create=not options.read_only)
        stack.mark_in_use()
        if not options.read_only:
            finish_descriptor(files, stack, layer)
    except PloopError:
        with contextlib.suppress(StorageError):
            stack.close()
        raise
    late = _late_references(stack, inherit)
    core = _core(stack, cluster_map, sources, report, late, options, engine)
    notes = [note for each in stack.layers for note in each.file.notes] + stack.notes
    if files.key is not None:
        notes.append(f"encrypted with key {files.key}: initiators see the LUKS volume")
    return Volume(core, stack, engine, path=name, identity=identity, notes=notes)


def open_stack(
    path: str | os.PathLike[str],
    *,
    locking: bool = True,
    writable: bool = False,
    options: OpenOptions | None = None,
    substitutes: Mapping[str, str] = NO_SUBSTITUTES,
    layer: OsLayer = REAL,
) -> tuple[DiskFiles, Stack]:
    """The files of the disk at `path` opened for blocking reads, not yet compared with each other.

    `locking` False also opens what is being written to elsewhere: right for a look at the headers.
    `writable`: the top, to be changed offline.  `substitutes`: as for `open_volume`.  Raises like
    `open_volume`.
    """
    options = replace(options or OpenOptions(), read_only=not writable)
    files = locate(os.fspath(path), options.image_root, options.format).substituted(substitutes)
    return files, _Opener(options, None, layer, None, locking).open(files)


class _Opener:
    """Opens and locks the files of one disk."""

    def __init__(
        self,
        options: OpenOptions,
        engine: IoEngine | None,
        layer: OsLayer,
        inherit: Volume | None,
        locking: bool = True,
    ) -> None:
        self._options = options
        self._locking = locking
        self._engine = engine
        self._layer = layer
        self._replacing = inherit is not None
        self._held = set() if inherit is None else inherit.inode_numbers()

    def open(self, files: DiskFiles) -> Stack:
        """All files, base first so that whoever locks the base is found out at once."""
        layers: list[Layer] = []
        try:
            for index, image in enumerate(files.images):
                writable = index == len(files.images) - 1 and not self._options.read_only
                layers.append(self._layer_of(files, image, writable=writable, base=index == 0))
        except PloopError:
            for layer in layers:
                _close(layer.file)
            raise
        layers.reverse()
        cluster = RAW_CLUSTER if files.cluster_size is None else files.cluster_size
        return Stack(layers, read_only=self._options.read_only, raw_cluster=cluster)

    def _layer_of(self, files: DiskFiles, image: ImageFile, *, writable: bool, base: bool) -> Layer:
        file = self._open_file(files, image, writable)
        try:
            inode = inode_number(file)
            if self._locking:
                self._lock(file, inode, writer=writable, base=base and not self._options.read_only)
            if self._replacing:
                file.drop_cache()  # the map must say what the storage has
            size = file.size()
            kind = image.format
            if kind is ImageFormat.AUTO:
                kind = probe_format(file.pread(min(HEADER_SIZE, size), 0), file.path)
            delta = None
            if kind is ImageFormat.PLOOP:
                delta = Delta.read(file, writable=writable)
                file.keep_cached(delta.header.data_offset)
                size = delta.header.size
            return Layer(file=file, delta=delta, guid=image.guid, size=size, inode=inode)
        except PloopError:
            _close(file)
            raise

    def _lock(self, file: File, inode: tuple[int, int], *, writer: bool, base: bool) -> None:
        for attempt in range(_LOCK_ATTEMPTS):
            try:
                lock_image(file.fd, path=file.path, writer=writer, base=base)
            except LockedError:
                # Descriptors of the replaced volume are closed in the background, as far as the
                # storage lets them be closed.
                if inode not in self._held or attempt == _LOCK_ATTEMPTS - 1:
                    raise
                time.sleep(_LOCK_PAUSE)
            else:
                return

    def _open_file(self, files: DiskFiles, image: ImageFile, writable: bool) -> File:
        return open_image(
            image,
            files.path,
            read_only=not writable,
            engine=self._engine,
            cache=self._options.cache,
            layer=self._layer,
            io=self._options.io,
        )


def open_image(
    image: ImageFile,
    descriptor: str,
    *,
    read_only: bool,
    engine: IoEngine | None,
    cache: CacheMode = CacheMode.WRITEBACK,
    layer: OsLayer = REAL,
    io: str = "auto",
) -> File:
    """Open one file of a disk, beneath its root if it has one; `descriptor` is named in errors.

    Raises like `File.open`; a file that a descriptor names and that is not there is a
    DescriptorError.
    """

    def open_at(dir_fd: int | None) -> File:
        return File.open(
            image.path,
            read_only=read_only,
            engine=engine,
            cache=cache,
            dir_fd=dir_fd,
            layer=layer,
            io=io,
        )

    if image.root is None:
        return open_at(None)
    try:
        directory = os.open(image.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise open_error(error, image.root) from error
    try:
        file = open_at(directory)
    except NotFoundError as error:
        raise DescriptorError(
            "an image file does not exist", path=descriptor, field="File", value=image.path
        ) from error
    except DescriptorError as error:
        error.path = descriptor
        raise
    finally:
        os.close(directory)
    file.path = image.full_path
    return file


def _close(file: File) -> None:
    with contextlib.suppress(StorageError):
        file.close()


def verify_descriptor(files: DiskFiles, stack: Stack) -> None:
    """Raise DescriptorError if the descriptor speaks of another disk than the files.

    Not where growing the image was interrupted, and only the descriptor has the old size.
    """
    if files.size is None:
        return
    if files.size != stack.size and not _half_grown(files, stack):
        raise DescriptorError(
            f"the top image has {stack.size // SECTOR} sectors",
            path=files.path,
            field="Disk_size",
            value=files.size // SECTOR,
        )
    if files.cluster_size != stack.cluster_size:
        raise DescriptorError(
            f"the top image has clusters of {stack.cluster_size // SECTOR} sectors",
            path=files.path,
            field="Blocksize",
            value=(files.cluster_size or 0) // SECTOR,
        )


def _half_grown(files: DiskFiles, stack: Stack) -> bool:
    """Whether the descriptor is all that is missing to a larger disk; see `storage.grow`."""
    assert files.size is not None
    return files.size < stack.size and interrupted_growth(files.path, stack.size // SECTOR)


def finish_descriptor(files: DiskFiles, stack: Stack, layer: OsLayer = REAL) -> None:
    """Finish what a crash has left of growing the image; where that cannot be, it is noted."""
    if files.size is None:
        return
    if files.size == stack.size:
        forget_growth(files.path)
        return
    try:
        finish_growth(files.path, layer)
    except PloopError as error:
        stack.notes.append(f"growing the image was interrupted, and cannot be finished: {error}")
    else:
        stack.notes.append(f"{files.path}: growing the image was interrupted and is finished now")


def _late_references(stack: Stack, inherit: Volume | None) -> set[int]:
    """Clusters that a late write of the replaced volume may give to an entry of the same file."""
    if inherit is None or stack.top.inode not in inherit.inode_numbers():
        return set()
    return inherit.late_references()


def _core(
    stack: Stack,
    cluster_map: ClusterMap,
    sources: tuple[Source, ...],
    report: BatReport | None,
    late: set[int],
    options: OpenOptions,
    engine: IoEngine,
) -> Core:
    file, cluster_size = stack.top.file, stack.cluster_size
    allocator = _allocator(stack, report)
    allocator.withdraw(late)
    sync = SyncGroup(file.sync, allocator, engine.kick)
    core = Core(
        map=cluster_map,
        sources=sources,
        top=file,
        single=len(stack.layers) == 1,
        sync=sync,
        allocator=allocator,
        buffers=engine.buffers,
        zeros=memoryview(bytes(_ZEROS)),
        copies=trio.Semaphore(max(1, min(_MOST_COPIES, _COPY_MEMORY // cluster_size))),
        kick=engine.kick,
    )
    delta = stack.top.delta
    if delta is not None and not stack.read_only:
        core.bat = BatWriter(file, delta.header, cluster_map, allocator)
        sync.observe(core.bat)
        core.space = Space(
            file,
            allocator,
            sync,
            cluster_size=cluster_size,
            entries=delta.header.bat_entries,
            step=options.preallocation,
            max_end=_ENTRY_VALUES // delta.header.entry_scale,
        )
    return core


def _allocator(stack: Stack, report: BatReport | None) -> Allocator:
    """The free space of the top; a raw or read-only one has none."""
    delta = stack.top.delta
    if delta is None or report is None or stack.read_only:
        return Allocator(first=0, end=0)
    holes = [(int(first), int(count)) for first, count in report.leaks]
    if stack.completed_cluster is not None:
        holes.append((stack.completed_cluster, 1))
    end = stack.top.file.size() // stack.cluster_size
    return Allocator(first=delta.header.header_clusters, end=end, holes=holes)
