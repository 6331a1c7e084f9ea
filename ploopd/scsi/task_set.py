"""The task set of a logical unit: who may run now, who waits for whom.

Source: SAM-5 clause 8 (task set management): a SIMPLE task waits for the ORDERED ones before it, an
ORDERED task for everything before it, a HEAD OF QUEUE task for nothing.  On top of that come
exclusive LBA ranges, which make COMPARE AND WRITE and ORWRITE atomic (SBC-3 5.2, 5.24).

"Before" is always the order of arrival (`Task.sequence`), so that no two tasks wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ploopd.scsi.task import Attribute, Task, TaskState


def overlaps(one: Task, other: Task) -> bool:
    return one.range_start < other.range_end and other.range_start < one.range_end


class TaskSet:
    """All tasks of one logical unit from `enter` (prepared) to `leave` (ended).

    `quiet`: no ORDERED and no exclusive task is in the set, so that anything may run at once.
    `on_change` is called when `quiet` changes, `on_release` when tasks that waited have started.
    """

    __slots__ = (
        "_draining",
        "_on_change",
        "_on_release",
        "_running",
        "_sequence",
        "_special",
        "_waiting",
        "tasks",
    )

    def __init__(self, on_change: Callable[[], None], on_release: Callable[[], None]) -> None:
        self.tasks: dict[Task, None] = {}
        self._running: dict[Task, None] = {}
        self._waiting: list[tuple[Task, Callable[[Task], None]]] = []
        self._sequence = 0
        self._special = 0
        self._draining = False
        self._on_change = on_change
        self._on_release = on_release

    @property
    def quiet(self) -> bool:
        return self._special == 0

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def enter(self, task: Task) -> None:
        """A prepared task takes its place in the order."""
        self._sequence += 1
        task.sequence = self._sequence
        self.tasks[task] = None
        if task.exclusive or task.attribute == Attribute.ORDERED:
            self._special += 1
            if self._special == 1:
                self._on_change()

    def start(self, task: Task, run: Callable[[Task], None]) -> None:
        """Call `run(task)` as soon as the rules allow it, usually at once."""
        if self._special and not self._may_start(task):
            self._waiting.append((task, run))
            self._waiting.sort(key=lambda entry: entry[0].sequence)
            return
        self._running[task] = None
        run(task)

    def leave(self, task: Task) -> None:
        """The task has ended, whichever way; tasks that waited for it start now."""
        if task not in self.tasks:
            return
        del self.tasks[task]
        if self._running.pop(task, False) is False and self._waiting:
            self._waiting = [entry for entry in self._waiting if entry[0] is not task]
        if task.exclusive or task.attribute == Attribute.ORDERED:
            self._special -= 1
            if self._special == 0:
                self._on_change()
        if self._waiting and not self._draining:
            self._drain()

    def _drain(self) -> None:
        """Start what may start.  A loop, not a recursion: tasks may end inside `run`."""
        started = False
        self._draining = True
        try:
            while True:
                ready = next((e for e in self._waiting if self._may_start(e[0])), None)
                if ready is None:
                    break
                self._waiting.remove(ready)
                task, run = ready
                self._running[task] = None
                started = True
                run(task)
        finally:
            self._draining = False
        if started:
            self._on_release()

    def _may_start(self, task: Task) -> bool:
        if task.state is not TaskState.RUNNING:
            return False
        return not self._blocked_by_order(task) and not self._blocked_by_range(task)

    def _blocked_by_order(self, task: Task) -> bool:
        if task.attribute == Attribute.HEAD_OF_QUEUE:
            return False
        ordered = task.attribute == Attribute.ORDERED
        for other in self.tasks:
            if other.sequence >= task.sequence:
                break
            if ordered or other.attribute == Attribute.ORDERED:
                return True
        return False

    def _blocked_by_range(self, task: Task) -> bool:
        if task.range_start == task.range_end:
            return False
        for other in self._running:
            if (task.exclusive or other.exclusive) and overlaps(task, other):
                return True
        return any(
            (task.exclusive or other.exclusive) and overlaps(task, other)
            for other, _ in self._waiting
            if other.sequence < task.sequence
        )
