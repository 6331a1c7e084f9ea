"""In which order released requests may run: overlapping ones one after the other, others at once.

Two requests conflict when their ranges overlap and one of them changes the disk; a flush conflicts
with every change and with other flushes.  A request waits for all earlier conflicting ones.
Dependencies are found with a map from ranges to the last writer and the readers since, so that n
requests cost O(n log n).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque

from ploopd.gate.parking import Op, Request


class ReleaseOrder:
    """The dependencies among the requests of one release.

    `ready`: requests whose predecessors have all ended and that nobody has taken yet.
    """

    __slots__ = (
        "_flush",
        "_open",
        "_readers",
        "_since_flush",
        "_starts",
        "_successors",
        "_waits",
        "_withdrawn",
        "_writers",
        "pumping",
        "ready",
    )

    def __init__(self) -> None:
        self.ready: deque[Request] = deque()
        self.pumping = False
        # Segment i covers bytes from _starts[i] to _starts[i + 1] (the last one has no end).
        self._starts = [0]
        self._writers: list[Request | None] = [None]
        self._readers: list[list[Request]] = [[]]
        self._flush: Request | None = None
        self._since_flush: list[Request] = []
        self._open: set[Request] = set()
        self._waits: dict[Request, int] = {}
        self._withdrawn: set[Request] = set()
        self._successors: dict[Request, list[Request]] = {}

    def add(self, request: Request) -> None:
        """Put `request` behind everything added before; in `ready` at once if it need not wait."""
        before = self._predecessors(request)
        self._open.add(request)
        if not before:
            self.ready.append(request)
            return
        self._waits[request] = len(before)
        for predecessor in before:
            self._successors.setdefault(predecessor, []).append(request)

    def add_running(self, request: Request) -> None:
        """`request` is in execution already: those added later wait for it."""
        self._predecessors(request)
        self._open.add(request)

    def ended(self, request: Request) -> None:
        """`request` will not run any more: its successors wait for one thing less."""
        ended = [request]
        while ended:
            gone = ended.pop()
            self._open.discard(gone)
            for successor in self._successors.pop(gone, ()):
                self._waits[successor] -= 1
                if self._waits[successor]:
                    continue
                del self._waits[successor]
                if successor in self._withdrawn:
                    ended.append(successor)
                else:
                    self.ready.append(successor)

    def withdraw(self, request: Request) -> None:
        """`request` will never run, but those behind it still wait for those before it."""
        if request in self._waits:
            self._withdrawn.add(request)
        else:
            self.ended(request)

    def _predecessors(self, request: Request) -> set[Request]:
        if request.op is Op.FLUSH:
            found = set(self._since_flush)
            if self._flush is not None:
                found.add(self._flush)
            self._flush = request
            self._since_flush = []
        elif request.changes:
            found = self._claim(request)
            if self._flush is not None:
                found.add(self._flush)
            self._since_flush.append(request)
        else:
            found = self._share(request)
        return found & self._open

    def _claim(self, request: Request) -> set[Request]:
        """Make `request` the writer of its range; returns whom it displaces."""
        first, end = self._segments(request)
        found = {writer for writer in self._writers[first:end] if writer is not None}
        for readers in self._readers[first:end]:
            found.update(readers)
        self._starts[first:end] = [request.offset]
        self._writers[first:end] = [request]
        self._readers[first:end] = [[]]
        return found

    def _share(self, request: Request) -> set[Request]:
        """Make `request` a reader of its range; returns the writers it must see."""
        first, end = self._segments(request)
        for readers in self._readers[first:end]:
            readers.append(request)
        return {writer for writer in self._writers[first:end] if writer is not None}

    def _segments(self, request: Request) -> tuple[int, int]:
        """The indexes [first, end) of the segments that are exactly the request's range."""
        length = max(request.length, 1)
        return self._split(request.offset), self._split(request.offset + length)

    def _split(self, position: int) -> int:
        """The index of the segment that begins at `position`, cut there if need be."""
        index = bisect_right(self._starts, position) - 1
        if self._starts[index] == position:
            return index
        index += 1
        self._starts.insert(index, position)
        self._writers.insert(index, self._writers[index - 1])
        self._readers.insert(index, list(self._readers[index - 1]))
        return index
