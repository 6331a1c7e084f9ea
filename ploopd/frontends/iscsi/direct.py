"""A WRITE whose data goes from the socket straight to the storage (docs/decisions/views.md).

The header of a large WRITE is the last thing in the receive buffer, perhaps with the beginning of
the data.  When the socket has all the rest, one system call takes it to where the storage keeps it,
and the header of the next PDU, in which the next WRITE can be seen, into the receive buffer.
Nothing else happens in between, so that for everybody else this is a WRITE like any other.
"""

from __future__ import annotations

from typing import Final

from ploopd.frontends.iscsi.flow import Flow
from ploopd.frontends.iscsi.pdu import (
    BHS_LENGTH,
    FINAL,
    REQUEST,
    SERIAL_MASK,
    Opcode,
    ProtocolError,
)
from ploopd.frontends.iscsi.receive import Receiver
from ploopd.scsi.nexus import ItlNexus, Nexus

LEAST_DIRECT: Final = 128 << 10
"""Bytes of a WRITE from which on it pays."""

LEAST_MISSING: Final = 32 << 10
"""Bytes of it that are still to come from which on it pays."""

_unpack: Final = REQUEST.unpack_from


class DirectWrite:
    """See the module's docstring.

    `missing`: how many bytes are still to come of a plain WRITE that the receive buffer ends with,
    if they may be received by `buffers` and `received`; 0 if not.  The fast path keeps it.
    """

    __slots__ = (
        "_flow",
        "_itl",
        "_length",
        "_nexus",
        "_offset",
        "_receiver",
        "_tag",
        "missing",
    )

    def __init__(self, flow: Flow, nexus: Nexus, receiver: Receiver) -> None:
        self._flow = flow
        self._nexus = nexus
        self._receiver = receiver
        self._itl: ItlNexus | None = None
        self._offset = self._length = self._tag = 0
        self.missing = 0

    def look_again(self) -> None:
        """The receive buffer is about to be looked at."""
        self.missing = 0
        receiver = self._receiver
        if receiver.position != receiver.fill:
            receiver.header_first = False

    def consider(self, itl: ItlNexus, cdb: memoryview, length: int, missing: int) -> None:
        """The WRITE of `length` bytes that the receive buffer ends with lacks `missing`."""
        parameters = self._flow.parameters
        limit = parameters.first_burst if parameters.immediate_data else 0
        if not LEAST_DIRECT <= length <= limit or missing < LEAST_MISSING:
            return
        extent = itl.write_range(cdb)
        if extent is None or extent[1] != length:
            return
        if itl.try_write_view(extent[0] + length - missing, missing) is not None:
            self.missing = missing

    def buffers(self) -> list[memoryview]:
        """Where to receive `missing` bytes now, and the header after them; empty if not like this.

        What is in the receive buffer of the data is written, which harms nobody if the WRITE is
        executed once more, in the ordinary way.
        """
        receiver, tx = self._receiver, self._flow.tx
        missing = self.missing
        if len(receiver.space()) < missing + BHS_LENGTH or tx.op + BHS_LENGTH > tx.size:
            return []
        buffer, fill = receiver.buffer, receiver.fill
        begin = receiver.position + BHS_LENGTH
        _, _, _, _, lun, tag, length, _, _ = _unpack(buffer, receiver.position)
        here = fill - begin
        itl = self._nexus.itl(lun)
        if itl is None or here + missing != length:
            return []
        extent = itl.write_range(buffer[begin - 16 : begin])
        if extent is None or extent[1] != length:
            return []
        offset = extent[0] + here
        view = itl.try_write_view(offset, missing)
        if view is None or (here and not itl.write_part(extent[0], buffer[begin:fill])):
            return []
        self._itl, self._offset, self._length, self._tag = itl, offset, length, tag
        return [view, buffer[fill : fill + BHS_LENGTH]]

    def received(self, count: int) -> bool:
        """So many bytes are in `buffers()`.

        True: the WRITE has been executed.  False: that was not all the storage has memory for, and
        it is to go the ordinary way; so far its data is in the receive buffer.
        """
        receiver, itl = self._receiver, self._itl
        assert itl is not None
        missing, fill = self.missing, receiver.fill
        self.missing = 0
        receiver.header_first = count >= missing
        if count < missing:
            if count and not itl.read_viewed(self._offset, receiver.buffer[fill : fill + count]):
                raise ProtocolError("what was received cannot be read again")
            receiver.fill = fill + count
            return False
        itl.written(self._length)
        receiver.position = fill
        receiver.fill = fill + count - missing
        tx = self._flow.tx
        tx.exp_cmd_sn = (tx.exp_cmd_sn + 1) & SERIAL_MASK
        self._flow.open_window()
        tx.emit(Opcode.SCSI_RESPONSE, FINAL, tag=self._tag, word20=0)
        return True
