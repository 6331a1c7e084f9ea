"""What an image is (`image_info`) and where its bytes are (`image_map`), without a daemon."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from image_format import extension as extension_format
from ploopd.errors import StorageError
from ploopd.fileio.file import File
from ploopd.storage.device import Extent, ExtentKind
from ploopd.storage.mapping import UNMAPPED
from ploopd.storage.opener import open_stack
from ploopd.storage.stack import Layer, Stack

_BLOCK: Final = 512
"""Unit of st_blocks (stat(2))."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDetails:
    """One file of an image.

    Sizes are bytes: `virtual_size` of the disk as this file has it, `file_size` its length,
    `actual_size` what it occupies.  `version` is 0 for raw files, for which the last fields are
    None. `state` is what the in-use word says, `extension` whether a valid format extension is
    there.
    """

    path: str
    format: str
    guid: str | None
    version: int
    virtual_size: int
    file_size: int
    actual_size: int
    cluster_size: int | None = None
    bat_entries: int | None = None
    first_block_offset: int | None = None
    state: str | None = None
    unclean: bool = False
    extension: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """An image: the disk it makes, and its files, top first.

    `descriptor` is the path of the DiskDescriptor.xml, None for a single file.
    """

    filename: str
    descriptor: str | None
    layers: tuple[LayerDetails, ...]

    @property
    def virtual_size(self) -> int:
        """Bytes of the disk."""
        return self.layers[0].virtual_size

    @property
    def actual_size(self) -> int:
        """Bytes that all files occupy together."""
        return sum(layer.actual_size for layer in self.layers)


def image_info(path: str | os.PathLike[str]) -> ImageInfo:
    """Headers and sizes of the image at `path`, which may be in use.  Blocking.

    `path` is a delta, a raw file, a DiskDescriptor.xml or its directory.  Raises what opening
    raises: NotFoundError, DescriptorError, ImageFormatError, CorruptImageError for a chain that
    does not fit.
    """
    files, stack = open_stack(path, locking=False)
    with _closing(stack):
        stack.verify()
        return ImageInfo(
            filename=os.fspath(path),
            descriptor=files.descriptor,
            layers=tuple(map(_details, stack.layers)),
        )


def image_map(path: str | os.PathLike[str]) -> Iterator[Extent]:
    """The extents of the image at `path`: ascending, without gaps, neighbours merged.  Blocking.

    The files stay open and locked until the iterator ends or is closed.  Raises like `image_info`,
    LockedError if the image is being written to, CorruptImageError for a BAT that makes no sense.
    """
    _, stack = open_stack(path)
    with _closing(stack):
        stack.verify()
        cluster_map, sources, _ = stack.load_map()
        paths = _level_paths(stack, len(sources))
        lowest = len(stack.layers) - 1
        for segment in cluster_map.segments(0, cluster_map.clusters):
            offset = segment.first * cluster_map.cluster_size
            length = min(segment.clusters * cluster_map.cluster_size, cluster_map.size - offset)
            if segment.level == UNMAPPED:
                yield Extent(offset=offset, length=length, kind=ExtentKind.HOLE, depth=lowest)
                continue
            yield Extent(
                offset=offset,
                length=length,
                kind=ExtentKind.DATA,
                depth=min(segment.level - 1, lowest),
                path=paths[segment.level],
                host_offset=segment.host * cluster_map.cluster_size,
            )


def _level_paths(stack: Stack, count: int) -> list[str]:
    """Path by level; the level after the last is the cut end of a raw base."""
    names = [stack.top.file.path, *(layer.file.path for layer in stack.layers)]
    return names + [names[-1]] * (count - len(names))


@contextlib.contextmanager
def _closing(stack: Stack) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(StorageError):  # nothing was written
            stack.close()


def _details(layer: Layer) -> LayerDetails:
    status = _stat(layer.file)
    header = None if layer.delta is None else layer.delta.header
    return LayerDetails(
        path=layer.file.path,
        format=layer.kind,
        guid=layer.guid,
        version=0 if header is None else header.version,
        virtual_size=layer.size,
        file_size=status.st_size,
        actual_size=status.st_blocks * _BLOCK,
        cluster_size=None if header is None else header.cluster_size,
        bat_entries=None if header is None else header.bat_entries,
        first_block_offset=None if header is None else header.data_offset,
        state=None if header is None else header.close_state.value,
        unclean=header is not None and header.unclean,
        extension=header is not None and extension_format.is_valid(header),
    )


def _stat(file: File) -> os.stat_result:
    try:
        return os.fstat(file.fd)
    except OSError as error:
        raise StorageError.from_os(error, "fstat", file.path) from error
