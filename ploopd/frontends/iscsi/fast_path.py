"""READ and WRITE without a task: the loop that makes the target fast.

It takes plain READs, and WRITEs that bring all their data, off the front of the receive buffer and
completes them by function calls: data goes from the device straight into the output arena, or from
the receive buffer straight to the device.  The first PDU that is anything else, or that cannot be
completed at once, ends the loop without having had an effect; the general path handles it.
"""

from __future__ import annotations

from typing import Final

from ploopd.frontends.iscsi.command import Command
from ploopd.frontends.iscsi.commands import Commands
from ploopd.frontends.iscsi.direct import DirectWrite
from ploopd.frontends.iscsi.flow import Flow
from ploopd.frontends.iscsi.lane import Lane
from ploopd.frontends.iscsi.pdu import REQUEST, RESERVED_TAG, RESPONSE, SERIAL_MASK
from ploopd.frontends.iscsi.receive import Receiver
from ploopd.frontends.iscsi.transmit import Transmitter, data_in_space
from ploopd.scsi.nexus import ItlNexus, Nexus

_COMMAND: Final = 0x01  # a SCSI Command that is not for immediate delivery
_READ: Final = 0xC0  # final, R; with attribute untagged (0) or simple (1)
_WRITE: Final = 0xA0  # final, W
_ATTRIBUTE_BIT: Final = 0xFE
_GOOD_DATA_IN: Final = 0x81  # final, status included
_DATA_IN: Final = 0x25
_RESPONSE: Final = 0x21
_FINAL: Final = 0x80

_NO: Final = -1
_LATER: Final = 0
_NOW: Final = 1
"""What became of a PDU: not for the fast path; begun or answered; a READ answered with its data."""

BURST: Final = 16
"""READs answered before what is there is sent: the initiator works on it meanwhile."""

ENOUGH: Final = 128 << 10
"""Bytes in the arena that are sent before more is read: what was read is still in the processor's
cache then, and the initiator copies it while the next is read."""

LEAST_VIEWED: Final = 64 << 10
"""Bytes of a READ, and of its PDUs, from which on the page cache is sent where it is, if it can."""

MOST_VIEWED: Final = 512 << 10
"""Bytes of that before they are sent.  One system call for several READs wakes the initiator once;
with more the kernel begins to refuse some of it, which is copied then."""

_unpack: Final = REQUEST.unpack_from
_pack: Final = RESPONSE.pack_into


class FastPath:
    """See the module's docstring.  Only for connections without digests."""

    __slots__ = (
        "_commands",
        "_direct",
        "_flow",
        "_immediate_limit",
        "_lane",
        "_nexus",
        "_receiver",
    )

    def __init__(
        self,
        flow: Flow,
        nexus: Nexus,
        receiver: Receiver,
        commands: Commands,
        lane: Lane,
        direct: DirectWrite,
    ) -> None:
        self._flow = flow
        self._direct = direct
        self._commands = commands
        self._lane = lane
        self._nexus = nexus
        self._receiver = receiver
        parameters = flow.parameters
        self._immediate_limit = parameters.first_burst if parameters.immediate_data else -1

    def run(self) -> bool:
        """Handle what is plain.  True if output must leave before anything else is done."""
        tx = self._flow.tx
        self._direct.look_again()
        if (tx.max_cmd_sn - tx.exp_cmd_sn) & SERIAL_MASK == SERIAL_MASK:
            return False  # the command window is closed, and what is done here does not open it
        return self._run(tx)

    def _run(self, tx: Transmitter) -> bool:
        receiver, flow, find_itl = self._receiver, self._flow, self._nexus.itl
        commands, lane = flow.commands, flow.lane
        buffer, position, fill = receiver.buffer, receiver.position, receiver.fill
        known_lun = -1
        itl: ItlNexus | None = None
        full = False
        left = BURST
        while fill - position >= 48:
            opcode, flags, _, lengths, lun, tag, expected, cmd_sn, _ = _unpack(buffer, position)
            if opcode != _COMMAND or cmd_sn != tx.exp_cmd_sn or tag in commands or tag in lane:
                break
            if lun != known_lun:
                itl, known_lun = find_itl(lun), lun
            if itl is None or tag == RESERVED_TAG:
                break
            plain = flags & _ATTRIBUTE_BIT
            op = tx.op
            if (
                not left
                or op > ENOUGH
                or tx.viewed >= MOST_VIEWED
                or op + 48 + (expected if plain == _READ else 0) > tx.size
            ):
                full = tx.pending > 0
                break
            end = position + 48
            cdb = buffer[position + 32 : end]
            if plain == _READ and lengths == 0:
                outcome = self._read(itl, cdb, lun, flags, tag, expected)
            elif plain == _WRITE and lengths == expected:
                if tx.viewed:
                    break  # what it changes may be in them
                if end + expected > fill:
                    self._direct.consider(itl, cdb, expected, end + expected - fill)
                    break
                data = buffer[end : end + expected]
                end += expected
                outcome = self._write(itl, cdb, data, lun, flags, tag)
            else:
                break
            if outcome == _NO:
                break
            left -= outcome
            position = end
        receiver.position = position
        return full or tx.viewed > 0

    def _read(
        self, itl: ItlNexus, cdb: memoryview, lun: int, flags: int, tag: int, expected: int
    ) -> int:
        extent = itl.read_range(cdb)
        if extent is None or extent[1] != expected:
            return _NO
        offset = extent[0]
        first = itl.lane.first
        if first and self._lane.start(itl, offset, expected, lun, flags, tag, None):
            return _LATER
        if self._read_now(itl, offset, tag, expected):
            return _NOW
        if not first and self._lane.start(itl, offset, expected, lun, flags, tag, None):
            return _LATER
        command = Command(tag, lun, flags, expected, bytes(cdb))
        return _LATER if self._commands.start_plain(itl, offset, command) else _NO

    def _read_now(self, itl: ItlNexus, offset: int, tag: int, expected: int) -> bool:
        flow = self._flow
        if expected >= LEAST_VIEWED and self._view_read(itl, offset, tag, expected):
            return True
        if expected > flow.parameters.data_in_limit:
            return self._long_read(itl, offset, tag, expected)
        tx = flow.tx
        op = tx.op
        end = op + 48 + expected
        if not itl.try_read(offset, tx.arena[op + 48 : end]):
            return False
        self._good_data_in(tx, op, expected, tag)
        tx.op = end
        return True

    def _good_data_in(self, tx: Transmitter, op: int, expected: int, tag: int) -> None:
        """Put the header of a whole answer at `op` in the arena."""
        tx.exp_cmd_sn = exp_cmd_sn = (tx.exp_cmd_sn + 1) & SERIAL_MASK
        tx.max_cmd_sn = max_cmd_sn = (tx.max_cmd_sn + 1) & SERIAL_MASK
        stat_sn = tx.stat_sn
        _pack(
            tx.arena,
            op,
            _DATA_IN,
            _GOOD_DATA_IN,
            0,
            0,
            expected,
            0,
            tag,
            RESERVED_TAG,
            stat_sn,
            exp_cmd_sn,
            max_cmd_sn,
            0,
            0,
            0,
        )
        tx.stat_sn = (stat_sn + 1) & SERIAL_MASK

    def _view_read(self, itl: ItlNexus, offset: int, tag: int, expected: int) -> bool:
        """A READ of the page cache of a file in memory: only headers are in the arena."""
        parameters, tx = self._flow.parameters, self._flow.tx
        if tx.congested or parameters.max_send_segment < LEAST_VIEWED:
            return False
        if not self._fits(expected):
            return False
        view = itl.try_view(offset, expected)
        if view is None:
            return False
        if expected > parameters.data_in_limit:
            return self._data_in(itl, offset, tag, expected, view)
        op = tx.op
        self._good_data_in(tx, op, expected, tag)
        tx.op = op + 48
        tx.put_view(view, itl.read_viewed, offset + expected)
        return True

    def _long_read(self, itl: ItlNexus, offset: int, tag: int, expected: int) -> bool:
        """A READ that takes several Data-In PDUs, still straight into the arena."""
        return self._fits(expected) and self._data_in(itl, offset, tag, expected, None)

    def _fits(self, expected: int) -> bool:
        """Is there room in the arena, and are the bursts whole PDUs without padding?"""
        parameters, tx = self._flow.parameters, self._flow.tx
        if expected <= parameters.data_in_limit:
            return True
        segment, burst = parameters.max_send_segment, parameters.max_burst
        if tx.op + data_in_space(expected, segment) > tx.size or segment % 4:
            return False
        return expected <= burst or burst % segment == 0

    def _data_in(
        self, itl: ItlNexus, offset: int, tag: int, expected: int, view: memoryview | None
    ) -> bool:
        """Answer by as many Data-In PDUs as it takes, with the bytes of `view` if there is one."""
        parameters, tx = self._flow.parameters, self._flow.tx
        segment, burst = parameters.max_send_segment, parameters.max_burst
        arena, op, number, done = tx.arena, tx.op, 0, 0
        exp_cmd_sn = (tx.exp_cmd_sn + 1) & SERIAL_MASK
        max_cmd_sn = (tx.max_cmd_sn + 1) & SERIAL_MASK
        while done < expected:
            length = min(segment, expected - done)
            data = op + 48
            if view is None and not itl.try_read(offset + done, arena[data : data + length]):
                return False
            end = done + length
            last = end == expected
            flags = _GOOD_DATA_IN if last else _FINAL if end % burst == 0 else 0
            _pack(
                arena,
                op,
                _DATA_IN,
                flags,
                0,
                0,
                length,
                0,
                tag,
                RESERVED_TAG,
                tx.stat_sn if last else 0,
                exp_cmd_sn,
                max_cmd_sn,
                number,
                done,
                0,
            )
            if view is None:
                op = data + length
            else:
                tx.op = op = data
                tx.put_view(view[done:end], itl.read_viewed, offset + end)
            number, done = number + 1, end
        tx.exp_cmd_sn, tx.max_cmd_sn = exp_cmd_sn, max_cmd_sn
        tx.stat_sn = (tx.stat_sn + 1) & SERIAL_MASK
        tx.op = op
        return True

    def _write(
        self, itl: ItlNexus, cdb: memoryview, data: memoryview, lun: int, flags: int, tag: int
    ) -> int:
        extent, length = itl.write_range(cdb), len(data)
        if extent is None or extent[1] != length or length > self._immediate_limit:
            return _NO
        offset = extent[0]
        first = itl.lane.first
        if first and self._lane.start(itl, offset, length, lun, flags, tag, data):
            return _LATER
        if self._write_now(itl, offset, data, tag):
            return _LATER
        if not first and self._lane.start(itl, offset, length, lun, flags, tag, data):
            return _LATER
        command = Command(tag, lun, flags, length, bytes(cdb))
        return _LATER if self._commands.start_plain(itl, offset, command, data) else _NO

    def _write_now(self, itl: ItlNexus, offset: int, data: memoryview, tag: int) -> bool:
        if not itl.try_write(offset, data):
            return False
        tx = self._flow.tx
        tx.exp_cmd_sn = exp_cmd_sn = (tx.exp_cmd_sn + 1) & SERIAL_MASK
        tx.max_cmd_sn = max_cmd_sn = (tx.max_cmd_sn + 1) & SERIAL_MASK
        op, stat_sn = tx.op, tx.stat_sn
        _pack(
            tx.arena,
            op,
            _RESPONSE,
            _FINAL,
            0,
            0,
            0,
            0,
            tag,
            0,
            stat_sn,
            exp_cmd_sn,
            max_cmd_sn,
            0,
            0,
            0,
        )
        tx.stat_sn = (stat_sn + 1) & SERIAL_MASK
        tx.op = op + 48
        return True
