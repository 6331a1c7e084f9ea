"""A SCSI command in execution: the value that front ends and logical units pass to each other.

Source: SAM-5 5.1 (the Execute Command procedure call), SPC-4 for status and sense.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, IntEnum, auto
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ploopd.scsi.commands.command import Command
    from ploopd.scsi.execution import Execution
    from ploopd.scsi.nexus import ItlNexus, Nexus
    from ploopd.storage.device import Pending

EMPTY: Final = memoryview(b"")


class Status(IntEnum):
    """SAM-5 5.3.1 status codes."""

    GOOD = 0x00
    CHECK_CONDITION = 0x02
    CONDITION_MET = 0x04
    BUSY = 0x08
    RESERVATION_CONFLICT = 0x18
    TASK_SET_FULL = 0x28
    TASK_ABORTED = 0x40


class Direction(Enum):
    """Which way a command moves data, from its row in the command table."""

    NONE = auto()
    TO_INITIATOR = auto()
    FROM_INITIATOR = auto()


class Attribute(IntEnum):
    """SAM-5 8.2 task attributes, with the numbers of the iSCSI ATTR field."""

    UNTAGGED = 0
    SIMPLE = 1
    ORDERED = 2
    HEAD_OF_QUEUE = 3
    ACA = 4


class TaskState(Enum):
    """A task's life: prepared → (data-out gathered) → running → ended."""

    NEW = auto()
    PREPARED = auto()
    RUNNING = auto()
    ENDED = auto()
    ABORTED = auto()


class Task:
    """One command from one I_T_L nexus.

    The front end fills `tag`, `lun`, `cdb`, `attribute`, `expected_out` and `on_complete`, calls
    `Nexus.prepare`, gathers `data_out` and calls `Nexus.execute`.  `data_out_length` is what the
    command itself asks for; a transport that announced fewer bytes (`expected_out`) gathers only
    those, and a command that cannot live with fewer has failed in `prepare` already.  `data_out` is
    not touched by the transport before the task has ended.

    `on_complete(task)` is called exactly once when the task ends with a status, possibly before
    `prepare` or `execute` returns, and never for a task that was aborted: that one ends in one call
    of `on_aborted(task)`, if there is one, when nothing uses its buffers any more.

    After completion: `status`, `sense` (bytes, empty unless CHECK CONDITION) and `data_in` (what to
    send; at most as long as the command's own allocation or transfer length; the transport cuts it
    to what the initiator expects and computes the residual).  The transport calls `release()` when
    `data_in` has been sent.
    """

    __slots__ = (
        "attribute",
        "cdb",
        "command",
        "data_in",
        "data_out",
        "data_out_length",
        "direction",
        "exclusive",
        "execution",
        "expected_out",
        "itl",
        "lun",
        "nexus",
        "on_aborted",
        "on_complete",
        "on_release",
        "pending",
        "range_end",
        "range_start",
        "sense",
        "sequence",
        "state",
        "status",
        "tag",
        "transport",
        "waiters",
    )

    def __init__(
        self,
        *,
        tag: int,
        lun: int,
        cdb: bytes,
        on_complete: Callable[[Task], None],
        attribute: int = 1,
        transport: object = None,
        expected_out: int | None = None,
        on_aborted: Callable[[Task], None] | None = None,
    ) -> None:
        """`lun` is the 8-byte LUN field as a big-endian integer; `cdb` has its full length (at
        least 16 bytes, zero padded); `attribute` is SAM's (1 simple, 2 ordered, 3 head of queue);
        `transport` is whatever the front end wants to find again; `expected_out` is how many bytes
        the initiator announced to send, None if the transport does not know."""
        self.tag = tag
        self.lun = lun
        self.cdb = cdb
        self.attribute = attribute
        self.on_complete = on_complete
        self.on_aborted = on_aborted
        self.transport = transport
        self.expected_out = expected_out
        self.nexus: Nexus | None = None
        self.itl: ItlNexus | None = None
        self.state = TaskState.NEW
        self.direction = Direction.NONE
        self.data_out: memoryview = EMPTY
        self.data_out_length = 0
        self.data_in: memoryview = EMPTY
        self.status: int = Status.GOOD
        self.sense = b""
        self.pending: Pending | None = None
        self.on_release: Callable[[], None] | None = None
        self.range_start = 0
        self.range_end = 0
        self.exclusive = False
        self.sequence = 0
        self.command: Command | None = None
        self.execution: Execution | None = None
        self.waiters: list[Callable[[], None]] = []

    def finish(self, status: Status, sense: bytes = b"") -> None:
        """End a task that never entered a task set."""
        self.status = status
        self.sense = sense
        self.state = TaskState.ENDED
        self.on_complete(self)

    def release(self) -> None:
        """Give the buffer behind `data_in` back; harmless when there is none."""
        self.data_in = EMPTY
        if self.on_release is not None:
            release, self.on_release = self.on_release, None
            release()
