"""Which ranges of the disk are being changed, to be asked for every write.

A coarse table finds the few requests that may overlap; only those are compared exactly.
"""

from __future__ import annotations

from typing import Final, Protocol

_SHIFT: Final = 16
_WIDE: Final = 64
"""Requests over more granules of 64 KiB than this are kept in a list of their own."""


class Change(Protocol):
    """Whatever changes `length` bytes of the disk at `offset`."""

    @property
    def offset(self) -> int: ...

    @property
    def length(self) -> int: ...


class BusyRanges:
    """The changes in execution; `count` is their number."""

    __slots__ = ("_granules", "_wide", "count")

    def __init__(self) -> None:
        self._granules: dict[int, list[Change]] = {}
        self._wide: list[Change] = []
        self.count = 0

    def add(self, request: Change) -> None:
        """A change has begun."""
        self.count += 1
        first = request.offset >> _SHIFT
        if first == request.offset + request.length - 1 >> _SHIFT:  # nearly always
            found = self._granules.get(first)
            if found is None:
                self._granules[first] = [request]
            else:
                found.append(request)
            return
        granules = _granules(request.offset, request.length)
        if len(granules) > _WIDE:
            self._wide.append(request)
            return
        for granule in granules:
            self._granules.setdefault(granule, []).append(request)

    def remove(self, request: Change) -> None:
        """It has ended."""
        self.count -= 1
        first = request.offset >> _SHIFT
        if first == request.offset + request.length - 1 >> _SHIFT:
            self._take_out(first, request)
            return
        granules = _granules(request.offset, request.length)
        if len(granules) > _WIDE:
            self._wide.remove(request)
            return
        for granule in granules:
            self._take_out(granule, request)

    def _take_out(self, granule: int, request: Change) -> None:
        requests = self._granules[granule]
        if len(requests) == 1:
            del self._granules[granule]
        else:
            requests.remove(request)

    def overlaps(self, offset: int, length: int) -> bool:
        """Whether a change in execution touches the range."""
        if self._wide and _touches(self._wide, offset, length):
            return True
        table = self._granules
        first = offset >> _SHIFT
        if first == offset + length - 1 >> _SHIFT:
            requests = table.get(first)
            return requests is not None and _touches(requests, offset, length)
        granules = _granules(offset, length)
        if len(granules) > len(table):
            return any(_touches(requests, offset, length) for requests in table.values())
        for granule in granules:
            requests = table.get(granule)
            if requests is not None and _touches(requests, offset, length):
                return True
        return False


def _granules(offset: int, length: int) -> range:
    return range(offset >> _SHIFT, (offset + length - 1 >> _SHIFT) + 1)


def _touches(requests: list[Change], offset: int, length: int) -> bool:
    end = offset + length
    return any(each.offset < end and offset < each.offset + each.length for each in requests)
