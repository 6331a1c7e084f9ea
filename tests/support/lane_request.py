"""Requests of the lane for tests of volumes, with a completion like that of ordinary ones."""

from __future__ import annotations

from ploopd.fileio.buffers import BufferPool
from ploopd.storage.device import Done, Pending
from ploopd.storage.lane import Lane, LaneRequest


class TestRequest(LaneRequest):
    """`view` is the memory of a promoted one, as a task's would be: a copy of what is written."""

    __slots__ = ("done", "lane", "pending", "view")
    __test__ = False

    def __init__(
        self,
        lane: Lane,
        pool: BufferPool,
        offset: int,
        data: memoryview,
        done: Done,
        *,
        write: bool,
    ) -> None:
        self.lane = lane
        self.offset = offset
        self.length = len(data)
        self.writing = write
        self.buffer = pool.take(self.length)
        self.view = data
        self.done = done
        self.pending: Pending | None = None
        if write:
            self.buffer.view[:] = data

    def completed(self) -> None:
        self.lane.ended(self)
        if not self.writing:
            self.view[:] = self.buffer.view
        self.buffer.release()
        self.done(None)

    def promote(self) -> None:
        self.pending = self.lane.adopt(self, self.view, self.done)


def begin(
    lane: Lane, pool: BufferPool, offset: int, data: memoryview, done: Done, *, write: bool
) -> TestRequest | None:
    """A request in the lane, or None: then it has to go the ordinary way."""
    request = TestRequest(lane, pool, offset, data, done, write=write)
    if lane.begin(request):
        return request
    request.buffer.release()
    return None
