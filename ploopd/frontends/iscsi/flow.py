"""What the parts of a full feature phase connection share: commands, budget, output, time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import IntEnum

from ploopd.fileio.buffers import BufferPool
from ploopd.frontends.iscsi.command import Command
from ploopd.frontends.iscsi.config import Limits
from ploopd.frontends.iscsi.parameters import Parameters
from ploopd.frontends.iscsi.pdu import FINAL, SERIAL_MASK, Opcode, RejectReason, Request
from ploopd.frontends.iscsi.transmit import Transmitter
from ploopd.storage.lane import LaneRequest


class TransportAsc(IntEnum):
    """Additional sense codes that a transport reports (RFC 7143 11.4.7.2, SPC-4 annex D)."""

    UNEXPECTED_UNSOLICITED_DATA = 0x0C0C
    NOT_ENOUGH_UNSOLICITED_DATA = 0x0C0D
    PROTOCOL_SERVICE_CRC_ERROR = 0x4705
    DATA_PHASE_ERROR = 0x4B00
    INVALID_TARGET_PORT_TRANSFER_TAG = 0x4B01
    TOO_MUCH_WRITE_DATA = 0x4B02
    ACK_NAK_TIMEOUT = 0x4B03
    DATA_OFFSET_ERROR = 0x4B05


def aborted_command_sense(asc: TransportAsc) -> bytes:
    """Fixed-format sense data: ABORTED COMMAND with `asc` (SPC-4 4.5.3)."""
    sense = bytearray(18)
    sense[0] = 0x70
    sense[2] = 0x0B
    sense[7] = 10
    sense[12:14] = asc.to_bytes(2, "big")
    return bytes(sense)


class Budget:
    """Bytes of data that the commands of one connection hold in memory.

    Whoever does not fit waits for its turn.  One command always fits, however large it is: when no
    command has all that it needs, the first one gets it, whatever the others hold while they wait.
    """

    __slots__ = ("_granting", "_limit", "_served", "_used", "_waiting")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._served: set[Command] = set()
        self._granting = False
        self._waiting: deque[tuple[Command, int, Callable[[Command], None]]] = deque()

    @property
    def used(self) -> int:
        return self._used

    @property
    def exhausted(self) -> bool:
        """Twice the limit is taken: by data that came without being asked for."""
        return self._used > 2 * self._limit

    def force(self, command: Command, amount: int) -> None:
        """Account for memory that is needed at once."""
        self._used += amount - command.reserved
        command.reserved = amount

    def reserve(self, command: Command, amount: int, go: Callable[[Command], None]) -> None:
        """Call `go(command)` when there is room for `amount`, usually at once."""
        if self._waiting or not self._fits(command, amount):
            self._waiting.append((command, amount, go))
            return
        self._served.add(command)
        self.force(command, amount)
        go(command)

    def _fits(self, command: Command, amount: int) -> bool:
        extra = amount - command.reserved
        return not self._served or extra <= 0 or self._used + extra <= self._limit

    def try_reserve(self, command: Command, amount: int) -> bool:
        """Room for `amount` for a command that has none yet, if it need not wait for it."""
        if self._waiting or not self._fits(command, amount):
            return False
        self._served.add(command)
        self.force(command, amount)
        return True

    def release(self, command: Command) -> None:
        """The command's share is free again; those who waited go on."""
        self._used -= command.reserved
        command.reserved = 0
        self._served.discard(command)
        if self._granting:
            return
        # A loop, not a recursion: a command may end, and release its share, inside `go`.
        self._granting = True
        try:
            while self._waiting and self._fits(*self._waiting[0][:2]):
                waiting, amount, go = self._waiting.popleft()
                self._served.add(waiting)
                self.force(waiting, amount)
                go(waiting)
        finally:
            self._granting = False

    def forget(self, command: Command) -> None:
        """The command has ended while it waited."""
        if self._waiting:
            self._waiting = deque([entry for entry in self._waiting if entry[0] is not command])
        self.release(command)


class Flow:
    """State and small services for the parts of one connection.

    `commands` maps initiator task tags to commands in execution, `lane` those of plain READs and
    WRITEs that are in the lane.  `busy` is true inside a batch;
    outside of one, whoever queues output calls `touch`, so that the server is told once.
    """

    __slots__ = (
        "_on_dirty",
        "budget",
        "buffers",
        "busy",
        "close_reason",
        "commands",
        "immediate",
        "lane",
        "limits",
        "now",
        "parameters",
        "tx",
    )

    def __init__(
        self,
        tx: Transmitter,
        limits: Limits,
        buffers: BufferPool,
        on_dirty: Callable[[], None],
    ) -> None:
        self.tx = tx
        self.limits = limits
        self.buffers = buffers
        self.parameters = Parameters()
        self.budget = Budget(limits.inflight_bytes)
        self.commands: dict[int, Command] = {}
        self.lane: dict[int, LaneRequest] = {}
        self.immediate = 0
        self.busy = False
        self.close_reason: str | None = None
        self.now = 0.0
        self._on_dirty = on_dirty

    def touch(self) -> None:
        """Output or a wish to close came up; tell the server unless a batch is under way."""
        if not self.busy:
            self._on_dirty()

    def close(self, reason: str) -> None:
        """End the connection as soon as the output has been sent."""
        if self.close_reason is None:
            self.close_reason = reason
            self.touch()

    def find(self, tag: int) -> Command | None:
        """The command with that task tag; one in the lane leaves it by being looked at."""
        request = self.lane.get(tag)
        if request is not None:
            request.promote()
        return self.commands.get(tag)

    def enter(self, command: Command) -> None:
        """The command occupies its task tag, and its place in the window."""
        self.commands[command.tag] = command
        if not command.counted:
            self.immediate += 1

    def leave(self, command: Command) -> None:
        """The command has ended; its place in the window is free.  Once per command."""
        if self.commands.get(command.tag) is not command:
            return
        del self.commands[command.tag]
        if command.counted:
            self.open_window()
        else:
            self.immediate -= 1

    def open_window(self) -> None:
        """One more request may be sent: something that took a place has ended."""
        tx = self.tx
        tx.max_cmd_sn = (tx.max_cmd_sn + 1) & SERIAL_MASK

    def reject(self, request: Request, reason: RejectReason) -> None:
        """Answer a PDU that cannot be accepted with its own header (RFC 7143 11.17)."""
        self.tx.emit(
            Opcode.REJECT,
            FINAL,
            byte2=reason,
            tag=0xFFFFFFFF,
            data=bytes(request.bhs[:48]) + bytes(request.ahs),
        )
