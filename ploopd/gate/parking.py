"""Requests as the gate remembers them: what to execute, and where the request stands.

A request keeps its operation and arguments so that it can be parked and executed again.  Its
sequence number, given at admission, is its place in line for as long as it lives.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final, Protocol

from ploopd.errors import StorageError
from ploopd.storage.device import Done, Pending


class Op(Enum):
    """The operations of a block device that take time."""

    READ = "read"
    WRITE = "write"
    WRITE_ZEROES = "write_zeroes"
    DISCARD = "discard"
    FLUSH = "flush"


CHANGING: Final = frozenset({Op.WRITE, Op.WRITE_ZEROES, Op.DISCARD})
"""The operations that change the disk's content or map."""


class RequestState(Enum):
    """A request's life: (parked → executing)* → ended."""

    NEW = auto()
    PARKED = auto()
    EXECUTING = auto()
    ENDED = auto()


class RequestOwner(Protocol):
    """The gate, as its requests see it."""

    def cancel(self, request: Request) -> bool: ...

    def finished(self, attempt: Attempt, error: StorageError | None) -> None: ...


class Request:
    """One slow operation from its admission to its completion; implements `Pending`.

    `buffer` is where the next execution reads to or writes from; `admitted_at` is in seconds of
    the gate's clock.  `abandoned`: its caller has asked to cancel it while it was being executed.
    """

    __slots__ = (
        "abandoned",
        "admitted_at",
        "attempt",
        "buffer",
        "done",
        "fua",
        "length",
        "offset",
        "op",
        "owner",
        "sequence",
        "state",
        "unmap",
    )

    def __init__(
        self,
        owner: RequestOwner,
        sequence: int,
        op: Op,
        offset: int,
        length: int,
        buffer: memoryview | None,
        done: Done,
        fua: bool,
        unmap: bool,
        admitted_at: float,
    ) -> None:
        self.owner = owner
        self.sequence = sequence
        self.op = op
        self.offset = offset
        self.length = length
        self.buffer = buffer
        self.done = done
        self.fua = fua
        self.unmap = unmap
        self.admitted_at = admitted_at
        self.state = RequestState.NEW
        self.abandoned = False
        self.attempt: Attempt | None = None

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that waiting for this request keeps occupied."""
        return 0 if self.buffer is None else self.length

    @property
    def changes(self) -> bool:
        """Whether it changes the disk."""
        return self.op in CHANGING

    def cancel(self) -> bool:
        """See `Pending.cancel`.

        True: it was parked, or the device had not begun it; it will never reach the image.  False
        for a request in execution: `done` will be called once, with the result, or with ECANCELED
        if it failed with a standby errno or hung; it is never executed again.
        """
        return self.owner.cancel(self)

    def __repr__(self) -> str:
        return (
            f"<Request {self.sequence} {self.op.value} {self.offset}+{self.length} "
            f"{self.state.name.lower()}>"
        )


class Attempt:
    """One execution of a request by the device; `finished` is the completion handed to it.

    `void`: disowned; the result does not count any more.
    """

    __slots__ = ("pending", "request", "void")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.pending: Pending | None = None
        self.void = False

    def finished(self, error: StorageError | None) -> None:
        """The device's answer."""
        self.request.owner.finished(self, error)


class ParkedRequests:
    """The parked requests in their original order, with the bytes they hold.

    Requests mostly arrive in order; one that failed in execution takes its place further ahead,
    and then the next look in order sorts once.
    """

    __slots__ = ("_by_sequence", "_last", "_unsorted", "size")

    def __init__(self) -> None:
        self._by_sequence: dict[int, Request] = {}
        self._last = 0
        self._unsorted = False
        self.size = 0

    def __len__(self) -> int:
        return len(self._by_sequence)

    def add(self, request: Request) -> bool:
        """Park it; False if an older one is parked already for certain."""
        alone = not self._by_sequence
        ahead = request.sequence < self._last and not alone
        if ahead:
            self._unsorted = True
        else:
            self._last = request.sequence
        request.state = RequestState.PARKED
        self._by_sequence[request.sequence] = request
        self.size += request.held_bytes
        return alone or ahead

    def remove(self, request: Request) -> None:
        """Take it out; its caller gives it its next state."""
        del self._by_sequence[request.sequence]
        self.size -= request.held_bytes

    def first(self) -> Request | None:
        """The oldest."""
        self._sort()
        return next(iter(self._by_sequence.values()), None)

    def in_order(self) -> list[Request]:
        """All of them, oldest first; a copy, so that the set may change meanwhile."""
        self._sort()
        return list(self._by_sequence.values())

    def _sort(self) -> None:
        if self._unsorted:
            self._by_sequence = dict(sorted(self._by_sequence.items()))
            self._unsorted = False
