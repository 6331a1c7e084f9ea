"""A task that sleeps until somebody in the event loop has work for it."""

from __future__ import annotations

import trio


class Sleeper:
    """A task that sleeps until `wake`: cheaper than an event, and it can be used again."""

    __slots__ = ("_pending", "_task")

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None
        self._pending = False

    def wake(self) -> None:
        """Let the task run; remembered if it is not asleep."""
        task, self._task = self._task, None
        if task is None:
            self._pending = True
        else:
            trio.lowlevel.reschedule(task)

    async def sleep(self) -> None:
        if self._pending:
            self._pending = False
            await trio.lowlevel.checkpoint()
            return

        def abort(_: object) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)
