"""Executes the commands of one ring on a logical unit.

A plain READ or WRITE that can be done at once costs no task: data goes straight between the image
and the shared memory.  One that has to wait goes into the lane (`ploopd.frontends.tcmu.lane`) if it
is one piece of one file.  Everything else becomes a SCSI task.  The data of either is copied, so
that nothing points into the shared memory when the kernel takes it back.

What the kernel's target does itself never comes here: REPORT LUNS, reservations, unit attentions of
resets and LUN changes.  It does not say which initiator a command comes from, so all of them are
one I_T nexus here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ploopd.frontends.tcmu.lane import Lane, LaneCommand
from ploopd.frontends.tcmu.ring import (
    BEGUN,
    DECLINED,
    DONE,
    FLAG_READ_LENGTH,
    Command,
    Ring,
    RingError,
    TaskManagement,
)
from ploopd.scsi.logical_unit import LogicalUnit
from ploopd.scsi.nexus import ItlNexus
from ploopd.scsi.target import Target
from ploopd.scsi.task import Direction, Status, Task
from ploopd.scsi.unit_attention import UnitAttention

BATCH: Final = 128
"""Entries of one ring that are worked on before others get their turn."""

_LUN_RESET: Final = 5
"""The first of TCMU's task management functions that resets; the higher ones do as well."""

_PREEMPT: Final = 128
"""TCMU's number for PERSISTENT RESERVE OUT's PREEMPT AND ABORT, which resets nothing."""

_KERNELS_OWN: Final = (UnitAttention.POWER_ON, UnitAttention.DEVICE_RESET, UnitAttention.NEXUS_LOSS)


class Handler:
    """Serves `unit` through `ring`.

    `on_answer` is called when an answer was put into the ring outside of `process`: the kernel has
    to be told soon, once for all answers until then.  `taken`: how many entries the last `process`
    has worked on.  `broken` is what makes no sense in the ring; then it is over.
    """

    def __init__(
        self, ring: Ring, unit: LogicalUnit, name: str, on_answer: Callable[[], None]
    ) -> None:
        self.ring = ring
        self.unit = unit
        self.broken: RingError | None = None
        self.taken = 0
        self._on_answer = on_answer
        self._target = Target(f"tcmu,{name}")
        self._target.add_unit(0, unit)
        self._nexus = self._target.open_nexus("kernel", name)
        itl = self._nexus.itl(0)
        assert itl is not None
        self._itl: ItlNexus = itl
        self._lane = Lane(ring, itl, self._good, self._adopt)
        self._forget_attentions()
        self._aborted_status = Status.TASK_ABORTED
        self._inside = False
        self._read_length = bool(ring.flags & FLAG_READ_LENGTH)

    @property
    def busy(self) -> int:
        """Commands in execution or parked."""
        return self.ring.outstanding

    # -- taking ----------------------------------------------------------------------------

    def process(self) -> bool:
        """Work on what is in the ring now, BATCH entries at most; True if the kernel has to be told
        of answers.  Sets `broken` when the ring is not what it should be."""
        ring = self.ring
        self._inside = True
        ring.moved = False
        try:
            taken = ring.execute(self._plain, BATCH)
            if ring.declined:
                taken += self._process_others(BATCH - taken)
            elif ring.outstanding:
                self._nexus.kick()
            self.taken = taken
            return ring.moved
        except RingError as error:
            self.broken = error
            return True
        finally:
            self._inside = False

    def _process_others(self, most: int) -> int:
        """Work on `most` entries at most, the first of which `_plain` has declined."""
        ring = self.ring
        left = most
        while left > 0:
            for entry in ring.take(1):
                if isinstance(entry, TaskManagement):
                    self._manage(entry)
                elif len(entry.iovs) == 1 or not self._in_pieces(entry):
                    self._as_task(entry)
            left -= 1 + ring.execute(self._plain, left - 1)
            if not ring.waiting:
                break
        self._nexus.kick()
        ring.settle()
        return most - left

    def _plain(self, command_id: int, cdb: bytes, at: int, data: memoryview) -> int:
        """Do a plain READ or WRITE now or begin it, if the unit and the image allow it; see
        `ring.Plain`."""
        itl = self._itl
        extent = itl.read_range(cdb)
        if extent is not None:
            writing, now = False, itl.try_read
        else:
            extent = itl.write_range(cdb)
            if extent is None:
                return DECLINED
            writing, now = True, itl.try_write
        offset, length = extent
        if length != len(data):
            return DECLINED
        first = itl.lane.first
        start = self._lane.start
        if first and start(command_id, cdb, at, data, offset, writing):
            return BEGUN
        if now(offset, data):
            return DONE
        if not first and start(command_id, cdb, at, data, offset, writing):
            return BEGUN
        return DECLINED

    def _in_pieces(self, command: Command) -> bool:
        """Do it now if its data is in several pieces: pages of the kernel that are not next to each
        other."""
        itl = self._itl
        now = itl.try_read
        extent = itl.read_range(command.cdb)
        if extent is None:
            now = itl.try_write
            extent = itl.write_range(command.cdb)
        if extent is None or extent[1] != command.length:
            return False
        offset = extent[0]
        for at, size in command.iovs:
            # A piece that is done although a later one cannot be is done again by the task.
            with self.ring.piece(at, size) as view:
                if not now(offset, view):
                    return False
            offset += size
        self.ring.answer(command.command_id, Status.GOOD)
        return True

    def _as_task(self, command: Command) -> None:
        nexus = self._nexus
        task = self._task(command)
        if not nexus.prepare(task):
            return
        if task.direction is Direction.FROM_INITIATOR:
            task.data_out = memoryview(self.ring.gather(command))[: task.data_out_length]
        nexus.execute(task)

    def _adopt(self, command: Command, request: LaneCommand) -> None:
        """Make a task of what is in the lane."""
        task = self._task(command)
        if request.writing:
            task.data_out = memoryview(bytes(request.buffer.view))
        self._itl.adopt(task, request)

    def _task(self, command: Command) -> Task:
        return Task(
            tag=command.command_id,
            lun=0,
            cdb=command.cdb,
            on_complete=self._completed,
            on_aborted=self._aborted,
            transport=command,
            expected_out=command.length,
        )

    def _manage(self, request: TaskManagement) -> None:
        """Abort what the kernel names.  Ids that nobody has are those that have been answered
        since; an id in here is never a newer command's, because that one would come later."""
        self._nexus.settle()
        tasks = self._nexus.tasks
        if _LUN_RESET <= request.function < _PREEMPT:
            self.unit.reset()
            self._forget_attentions()
        for command_id in request.command_ids:
            task = tasks.get(command_id)
            if task is not None:
                self.unit.abort(task, _nothing)

    def _forget_attentions(self) -> None:
        """The kernel tells every initiator of these itself; from here one of them, anybody, would
        be told again."""
        for attention in _KERNELS_OWN:
            self._itl.clear_attention(attention)

    # -- answering -------------------------------------------------------------------------

    def _completed(self, task: Task) -> None:
        command = task.transport
        assert isinstance(command, Command)
        read_length = None
        if task.status == Status.GOOD and task.direction is not Direction.FROM_INITIATOR:
            try:
                filled = self.ring.scatter(command, task.data_in)
            except RingError as error:
                self.broken = error.with_traceback(None)  # whose frames have views of the memory
            else:
                if self._read_length and filled < command.length:
                    read_length = filled
        task.release()
        self._answer(command.command_id, task.status, task.sense, read_length)

    def _aborted(self, task: Task) -> None:
        command = task.transport
        assert isinstance(command, Command)
        self._answer(command.command_id, self._aborted_status)

    def _good(self, command_id: int) -> None:
        self._answer(command_id, Status.GOOD)

    def _answer(
        self, command_id: int, status: int, sense: bytes = b"", read_length: int | None = None
    ) -> None:
        """Whoever ends a command could do nothing about a broken ring, so this raises nothing."""
        try:
            self.ring.answer(command_id, status, sense, read_length)
            if not self._inside:
                self.ring.settle()
        except RingError as error:
            self.broken = error
        if not self._inside:
            self._on_answer()

    # -- the end ---------------------------------------------------------------------------

    def give_back(self) -> None:
        """Answer everything that is still there BUSY, for the initiators to repeat: what is parked
        or waiting at once, what is in execution when it has ended."""
        self._aborted_status = Status.BUSY
        self._nexus.settle()
        for task in list(self._nexus.tasks.values()):
            self.unit.abort(task, _nothing)

    def close(self, done: Callable[[], None] | None = None) -> None:
        """Leave the unit and let go of the ring.  Commands that are still in execution are
        forgotten: their answers would have no ring to go to.  `done` is called when the last of
        them has ended."""
        self._nexus.settle()
        for task in self._nexus.tasks.values():
            task.on_complete = task.on_aborted = _forgotten
        self._nexus.close(done)
        self.ring.close()


def _nothing() -> None:
    """The answer is given by `Handler._aborted`."""


def _forgotten(task: Task) -> None:
    task.release()
