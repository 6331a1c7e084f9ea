"""I_T nexuses and I_T_L nexuses: what a front end sees of a target.

Source: SAM-5 4.7, 5.1 (Execute Command), clause 7 (task management).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ploopd.errors import StorageError
from ploopd.scsi.cdb import BLOCK_SHIFT, CDB6, CDB10, CDB12, CDB16
from ploopd.scsi.inquiry import MAX_TRANSFER_BLOCKS
from ploopd.scsi.logical_unit import QUEUE_LIMIT, LogicalUnit, Statistics
from ploopd.scsi.missing_lun import MissingLun
from ploopd.scsi.sense import CheckCondition
from ploopd.scsi.task import Status, Task
from ploopd.scsi.task_management import TaskFunction, TmfResult, abort_all, manage
from ploopd.scsi.unit_attention import UnitAttention, UnitAttentions
from ploopd.storage.device import BlockDevice, views_of, write_views_of
from ploopd.storage.lane import LaneRequest

if TYPE_CHECKING:
    from ploopd.scsi.target import Target

_unpack_6: Final = CDB6.unpack_from
_unpack_10: Final = CDB10.unpack_from
_unpack_12: Final = CDB12.unpack_from
_unpack_16: Final = CDB16.unpack_from


def single_level_lun(field: int) -> int | None:
    """The number in an 8-byte LUN field: peripheral device addressing on bus 0, or flat space
    addressing (SAM-5 4.7.7); None for anything else."""
    first, rest = field >> 48, field & 0xFFFF_FFFF_FFFF
    if rest:
        return None
    if first < 0x100:
        return first
    return first & 0x3FFF if first >> 14 == 1 else None


class ItlNexus:
    """One initiator port's view of one logical unit, and the short way for plain READ and WRITE.

    `read_range` and `write_range` answer the only question that matters for speed: may this CDB run
    right now, without a task?  Everything that could say no is kept up to date in two flags.
    `streams`: WRITEs without a task whose data the transport is still receiving.
    """

    __slots__ = (
        "_attentions",
        "_blocks",
        "_device_read",
        "_device_view",
        "_device_write",
        "_device_write_view",
        "_quick_read",
        "_quick_write",
        "lane",
        "lun",
        "nexus",
        "stats",
        "streams",
        "unit",
    )

    def __init__(self, nexus: Nexus, lun: int, unit: LogicalUnit) -> None:
        self.nexus = nexus
        self.lun = lun
        self.unit = unit
        self.stats: Statistics = unit.stats
        self.streams = 0
        self._attentions = UnitAttentions()
        device: BlockDevice = unit.device
        self._device_read = device.try_read
        self._device_view = views_of(device)
        self._device_write = device.try_write
        self._device_write_view = write_views_of(device)
        self.lane = unit.lane
        self._blocks = unit.blocks
        self._quick_read = False
        self._quick_write = False
        unit.attach(self)
        self.refresh()

    def refresh(self) -> None:
        """Recompute the flags of the short way."""
        unit = self.unit
        self._blocks = unit.blocks
        self._quick_read = unit.tasks.quiet and not len(self._attentions)
        self._quick_write = (
            self._quick_read and unit.modes.write_cache and unit.write_protection() is None
        )

    def establish(self, attention: UnitAttention) -> None:
        self._attentions.establish(attention)
        self.refresh()

    def take_attention(self) -> UnitAttention | None:
        """The next pending unit attention, which is cleared by reporting it."""
        attention = self._attentions.take()
        if attention is not None:
            self.refresh()
        return attention

    def clear_attention(self, attention: UnitAttention) -> None:
        self._attentions.clear(attention)
        self.refresh()

    def read_range(self, cdb: memoryview | bytes) -> tuple[int, int] | None:
        """(offset, length) in bytes if `cdb` is a READ that may run at once, else None."""
        if not self._quick_read:
            return None
        opcode = cdb[0]
        if opcode == 0x28:
            _, flags, lba, group, blocks, control = _unpack_10(cdb)
        elif opcode == 0x88:
            _, flags, lba, blocks, group, control = _unpack_16(cdb)
        elif opcode == 0x08 or opcode == 0xA8:
            return self._seldom(cdb, opcode)
        else:
            return None
        if (
            flags
            or group
            or control
            or not 0 < blocks <= MAX_TRANSFER_BLOCKS
            or lba + blocks > self._blocks
        ):
            return None
        return lba << BLOCK_SHIFT, blocks << BLOCK_SHIFT

    def write_range(self, cdb: memoryview | bytes) -> tuple[int, int] | None:
        """(offset, length) in bytes if `cdb` is a WRITE that may run at once, else None."""
        if not self._quick_write:
            return None
        opcode = cdb[0]
        if opcode == 0x2A:
            _, flags, lba, group, blocks, control = _unpack_10(cdb)
        elif opcode == 0x8A:
            _, flags, lba, blocks, group, control = _unpack_16(cdb)
        elif opcode == 0x0A or opcode == 0xAA:
            return self._seldom(cdb, opcode)
        else:
            return None
        if (
            flags
            or group
            or control
            or not 0 < blocks <= MAX_TRANSFER_BLOCKS
            or lba + blocks > self._blocks
        ):
            return None
        return lba << BLOCK_SHIFT, blocks << BLOCK_SHIFT

    def _seldom(self, cdb: memoryview | bytes, opcode: int) -> tuple[int, int] | None:
        """The 6 and 12 byte forms, which modern initiators do not use."""
        if opcode < 0x20:
            _, high, low, blocks, control = _unpack_6(cdb)
            if high > 0x1F or control:
                return None
            lba = high << 16 | low
            blocks = blocks or 256
        else:
            _, flags, lba, blocks, group, control = _unpack_12(cdb)
            if flags or group or control or not 0 < blocks <= MAX_TRANSFER_BLOCKS:
                return None
        if lba + blocks > self._blocks:
            return None
        return lba << BLOCK_SHIFT, blocks << BLOCK_SHIFT

    def try_read(self, offset: int, view: memoryview) -> bool:
        """Fill `view` now, or say False: then the command takes the long way, which also reports
        the error if there is one."""
        try:
            if not self._device_read(offset, view):
                return False
        except StorageError:
            return False
        stats = self.stats
        stats.reads += 1
        stats.read_bytes += len(view)
        return True

    def try_view(self, offset: int, length: int) -> memoryview | None:
        """The bytes to be sent now, before anything else is executed, or None: then `try_read`.

        Whoever has a view and cannot send it at once reads instead, by `read_viewed`."""
        view = self._device_view(offset, length)
        if view is not None:
            stats = self.stats
            stats.reads += 1
            stats.read_bytes += length
        return view

    def read_viewed(self, offset: int, view: memoryview) -> bool:
        """`try_read` of bytes that are counted already."""
        try:
            return self._device_read(offset, view)
        except StorageError:
            return False

    def begin(self, request: LaneRequest) -> bool:
        """Execute `request`, of a range that `read_range` or `write_range` gave, in the lane.

        False, and nothing has happened: the command needs a task."""
        if not self.lane.begin(request):
            return False
        self.nexus.touched.add(self.unit)
        stats = self.stats
        if request.writing:
            stats.writes += 1
            stats.written_bytes += request.length
        else:
            stats.reads += 1
            stats.read_bytes += request.length
        return True

    def adopt(self, task: Task, request: LaneRequest) -> None:
        """`task` takes the place of `request`, which is in the lane."""
        self.nexus.begin(task, self)
        self.unit.adopt(task, request)

    def start(self, task: Task, offset: int, length: int) -> None:
        """Run `task`, a READ or WRITE of the range that `read_range` or `write_range` gave and that
        `try_read` or `try_write` declined; a WRITE has all its `data_out`.

        It may run without being prepared: all that `Nexus.prepare` checks is known to be right,
        except that the task set may be full.
        """
        self.nexus.begin(task, self)
        self.unit.start(task, offset, length)

    def try_write(self, offset: int, view: memoryview) -> bool:
        """Write `view` now, or say False: then the command takes the long way.

        A transport may call this for the pieces of a WRITE as they come in, so what `write_range`
        allowed is looked at again."""
        if not self._quick_write:
            return False
        try:
            if not self._device_write(offset, view):
                return False
        except StorageError:
            return False
        stats = self.stats
        stats.writes += 1
        stats.written_bytes += len(view)
        return True

    def try_write_view(self, offset: int, length: int) -> memoryview | None:
        """Where the bytes of a range that `write_range` gave are to be written now, before anything
        else is executed, or None: then `try_write`.

        Whoever has written all of it says so by `written`."""
        return self._device_write_view(offset, length)

    def write_part(self, offset: int, view: memoryview) -> bool:
        """`try_write` of bytes that are counted by `written`, or written again by `try_write`."""
        try:
            return self._device_write(offset, view)
        except StorageError:
            return False

    def written(self, length: int) -> None:
        """A WRITE of so many bytes has been executed through a view."""
        stats = self.stats
        stats.writes += 1
        stats.written_bytes += length


class Nexus:
    """One I_T nexus: an initiator port logged in to a target port."""

    def __init__(self, target: Target, initiator_port: str, target_port: str) -> None:
        self.target = target
        self.initiator_port = initiator_port
        self.target_port = target_port
        self.tasks: dict[int, Task] = {}
        self._fields: dict[int, ItlNexus] = {}
        self._itls: dict[int, ItlNexus] = {}
        self.touched: set[LogicalUnit] = set()
        self._missing = MissingLun()
        self._closed = False

    # -- logical units ---------------------------------------------------------------------

    def itl(self, lun_field: int) -> ItlNexus | None:
        """The I_T_L nexus of an 8-byte LUN field; None if there is no such logical unit."""
        found = self._fields.get(lun_field)
        return found if found is not None else self._find_itl(lun_field)

    def _find_itl(self, lun_field: int) -> ItlNexus | None:
        lun = single_level_lun(lun_field)
        unit = None if lun is None or self._closed else self.target.units.get(lun)
        if lun is None or unit is None:
            return None
        itl = self._itls.get(lun)
        if itl is None:
            itl = self._itls[lun] = ItlNexus(self, lun, unit)
        self._fields[lun_field] = itl
        return itl

    @property
    def itls(self) -> list[ItlNexus]:
        """Those that were used so far."""
        return list(self._itls.values())

    def drop_lun(self, lun: int) -> None:
        """The target has taken a logical unit away."""
        itl = self._itls.pop(lun, None)
        if itl is not None:
            itl.unit.settle()
            itl.unit.detach(itl)
            self._fields = {field: i for field, i in self._fields.items() if i is not itl}

    def establish(self, attention: UnitAttention) -> None:
        """A unit attention for this nexus on every logical unit it uses."""
        for itl in self._itls.values():
            itl.establish(attention)

    def clear_attention(self, attention: UnitAttention) -> None:
        for itl in self._itls.values():
            itl.clear_attention(attention)

    # -- commands --------------------------------------------------------------------------

    def prepare(self, task: Task) -> bool:
        """Check everything that can be checked before data-out.  True: gather `data_out_length`
        bytes and call `execute`.  False: the task has been completed with a status."""
        task.nexus = self
        itl = task.itl = self.itl(task.lun)
        if itl is None:
            self._missing.answer(task)
            return False
        unit = itl.unit
        if len(unit.tasks) >= QUEUE_LIMIT:
            task.finish(Status.TASK_SET_FULL)
            return False
        try:
            unit.prepare(task)
        except CheckCondition as condition:
            unit.stats.errors += 1
            sense = condition.sense.pack(unit.modes.descriptor_sense)
            task.finish(Status.CHECK_CONDITION, sense)
            return False
        self.tasks[task.tag] = task
        return True

    def begin(self, task: Task, itl: ItlNexus) -> None:
        """`task` is one of this nexus from now on, and runs on `itl`'s unit in this batch."""
        task.nexus = self
        task.itl = itl
        self.tasks[task.tag] = task
        self.touched.add(itl.unit)

    def execute(self, task: Task) -> None:
        """Run a prepared task; `task.on_complete` is called when it ends.  A task that has been
        aborted in the meantime is left alone."""
        itl = task.itl
        if itl is not None:
            self.touched.add(itl.unit)
            itl.unit.execute(task)

    def kick(self) -> None:
        """Hand everything that `execute` started to the kernel: once per batch."""
        if self.touched:
            touched, self.touched = self.touched, set()
            for unit in touched:
                unit.device.kick()

    def settle(self) -> None:
        """Every command of the target's units that is being executed is a task afterwards."""
        for unit in self.target.units.values():
            unit.settle()

    def forget(self, task: Task) -> None:
        """The task has ended."""
        if self.tasks.get(task.tag) is task:
            del self.tasks[task.tag]

    # -- task management -------------------------------------------------------------------

    def task_management(
        self,
        function: TaskFunction,
        lun: int,
        tag: int | None,
        done: Callable[[TmfResult], None],
    ) -> None:
        """Carry out a task management function; `lun` is the 8-byte field.  `done` is called when
        every task it affects has ended, possibly before this returns."""
        self.settle()
        manage(self, function, lun, tag, done)

    def close(self, done: Callable[[], None] | None = None) -> None:
        """I_T nexus loss: all its tasks are aborted, nothing of it is remembered.  `done` is called
        when the last of its tasks has ended."""
        if self._closed:
            return
        self._closed = True
        self.settle()
        for itl in self._itls.values():
            itl.unit.detach(itl)
        if self in self.target.nexuses:
            self.target.nexuses.remove(self)
        abort_all(list(self.tasks.values()), done if done is not None else lambda: None)
        self._itls.clear()
        self._fields.clear()
