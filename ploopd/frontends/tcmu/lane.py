"""Plain READs and WRITEs that wait for the storage without being tasks.

A `LaneCommand` is what a command becomes that cannot complete at once and is one piece of one file
(`ploopd.fileio.lane`).  Its data is copied between the shared memory and a buffer of its own, so
that the storage never works on memory that the kernel may take back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ploopd.fileio.buffers import BufferPool
from ploopd.frontends.tcmu.ring import Command, Ring, padded
from ploopd.scsi.nexus import ItlNexus
from ploopd.storage.lane import LaneRequest

MOST_LENGTH: Final = 256 << 10
"""Longer transfers become tasks: for them its cost does not count."""

CACHED: Final = 1 << 20
"""Bytes of buffers that a device keeps for its next commands."""


class LaneCommand(LaneRequest):
    """Command `command_id` of the ring, with its data at `at` in the shared memory; `cdb` has 16
    bytes, with anything behind the CDB."""

    __slots__ = ("at", "cdb", "command_id", "lane")

    def __init__(self, lane: Lane, command_id: int, cdb: bytes, at: int) -> None:
        self.lane = lane
        self.command_id = command_id
        self.cdb = cdb
        self.at = at

    def completed(self) -> None:
        self.lane.completed(self)

    def promote(self) -> None:
        self.lane.promote(self)


class Lane:
    """The way into the lane for the commands of one ring.

    `answer(command_id)` is called for each that has been carried out, `adopt(command, request)` to
    make a task of one that was `promote`d.
    """

    __slots__ = ("_adopt", "_answer", "_buffers", "_itl", "_ring")

    def __init__(
        self,
        ring: Ring,
        itl: ItlNexus,
        answer: Callable[[int], None],
        adopt: Callable[[Command, LaneCommand], None],
    ) -> None:
        self._ring = ring
        self._itl = itl
        self._answer = answer
        self._adopt = adopt
        self._buffers = BufferPool(CACHED)

    def start(
        self, command_id: int, cdb: bytes, at: int, data: memoryview, offset: int, writing: bool
    ) -> bool:
        """Begin a plain READ into, or WRITE of, `data`, which is at `at` in the shared memory, at
        byte `offset` of the disk; the unit has checked the range.

        False, and nothing has happened: it must go another way.
        """
        length = len(data)
        if length > MOST_LENGTH or not self._itl.lane.usable:
            return False
        request = LaneCommand(self, command_id, cdb, at)
        request.buffer = buffer = self._buffers.take(length)
        request.offset = offset
        request.length = length
        request.writing = writing
        if writing:
            buffer.view[:] = data
        if self._itl.begin(request):
            return True
        buffer.release()
        return False

    def completed(self, request: LaneCommand) -> None:
        """Answer GOOD."""
        self._itl.lane.ended(request)
        if not request.writing:
            with self._ring.piece(request.at, request.length) as data:
                data[:] = request.buffer.view
        request.buffer.release()
        self._answer(request.command_id)

    def promote(self, request: LaneCommand) -> None:
        """Make a task of it; nobody can tell afterwards that it was not one from the start."""
        iovs = ((request.at, request.length),)
        self._adopt(Command(request.command_id, padded(request.cdb), iovs), request)
