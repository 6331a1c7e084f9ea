"""Operations as coroutines: start, kick, sleep until the completion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ploopd.errors import StorageError

if TYPE_CHECKING:
    from ploopd.fileio.operation_queue import OperationQueue
    from ploopd.fileio.operations import Operation


class Waiter:
    """The completion of a task that sleeps until then."""

    __slots__ = ("ended", "error", "task")

    def __init__(self) -> None:
        self.task: trio.lowlevel.Task | None = None
        self.ended = False
        self.error: StorageError | None = None

    def __call__(self, error: StorageError | None) -> None:
        self.ended = True
        self.error = error
        if self.task is not None:
            task, self.task = self.task, None
            trio.lowlevel.reschedule(task)


async def wait_for(queue: OperationQueue, operation: Operation) -> None:
    """Run one operation to its end.  Raises `StorageError`.

    Always a checkpoint.  Cancelled, it disowns the operation: whether that happens is open, and its
    result is void.
    """
    waiter = Waiter()
    operation.done = waiter
    queue.start(operation)
    queue.backend.kick()
    if waiter.ended:
        await trio.lowlevel.cancel_shielded_checkpoint()
    else:
        waiter.task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            waiter.task = None
            operation.done = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
    if waiter.error is not None:
        raise waiter.error
