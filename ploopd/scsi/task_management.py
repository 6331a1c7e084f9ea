"""Task management functions.

Source: SAM-5 clause 7; RFC 7143 11.5, 11.6 and RFC 7144 4 for the numbers.  A function is answered
when every task it aborts has really ended: a write that is being executed is awaited, one that the
gate has parked is dropped and never reaches the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import TYPE_CHECKING

from ploopd.scsi.task import Task
from ploopd.scsi.unit_attention import UnitAttention

if TYPE_CHECKING:
    from ploopd.scsi.logical_unit import LogicalUnit
    from ploopd.scsi.nexus import ItlNexus, Nexus

Answer = Callable[["TmfResult"], None]


class TaskFunction(IntEnum):
    """RFC 7143 11.5.1 and RFC 7144 4.1."""

    ABORT_TASK = 1
    ABORT_TASK_SET = 2
    CLEAR_ACA = 3
    CLEAR_TASK_SET = 4
    LOGICAL_UNIT_RESET = 5
    TARGET_WARM_RESET = 6
    TARGET_COLD_RESET = 7
    TASK_REASSIGN = 8
    QUERY_TASK = 9
    QUERY_TASK_SET = 10
    I_T_NEXUS_RESET = 11
    QUERY_ASYNCHRONOUS_EVENT = 12


class TmfResult(IntEnum):
    """RFC 7143 11.6.1 and RFC 7144 4.2."""

    COMPLETE = 0
    NO_TASK = 1
    NO_LUN = 2
    TASK_STILL_ALLEGIANT = 3
    REASSIGNMENT_NOT_SUPPORTED = 4
    NOT_SUPPORTED = 5
    AUTHORIZATION_FAILED = 6
    SUCCEEDED = 7
    REJECTED = 255


class Countdown:
    """Calls `done` when as many calls have come as were announced; at once for none."""

    __slots__ = ("_done", "_left")

    def __init__(self, count: int, done: Callable[[], None]) -> None:
        self._left = count
        self._done = done
        if count == 0:
            done()

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._done()


def abort_all(tasks: Iterable[Task], done: Callable[[], None]) -> None:
    """Abort tasks; `done` when the last one has ended.  Those of no nexus are not ours to abort."""
    victims = [task for task in tasks if task.itl is not None]
    ended = Countdown(len(victims), done)
    # The youngest first: an abort lets the tasks start that waited for it.
    for task in sorted(victims, key=lambda task: task.sequence, reverse=True):
        if task.itl is not None:
            task.itl.unit.abort(task, ended)


def manage(nexus: Nexus, function: TaskFunction, lun: int, tag: int | None, done: Answer) -> None:
    """Carry out `function` for `nexus`."""

    def complete() -> None:
        done(TmfResult.COMPLETE)

    match function:
        case TaskFunction.ABORT_TASK:
            _abort_task(nexus, tag, done)
        case TaskFunction.QUERY_TASK:
            done(TmfResult.SUCCEEDED if tag in nexus.tasks else TmfResult.COMPLETE)
        case TaskFunction.TARGET_WARM_RESET | TaskFunction.TARGET_COLD_RESET:
            reset_units(nexus.target.units.values(), complete)
        case TaskFunction.I_T_NEXUS_RESET:
            nexus.establish(UnitAttention.NEXUS_LOSS)
            abort_all(nexus.tasks.values(), complete)
        case (
            TaskFunction.ABORT_TASK_SET
            | TaskFunction.CLEAR_TASK_SET
            | TaskFunction.LOGICAL_UNIT_RESET
            | TaskFunction.QUERY_TASK_SET
        ):
            itl = nexus.itl(lun)
            if itl is None:
                done(TmfResult.NO_LUN)
            else:
                _manage_unit(itl, function, done)
        case TaskFunction.TASK_REASSIGN:
            done(TmfResult.REASSIGNMENT_NOT_SUPPORTED)
        case _:
            done(TmfResult.NOT_SUPPORTED)


def _abort_task(nexus: Nexus, tag: int | None, done: Answer) -> None:
    task = nexus.tasks.get(tag) if tag is not None else None
    if task is None:
        done(TmfResult.NO_TASK)
    else:
        abort_all([task], lambda: done(TmfResult.COMPLETE))


def _manage_unit(itl: ItlNexus, function: TaskFunction, done: Answer) -> None:
    """The functions that affect one logical unit."""

    def complete() -> None:
        done(TmfResult.COMPLETE)

    unit, own = itl.unit, [task for task in itl.unit.tasks if task.itl is itl]
    match function:
        case TaskFunction.QUERY_TASK_SET:
            done(TmfResult.SUCCEEDED if own else TmfResult.COMPLETE)
        case TaskFunction.ABORT_TASK_SET:
            abort_all(own, complete)
        case TaskFunction.CLEAR_TASK_SET:
            others = {task.itl for task in unit.tasks if task.itl is not None}
            # The unit attention also keeps the rest of a streamed write from being written.
            for other in others.union(itl for itl in unit.itls if itl.streams):
                if other.nexus is not itl.nexus:
                    other.establish(UnitAttention.COMMANDS_CLEARED)
            abort_all(list(unit.tasks), complete)
        case _:
            reset_units([unit], complete)


def reset_units(units: Iterable[LogicalUnit], done: Callable[[], None]) -> None:
    """Reset logical units: all their tasks are aborted, mode parameters go back to the defaults,
    every nexus is told."""
    chosen = list(units)
    ended = Countdown(len(chosen), done)
    for unit in chosen:
        unit.reset()
        abort_all(list(unit.tasks), ended)
