"""Commands that take several steps: generators that yield device operations.

A *script* is a generator; it yields callables that start one device operation with a completion
(`lambda done: device.read(offset, view, done)`), is resumed when the operation has ended, and gets
its `StorageError` thrown in where it waited.  Returning ends the command with GOOD, raising
`CheckCondition` with CHECK CONDITION.  `finally` clauses run when the command is aborted, too.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Final

from ploopd.errors import StorageError
from ploopd.scsi.sense import CheckCondition
from ploopd.scsi.task import Task
from ploopd.storage.device import Done, Pending

if TYPE_CHECKING:
    from ploopd.scsi.logical_unit import LogicalUnit

Start = Callable[[Done], Pending]
Script = Generator[Start, None, None]


class _Issuing:
    """Stands for an operation while the call that starts it has not returned."""

    def cancel(self) -> bool:
        return False


ISSUING: Final = _Issuing()

SLICE: Final = 0.002
"""Seconds for which one command may keep the event loop before it lets others run."""


class Execution:
    """Drives one script.  The device may complete an operation inside the call that starts it, so
    the driver is a loop; a command that only meets such operations gives way after `SLICE`."""

    __slots__ = ("_ended", "_error", "_inside", "_issuing", "_script", "_task", "_unit")

    def __init__(self, unit: LogicalUnit, task: Task, script: Script) -> None:
        self._unit = unit
        self._task = task
        self._script = script
        self._error: StorageError | None = None
        self._issuing = False
        self._inside = False
        self._ended = False

    def run(self) -> None:
        """Advance until the script ends, waits for the device, or has used its time."""
        if self._ended:
            return
        deadline = self._unit.clock() + SLICE
        while True:
            start = self._advance()
            if start is None:
                return
            self._issuing, self._inside = True, False
            self._task.pending = ISSUING
            pending = start(self._done)
            self._issuing = False
            if not self._inside:
                self._task.pending = pending
                return
            self._task.pending = None
            if self._unit.finish_aborted(self._task):
                return
            if self._unit.clock() > deadline and self._unit.defer(self._resume):
                return

    def close(self) -> None:
        """The task was aborted and nothing of it is under way any more."""
        self._ended = True
        self._script.close()

    def _advance(self) -> Start | None:
        """The next operation, or None when the command has ended."""
        error, self._error = self._error, None
        try:
            return next(self._script) if error is None else self._script.throw(error)
        except StopIteration:
            self._ended = True
            self._unit.good(self._task)
        except CheckCondition as condition:
            self._ended = True
            self._unit.check(self._task, condition.sense)
        except StorageError as failure:
            self._ended = True
            self._unit.storage_failure(self._task, failure)
        return None

    def _done(self, error: StorageError | None) -> None:
        self._error = error
        if self._issuing:
            self._inside = True
            return
        self._task.pending = None
        if self._unit.finish_aborted(self._task):
            return
        self._resume()

    def _resume(self) -> None:
        """Go on outside of a front end's batch, which would have kicked the device."""
        self.run()
        self._unit.device.kick()
