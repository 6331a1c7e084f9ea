"""The lane of a volume: requests within one cluster that some delta has, and nobody is changing."""

from __future__ import annotations

from functools import partial

from ploopd.fileio.file import File
from ploopd.fileio.lane import no_lane
from ploopd.fileio.policy import Policy
from ploopd.storage import read_path
from ploopd.storage.core import Core
from ploopd.storage.device import Done
from ploopd.storage.lane import LaneRequest
from ploopd.storage.mapping import TOP
from ploopd.storage.request import Request


class VolumeLane:
    """`Lane` of the volume with this `core`."""

    __slots__ = (
        "_core",
        "_exclusive",
        "_files",
        "_hosts",
        "_levels",
        "_requests",
        "_size",
        "_writable",
        "first",
        "usable",
    )

    def __init__(self, core: Core, *, read_only: bool) -> None:
        self._core = core
        self._size = core.map.cluster_size
        self._levels = core.map.level_view
        self._hosts = core.map.view
        self._exclusive = core.locks.exclusive
        self._requests = core.requests
        self._files = tuple(
            source.begin if isinstance(source, File) else no_lane for source in core.sources
        )
        self._writable = not read_only
        self.usable = core.top.begin is not no_lane
        self.first = self.usable and core.top.policy is Policy.RING

    def begin(self, request: LaneRequest) -> bool:
        size, offset = self._size, request.offset
        cluster = offset // size
        within = offset - cluster * size
        if within + request.length > size or cluster in self._exclusive:
            return False
        level = self._levels[cluster]
        if not level or (request.writing and (level != TOP or not self._writable)):
            return False
        if not self._files[level](request, self._hosts[cluster] * size + within):
            return False
        request.cluster = cluster
        self._core.locks.enter_one(cluster)
        self._requests.active += 1
        return True

    def ended(self, request: LaneRequest) -> None:
        self._core.locks.leave_one(request.cluster)
        self._requests.ended()

    def adopt(self, request: LaneRequest, buffer: memoryview, done: Done) -> Request:
        core, cluster = self._core, request.cluster
        source = core.sources[self._levels[cluster]]
        assert isinstance(source, File)
        ordinary = Request.adopted(core.requests, done)
        ended = partial(read_path.ended_within, core, ordinary, cluster)
        source.adopt(request, buffer, ended)
        return ordinary

    def empty(self) -> None:
        for request in self._operations():
            request.promote()

    def __len__(self) -> int:
        return len(self._operations())

    def close(self) -> None:
        """Take nothing more."""
        self._files = (no_lane,) * len(self._files)

    def _operations(self) -> list[LaneRequest]:
        files = {source for source in self._core.sources if isinstance(source, File)}
        return [each for file in files for each in file.in_lane() if isinstance(each, LaneRequest)]
