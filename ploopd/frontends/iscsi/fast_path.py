"""READ and WRITE without a task: the loop that makes the target fast.

It takes plain READs, and WRITEs that bring all their data, off the front of the receive buffer and
completes them by function calls: data goes from the device straight into the output arena, or from
the receive buffer straight to the device.  The first PDU that is anything else, or that cannot be
completed at once, ends the loop without having had an effect; the general path handles it.
"""

from __future__ import annotations

from ploopd.frontends.iscsi.command import Command
from ploopd.frontends.iscsi.commands import Commands
from ploopd.frontends.iscsi.flow import Flow
from ploopd.frontends.iscsi.pdu import REQUEST, RESERVED_TAG, RESPONSE, SERIAL_MASK
from ploopd.frontends.iscsi.receive import Receiver
from ploopd.frontends.iscsi.transmit import Transmitter, data_in_space
from ploopd.scsi.nexus import ItlNexus, Nexus

_COMMAND = 0x01  # a SCSI Command that is not for immediate delivery
_READ = 0xC0  # final, R; with attribute untagged (0) or simple (1)
_WRITE = 0xA0  # final, W
_ATTRIBUTE_BIT = 0xFE
_GOOD_DATA_IN = 0x81  # final, status included
_DATA_IN = 0x25
_RESPONSE = 0x21
_FINAL = 0x80

BURST = 16
"""READs answered before what is there is sent: the initiator works on it meanwhile."""

_unpack = REQUEST.unpack_from
_pack = RESPONSE.pack_into


class FastPath:
    """See the module's docstring.  Only for connections without digests."""

    __slots__ = ("_commands", "_flow", "_immediate_limit", "_nexus", "_receiver")

    def __init__(self, flow: Flow, nexus: Nexus, receiver: Receiver, commands: Commands) -> None:
        self._flow = flow
        self._commands = commands
        self._nexus = nexus
        self._receiver = receiver
        parameters = flow.parameters
        self._immediate_limit = parameters.first_burst if parameters.immediate_data else -1

    def run(self) -> bool:
        """Handle what is plain.  True if it stopped because output should leave first."""
        tx = self._flow.tx
        if (tx.max_cmd_sn - tx.exp_cmd_sn) & SERIAL_MASK == SERIAL_MASK:
            return False  # the command window is closed, and what is done here does not open it
        return self._run(tx)

    def _run(self, tx: Transmitter) -> bool:
        receiver, commands, find_itl = self._receiver, self._flow.commands, self._nexus.itl
        buffer, position, fill = receiver.buffer, receiver.position, receiver.fill
        known_lun = -1
        itl: ItlNexus | None = None
        full = False
        left = BURST
        while fill - position >= 48:
            opcode, flags, _, lengths, lun, tag, expected, cmd_sn, _ = _unpack(buffer, position)
            if opcode != _COMMAND or cmd_sn != tx.exp_cmd_sn or tag in commands:
                break
            if lun != known_lun:
                itl, known_lun = find_itl(lun), lun
            if itl is None or tag == RESERVED_TAG:
                break
            plain = flags & _ATTRIBUTE_BIT
            if not left or tx.op + 48 + (expected if plain == _READ else 0) > tx.size:
                full = tx.pending > 0
                break
            if plain == _READ and lengths == 0:
                end = position + 48
                cdb = buffer[position + 32 : end]
                if self._read(itl, cdb, tag, expected):
                    left -= 1
                elif not self._read_later(itl, cdb, lun, flags, tag, expected):
                    break
            elif plain == _WRITE and lengths == expected:
                start = position + 48
                end = start + expected
                if end > fill:
                    break
                cdb, data = buffer[position + 32 : start], buffer[start:end]
                if not self._write(itl, cdb, data, tag, expected) and not self._write_later(
                    itl, cdb, data, lun, flags, tag
                ):
                    break
            else:
                break
            position = end
        receiver.position = position
        return full

    def _read(self, itl: ItlNexus, cdb: memoryview, tag: int, expected: int) -> bool:
        extent = itl.read_range(cdb)
        if extent is None or extent[1] != expected:
            return False
        flow = self._flow
        if expected > flow.parameters.data_in_limit:
            return self._long_read(itl, extent[0], tag, expected)
        tx = flow.tx
        op = tx.op
        end = op + 48 + expected
        if not itl.try_read(extent[0], tx.arena[op + 48 : end]):
            return False
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
        tx.op = end
        return True

    def _read_later(
        self, itl: ItlNexus, cdb: memoryview, lun: int, flags: int, tag: int, expected: int
    ) -> bool:
        """Start a plain READ that has to wait, and go on: others may come meanwhile."""
        extent = itl.read_range(cdb)
        if extent is None or extent[1] != expected:
            return False
        command = Command(tag, lun, flags, expected, bytes(cdb))
        return self._commands.start_plain(itl, extent[0], command)

    def _write_later(
        self, itl: ItlNexus, cdb: memoryview, data: memoryview, lun: int, flags: int, tag: int
    ) -> bool:
        """The same for a plain WRITE with all its data."""
        extent = itl.write_range(cdb)
        if extent is None or extent[1] != len(data) or len(data) > self._immediate_limit:
            return False
        command = Command(tag, lun, flags, len(data), bytes(cdb))
        return self._commands.start_plain(itl, extent[0], command, data)

    def _long_read(self, itl: ItlNexus, offset: int, tag: int, expected: int) -> bool:
        """A READ that takes several Data-In PDUs, still straight into the arena."""
        parameters, tx = self._flow.parameters, self._flow.tx
        segment, burst = parameters.max_send_segment, parameters.max_burst
        if tx.op + data_in_space(expected, segment) > tx.size or segment % 4 or burst % segment:
            return False
        arena, op, number, done = tx.arena, tx.op, 0, 0
        exp_cmd_sn = (tx.exp_cmd_sn + 1) & SERIAL_MASK
        max_cmd_sn = (tx.max_cmd_sn + 1) & SERIAL_MASK
        while done < expected:
            length = min(segment, expected - done)
            data = op + 48
            if not itl.try_read(offset + done, arena[data : data + length]):
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
            op, number, done = data + length, number + 1, end
        tx.exp_cmd_sn, tx.max_cmd_sn = exp_cmd_sn, max_cmd_sn
        tx.stat_sn = (tx.stat_sn + 1) & SERIAL_MASK
        tx.op = op
        return True

    def _write(
        self, itl: ItlNexus, cdb: memoryview, data: memoryview, tag: int, expected: int
    ) -> bool:
        extent = itl.write_range(cdb)
        if extent is None or extent[1] != expected or expected > self._immediate_limit:
            return False
        if not itl.try_write(extent[0], data):
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
