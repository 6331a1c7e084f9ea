"""The data phase of writes: immediate and unsolicited data, R2T, Data-Out.

Source: RFC 7143 4.2.5.2, 11.7, 11.8.  Two ways for the bytes:

* *streaming*: a plain WRITE whose lengths agree writes each piece straight from the receive buffer
  to the device as it arrives.  When the device cannot take a piece at once, the rest of the command
  is gathered and executed as a WRITE of the remainder;
* *gathering*: the data is collected in a buffer, then the command is executed.
"""

from __future__ import annotations

from typing import Protocol

from ploopd.frontends.iscsi.command import BLOCK, Command, ReadyToTransfer
from ploopd.frontends.iscsi.flow import Flow, TransportAsc
from ploopd.frontends.iscsi.pdu import (
    DATA_OUT_TAIL,
    FINAL,
    RESERVED_TAG,
    Opcode,
    RejectReason,
    Request,
)

MAX_STALE_TAGS = 4096


class Gathered(Protocol):
    """What the owner of the commands does next."""

    def stream_ended(self, command: Command) -> None:
        """Everything has been written; answer GOOD."""
        ...

    def stream_broken(self, command: Command) -> bool:
        """Make a task of the remainder; False if the command has already ended by that."""
        ...

    def gathered(self, command: Command) -> None:
        """All data of the command's task is in its buffer."""
        ...

    def fail(self, command: Command, asc: TransportAsc) -> None:
        """End the command: the initiator broke the rules of the data phase."""
        ...

    def respond_held(self, command: Command) -> None:
        """The initiator has sent all it announced; the response may go out."""
        ...


class DataOut:
    """See the module's docstring."""

    def __init__(self, flow: Flow, owner: Gathered) -> None:
        self._flow = flow
        self._owner = owner
        self._tags: dict[int, tuple[Command, ReadyToTransfer]] = {}
        self._stale: dict[int, int] = {}
        self._next_tag = 0

    def begin(self, command: Command, immediate: memoryview) -> None:
        """Start the data phase of a command that needs data, with what its own PDU brought."""
        command.deadline = self._flow.now + self._flow.limits.data_out_timeout
        if immediate and not self._take(command, 0, immediate):
            return
        self._advance(command)

    def receive(self, request: Request) -> None:
        """A SCSI Data-Out PDU."""
        number, offset = DATA_OUT_TAIL.unpack_from(request.bhs, 36)
        if request.word20 == RESERVED_TAG:
            self._unsolicited(request, number, offset)
        else:
            self._solicited(request, number, offset)

    def digest_error(self, request: Request) -> None:
        """The data of a Data-Out was damaged on the way: its command fails."""
        command = self._flow.find(request.tag)
        if command is not None and command.gathering:
            command.unsolicited = False
            self._owner.fail(command, TransportAsc.PROTOCOL_SERVICE_CRC_ERROR)

    def forget(self, command: Command) -> None:
        """The command has ended: data still on its way for it is dropped."""
        for r2t in command.r2ts:
            self._tags.pop(r2t.tag, None)
            if len(self._stale) >= MAX_STALE_TAGS:
                del self._stale[next(iter(self._stale))]
            self._stale[r2t.tag] = command.tag
        command.r2ts.clear()

    def pump(self, command: Command) -> None:
        """Ask for data: as many R2Ts as may be outstanding."""
        parameters = self._flow.parameters
        while (
            command.next_offset < command.wanted
            and len(command.r2ts) < parameters.max_outstanding_r2t
        ):
            start = command.next_offset
            end = min(start + parameters.max_burst, command.wanted)
            command.next_offset = end
            tag = self._new_tag()
            r2t = ReadyToTransfer(tag, start, end)
            command.r2ts.append(r2t)
            self._tags[tag] = (command, r2t)
            self._flow.tx.emit(
                Opcode.R2T,
                FINAL,
                lun=command.lun,
                tag=command.tag,
                word20=tag,
                word36=command.r2t_sn,
                word40=start,
                word44=end - start,
                status=False,
            )
            command.r2t_sn += 1
        command.deadline = self._flow.now + self._flow.limits.data_out_timeout
        self._flow.touch()

    def _new_tag(self) -> int:
        while True:
            self._next_tag = (self._next_tag + 1) & 0x7FFFFFFF
            if self._next_tag not in self._tags and self._next_tag not in self._stale:
                return self._next_tag

    # -- Data-Out PDUs

    def _unsolicited(self, request: Request, number: int, offset: int) -> None:
        command = self._flow.find(request.tag)
        if command is None:
            return  # belongs to a command that was dropped, rejected or aborted
        if not command.unsolicited:
            self._owner.fail(command, TransportAsc.UNEXPECTED_UNSOLICITED_DATA)
            return
        if request.flags & FINAL:
            command.unsolicited = False
        if command.failed or command.held:
            if not command.unsolicited:
                self._owner.respond_held(command)
            return
        limit = min(self._flow.parameters.first_burst, command.expected)
        error = None
        if number != command.unsolicited_sn:
            error = TransportAsc.DATA_PHASE_ERROR
        elif offset != command.next_offset:
            error = TransportAsc.DATA_OFFSET_ERROR
        elif offset + len(request.data) > limit:
            error = TransportAsc.UNEXPECTED_UNSOLICITED_DATA
        if error is not None:
            self._owner.fail(command, error)
            return
        command.unsolicited_sn += 1
        if self._take(command, offset, request.data):
            self._advance(command)

    def _solicited(self, request: Request, number: int, offset: int) -> None:
        entry = self._tags.get(request.word20)
        if entry is None or entry[0].tag != request.tag:
            self._unknown_tag(request)
            return
        command, r2t = entry
        end = offset + len(request.data)
        error = None
        if number != r2t.data_sn:
            error = TransportAsc.DATA_PHASE_ERROR
        elif offset != r2t.offset:
            error = TransportAsc.DATA_OFFSET_ERROR
        elif end > r2t.end:
            error = TransportAsc.TOO_MUCH_WRITE_DATA
        elif request.flags & FINAL and end != r2t.end:
            error = TransportAsc.DATA_PHASE_ERROR
        if error is not None:
            if request.flags & FINAL:
                self._drop(command, r2t)
            self._owner.fail(command, error)
            return
        r2t.data_sn += 1
        r2t.offset = end
        if request.flags & FINAL:
            self._drop(command, r2t)
        if self._take(command, offset, request.data):
            self._advance(command)

    def _drop(self, command: Command, r2t: ReadyToTransfer) -> None:
        command.r2ts.remove(r2t)
        del self._tags[r2t.tag]

    def _unknown_tag(self, request: Request) -> None:
        if self._stale.get(request.word20) == request.tag:
            if request.flags & FINAL:
                del self._stale[request.word20]
            return
        command = self._flow.find(request.tag)
        if command is None or not command.gathering:
            self._flow.reject(request, RejectReason.INVALID_PDU_FIELD)
            return
        self._owner.fail(command, TransportAsc.INVALID_TARGET_PORT_TRANSFER_TAG)

    # -- the bytes

    def _take(self, command: Command, offset: int, data: memoryview) -> bool:
        """Write or keep a piece.  False if the command has ended."""
        command.deadline = self._flow.now + self._flow.limits.data_out_timeout
        if not command.r2ts and command.next_offset < offset + len(data):
            command.next_offset = offset + len(data)
        if command.stream is not None and command.buffer is None:
            if offset == command.received and self._write(command, command.stream + offset, data):
                command.received += len(data)
                return True
            if not self._owner.stream_broken(command):
                return False
        useful = min(len(data), command.wanted - offset)
        if useful > 0:
            assert command.buffer is not None
            start = offset - command.base
            command.buffer.view[start : start + useful] = data[:useful]
            command.received += useful
        return True

    def _write(self, command: Command, position: int, data: memoryview) -> bool:
        """Write a piece now.  The checks are made again: the unit may have changed in between."""
        itl = command.itl
        if itl is None or len(data) % BLOCK or itl.write_range(command.cdb) is None:
            return False
        return itl.try_write(position, data)

    def _advance(self, command: Command) -> None:
        """What is next: more unsolicited data, more R2Ts, or the end of the data phase."""
        if command.unsolicited:
            return
        if command.received >= command.wanted:
            if command.buffer is None and command.stream is not None:
                self._owner.stream_ended(command)
            else:
                self._owner.gathered(command)
            return
        if command.r2ts and command.next_offset >= command.wanted:
            return
        if command.reserved >= command.wanted:
            self.pump(command)
        else:
            command.deadline = 0.0  # it is our memory that is waited for, not the initiator
            self._flow.budget.reserve(command, command.wanted, self.pump)
