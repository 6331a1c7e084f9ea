"""A logical unit: the device server that executes commands on one block device.

Source: SAM-5 4.6.19, SPC-4, SBC-3.  It knows the task set, the mode parameters and the identity;
nexuses are only told about what happened (unit attentions).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Protocol

from ploopd.errors import ParkTimeoutError, StorageError
from ploopd.scsi.cdb import BLOCK_SHIFT
from ploopd.scsi.commands.command import Command, DataOut
from ploopd.scsi.commands.table import command_set
from ploopd.scsi.execution import Execution
from ploopd.scsi.failures import Access, storage_sense
from ploopd.scsi.inquiry import MAX_TRANSFER_BLOCKS, Identity, Provisioning
from ploopd.scsi.mode import ModeParameters
from ploopd.scsi.sense import (
    Asc,
    CheckCondition,
    FieldPointer,
    Sense,
    SenseKey,
    illegal_request,
    invalid_cdb_field,
)
from ploopd.scsi.task import EMPTY, Attribute, Direction, Status, Task, TaskState
from ploopd.scsi.task_set import TaskSet
from ploopd.scsi.unit_attention import UnitAttention
from ploopd.storage.device import BlockDevice
from ploopd.storage.lane import LaneRequest, lane_of

if TYPE_CHECKING:
    from ploopd.scsi.nexus import ItlNexus

QUEUE_LIMIT = 16384
"""Tasks in one task set; beyond it commands end with TASK SET FULL."""


class Buffer(Protocol):
    """Memory for one transfer (`fileio.buffers.Buffer`)."""

    @property
    def view(self) -> memoryview: ...

    def release(self) -> None: ...


class Buffers(Protocol):
    """Where buffers come from (`fileio.buffers.BufferPool`)."""

    def take(self, length: int) -> Buffer: ...


Defer = Callable[[Callable[[], object]], object]
"""Runs a callable in a later turn of the event loop."""


class Statistics:
    """Counters of one logical unit: commands and bytes since it was created."""

    __slots__ = ("errors", "read_bytes", "reads", "unmapped_bytes", "writes", "written_bytes")

    def __init__(self) -> None:
        self.reads = 0
        self.read_bytes = 0
        self.writes = 0
        self.written_bytes = 0
        self.unmapped_bytes = 0
        self.errors = 0


class LogicalUnit:
    """One SCSI disk over one block device.

    `identity`: the image's UUID, from which the designators come; `serial` defaults to its
    hexadecimal digits.  `physical_exponent`: LBPPBE, 3 for 4 KiB physical blocks.  `defer`: how a
    long command that the storage answers at once gives way to others; without it such a command
    runs to its end.
    """

    def __init__(
        self,
        device: BlockDevice,
        *,
        identity: uuid.UUID,
        buffers: Buffers,
        clock: Callable[[], float],
        serial: str | None = None,
        vendor: str = "PLOOPD",
        product: str = "PLOOP DISK",
        revision: str = "0001",
        read_only: bool = False,
        write_cache: bool = True,
        thin: bool = True,
        physical_exponent: int = 3,
        defer: Defer | None = None,
    ) -> None:
        self.device = device
        self.buffers = buffers
        self.clock = clock
        self.read_only = read_only
        self.thin = thin
        self.identity = Identity(
            identity=identity,
            serial=serial if serial is not None else identity.hex,
            vendor=vendor,
            product=product,
            revision=revision,
        )
        self.provisioning = Provisioning(
            thin=thin,
            granularity=device.cluster_size >> BLOCK_SHIFT,
            physical_exponent=physical_exponent,
        )
        self.blocks = device.size >> BLOCK_SHIFT
        self.modes = ModeParameters(write_cache=write_cache)
        self.commands = command_set(thin=thin)
        self.stats = Statistics()
        self.tasks = TaskSet(on_change=self.refresh, on_release=device.kick)
        self.itls: list[ItlNexus] = []
        self.lane = lane_of(device)
        self._defer = defer

    # -- nexuses ---------------------------------------------------------------------------

    def attach(self, itl: ItlNexus) -> None:
        """A nexus begins to use the unit."""
        self.itls.append(itl)
        itl.establish(UnitAttention.POWER_ON)

    def detach(self, itl: ItlNexus) -> None:
        if itl in self.itls:
            self.itls.remove(itl)

    def establish(self, attention: UnitAttention, *, besides: ItlNexus | None = None) -> None:
        """Tell every nexus, except the one that caused it."""
        for itl in self.itls:
            if itl is not besides:
                itl.establish(attention)

    def refresh(self) -> None:
        """Something changed that decides whether commands may take the short way."""
        for itl in self.itls:
            itl.refresh()

    def modes_changed(self, by: ItlNexus | None) -> None:
        self.establish(UnitAttention.MODE_CHANGED, besides=by)
        self.refresh()

    def capacity_changed(self) -> None:
        """The device has another size now."""
        self.blocks = self.device.size >> BLOCK_SHIFT
        self.establish(UnitAttention.CAPACITY_CHANGED)
        self.refresh()

    def reset(self) -> None:
        """Logical unit reset, without its tasks (SAM-5 6.3.3)."""
        self.modes.reset()
        self.establish(UnitAttention.DEVICE_RESET)
        self.refresh()

    def write_protection(self) -> Asc | None:
        """Why nothing may be written; None if it may."""
        if self.read_only or self.device.read_only:
            return Asc.WRITE_PROTECTED
        if self.modes.software_protect:
            return Asc.LOGICAL_UNIT_SOFTWARE_WRITE_PROTECTED
        return None

    # -- a command's way -------------------------------------------------------------------

    def prepare(self, task: Task) -> None:
        """All checks that need no data, in the standard's order; the task enters the task set.

        Raises `CheckCondition`.
        """
        command = self.commands.find(task.cdb)
        task.command = command
        command.check_reserved(task.cdb)
        itl = task.itl
        if command.attention and itl is not None:
            attention = itl.take_attention()
            if attention is not None:
                raise CheckCondition(attention.sense)
        if command.writes:
            protection = self.write_protection()
            if protection is not None:
                raise CheckCondition(Sense(SenseKey.DATA_PROTECT, protection))
        if command.extent is not None:
            self._check_range(task, command)
        if command.check is not None:
            command.check(self, task)
        self._check_data_out(task, command)
        task.direction = command.direction
        if command.direction is Direction.FROM_INITIATOR and task.data_out_length == 0:
            task.direction = Direction.NONE
        task.exclusive = command.exclusive or self._is_partial_block(task, command)
        task.state = TaskState.PREPARED
        if task.exclusive or task.attribute == Attribute.ORDERED:
            self.settle()  # it has to see those before it
        self.tasks.enter(task)

    def _check_range(self, task: Task, command: Command) -> None:
        assert command.extent is not None
        lba, blocks = command.extent(task.cdb)
        if lba + blocks > self.blocks:
            raise illegal_request(Asc.LOGICAL_BLOCK_ADDRESS_OUT_OF_RANGE, FieldPointer(2))
        task.range_start = lba << BLOCK_SHIFT
        task.range_end = (lba + blocks) << BLOCK_SHIFT
        if command.limited and blocks > MAX_TRANSFER_BLOCKS:
            raise invalid_cdb_field(command.length_byte)

    def check_transfer_length(self, task: Task, length: int) -> None:
        """MAXIMUM TRANSFER LENGTH, for commands it only sometimes applies to."""
        if length > MAX_TRANSFER_BLOCKS << BLOCK_SHIFT:
            assert task.command is not None
            raise invalid_cdb_field(task.command.length_byte)

    def _check_data_out(self, task: Task, command: Command) -> None:
        if command.data_out is None:
            return
        wanted = task.data_out_length = command.data_out(self, task)
        expected = task.expected_out
        if expected is None or not wanted or command.data_out_rule is DataOut.PARTIAL:
            return
        if expected < wanted or (expected > wanted and command.data_out_rule is DataOut.EXACT):
            raise data_out_error(command)

    @staticmethod
    def _is_partial_block(task: Task, command: Command) -> bool:
        """A write of a piece of a block reads the rest first, with nobody in between."""
        expected = task.expected_out
        return (
            command.data_out_rule is DataOut.PARTIAL
            and expected is not None
            and expected < task.data_out_length
            and expected % 512 != 0
        )

    def execute(self, task: Task) -> None:
        """Run a prepared task as soon as the task set allows it."""
        if task.state is not TaskState.PREPARED:
            return
        task.state = TaskState.RUNNING
        self.tasks.start(task, self._run)

    def settle(self) -> None:
        """Every command that is being executed is a task afterwards: the lane is emptied."""
        self.lane.empty()

    def adopt(self, task: Task, request: LaneRequest) -> None:
        """Put `task`, a plain READ or WRITE with all its data, in the place of `request`, which is
        in the lane."""
        self._fill(task, request.offset, request.length)
        self.tasks.enter(task)
        self.tasks.start(task, _is_running)
        access = Access.WRITE if request.writing else Access.READ
        view = task.data_out if request.writing else self.take_data_in(task, request.length)

        def done(error: StorageError | None) -> None:
            self.transferred(task, error, access)

        task.pending = self.lane.adopt(request, view, done)

    def _fill(self, task: Task, offset: int, length: int) -> None:
        task.command = command = self.commands.find(task.cdb)
        task.direction = command.direction
        task.data_out_length = len(task.data_out)
        task.range_start = offset
        task.range_end = offset + length
        task.state = TaskState.RUNNING

    def start(self, task: Task, offset: int, length: int) -> None:
        """Run a plain READ or WRITE of the range at once; see `ItlNexus.start`."""
        if len(self.tasks) >= QUEUE_LIMIT:
            if task.nexus is not None:
                task.nexus.forget(task)
            task.finish(Status.TASK_SET_FULL)
            return
        self._fill(task, offset, length)
        self.tasks.enter(task)
        self.tasks.start(task, self._run)

    def _run(self, task: Task) -> None:
        command = task.command
        assert command is not None
        try:
            if (
                len(task.data_out) < task.data_out_length
                and command.data_out_rule is not DataOut.PARTIAL
            ):
                raise data_out_error(command)
            outcome = command.handler(self, task)
        except CheckCondition as condition:
            self.check(task, condition.sense)
            return
        except StorageError as error:
            self.storage_failure(task, error)
            return
        if isinstance(outcome, bytes):
            if outcome:
                task.data_in = memoryview(outcome)[: command.allocation_length(task.cdb)]
            self.good(task)
        elif isinstance(outcome, Generator):
            execution = Execution(self, task, outcome)
            task.execution = execution
            execution.run()

    def defer(self, work: Callable[[], object]) -> bool:
        """Do `work` in a later turn of the event loop; False: there is none, go on yourself."""
        if self._defer is None:
            return False
        self._defer(work)
        return True

    def take_data_in(self, task: Task, length: int) -> memoryview:
        """A buffer for data-in, which lives until the transport has sent it."""
        buffer = self.buffers.take(length)
        task.data_in = buffer.view
        task.on_release = buffer.release
        return buffer.view

    # -- a command's end -------------------------------------------------------------------

    def transferred(self, task: Task, error: StorageError | None, access: Access) -> None:
        """A command of a single device operation has ended."""
        task.pending = None
        if self.finish_aborted(task):
            return
        if error is None:
            self.good(task)
        elif isinstance(error, ParkTimeoutError):
            self.storage_failure(task, error)
        else:
            self.check(task, storage_sense(error, access, task.range_start >> BLOCK_SHIFT))

    def good(self, task: Task) -> None:
        task.status = Status.GOOD
        self._end(task)

    def check(self, task: Task, sense: Sense) -> None:
        """End with CHECK CONDITION."""
        task.release()
        self.stats.errors += 1
        task.status = Status.CHECK_CONDITION
        task.sense = sense.pack(self.modes.descriptor_sense)
        self._end(task)

    def storage_failure(self, task: Task, error: StorageError) -> None:
        """End with what a storage error outside of any transfer means; BUSY for a request that was
        parked for too long, because it was never executed and may be repeated."""
        if isinstance(error, ParkTimeoutError):
            task.release()
            task.status = Status.BUSY
            self._end(task)
            return
        access = Access.READ if error.op == "read" else Access.WRITE
        self.check(task, storage_sense(error, access, None))

    def _end(self, task: Task) -> None:
        task.state = TaskState.ENDED
        task.execution = None
        task.data_out = EMPTY
        if task.nexus is not None:
            task.nexus.forget(task)
        task.on_complete(task)
        self.tasks.leave(task)

    # -- abort -----------------------------------------------------------------------------

    def abort(self, task: Task, ended: Callable[[], None]) -> None:
        """Abort a task: nothing of it happens after `ended` was called, and it never completes."""
        task.waiters.append(ended)
        if task.state is TaskState.ABORTED:
            return
        task.state = TaskState.ABORTED
        if task.pending is None or task.pending.cancel():
            self.finish_aborted(task)

    def finish_aborted(self, task: Task) -> bool:
        """If the task was aborted: it is over now, tell everybody.  False if it was not."""
        if task.state is not TaskState.ABORTED:
            return False
        task.pending = None
        if task.execution is not None:
            task.execution.close()
            task.execution = None
        task.release()
        task.data_out = EMPTY
        if task.nexus is not None:
            task.nexus.forget(task)
        waiters, task.waiters = task.waiters, []
        if task.on_aborted is not None:
            task.on_aborted(task)
        self.tasks.leave(task)
        for ended in waiters:
            ended()
        return True


def _is_running(task: Task) -> None:
    """A task that was begun before it was one."""


def data_out_error(command: Command) -> CheckCondition:
    """The transport brought another amount of data than the command can use."""
    if command.data_out_rule is DataOut.PARAMETERS:
        return illegal_request(Asc.PARAMETER_LIST_LENGTH_ERROR)
    return illegal_request(Asc.INVALID_FIELD_IN_COMMAND_INFORMATION_UNIT)
