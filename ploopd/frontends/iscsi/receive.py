"""The receive buffer and the framing of PDUs in it (RFC 7143 11.2)."""

from __future__ import annotations

import struct
from typing import Final

from ploopd.frontends.iscsi.digest import verify
from ploopd.frontends.iscsi.pdu import (
    BHS_LENGTH,
    DIGEST_LENGTH,
    ProtocolError,
    Request,
    padded,
)

_LENGTHS: Final = struct.Struct(">I")
_EMPTY: Final = memoryview(b"")
_SMALL: Final = 64 * 1024


class Receiver:
    """Bytes that have arrived and are not yet handled: `buffer[position:fill]`.

    `max_data` is the largest data segment that a peer may send; a larger one ends the connection
    before any of it is read.  `header_first`: when the buffer is empty, receive no more than a
    header, because what follows it had better go somewhere else.
    """

    __slots__ = (
        "_need",
        "allow_ahs",
        "buffer",
        "data_digest",
        "fill",
        "header_digest",
        "header_first",
        "max_data",
        "position",
        "size",
    )

    def __init__(self, size: int, max_data: int) -> None:
        self.buffer = memoryview(bytearray(size))
        self.size = size
        self.position = 0
        self.fill = 0
        self.max_data = max_data
        self.allow_ahs = False
        self.header_digest = False
        self.data_digest = False
        self.header_first = False
        self._need = 0

    def grow(self, size: int, max_data: int) -> None:
        """A larger buffer from now on, with what is left in the old one."""
        rest = self.buffer[self.position : self.fill]
        self.buffer = memoryview(bytearray(size))
        self.buffer[: len(rest)] = rest
        self.size = size
        self.position, self.fill = 0, len(rest)
        self.max_data = max_data
        self.allow_ahs = True

    def space(self) -> memoryview:
        """Where to put more bytes; empty only when unhandled PDUs fill the buffer."""
        position, fill = self.position, self.fill
        if position == fill:
            self.position = self.fill = fill = 0
            if self.header_first:
                return self.buffer[:BHS_LENGTH]
        elif position:
            rest = fill - position
            if rest <= 4096 or self.size - position < max(self._need, _SMALL):
                self.buffer[:rest] = self.buffer[position:fill]
                self.position, self.fill = 0, rest
                fill = rest
        return self.buffer[fill:]

    def next(self) -> Request | None:
        """The next PDU, or None when more bytes are needed.

        Raises `ProtocolError` for lengths that nobody agreed on and for a wrong header digest,
        after which nothing in the stream can be trusted.
        """
        position, available = self.position, self.fill - self.position
        if available < BHS_LENGTH:
            self._need = BHS_LENGTH
            return None
        buffer = self.buffer
        (lengths,) = _LENGTHS.unpack_from(buffer, position + 4)
        ahs_length, data_length = (lengths >> 24) * 4, lengths & 0xFFFFFF
        if data_length > self.max_data:
            raise ProtocolError(f"a data segment of {data_length} bytes")
        if ahs_length and not self.allow_ahs:
            raise ProtocolError("an additional header segment during login")
        header_end = position + BHS_LENGTH + ahs_length
        data_start = header_end + (DIGEST_LENGTH if self.header_digest else 0)
        data_end = data_start + padded(data_length)
        has_data_digest = self.data_digest and data_length > 0
        end = data_end + (DIGEST_LENGTH if has_data_digest else 0)
        if end > self.fill:
            self._need = end - position
            return None
        if self.header_digest and not verify(
            buffer[position:header_end], buffer[header_end:data_start]
        ):
            raise ProtocolError("a header digest does not match")
        damaged = has_data_digest and not verify(buffer[data_start:data_end], buffer[data_end:end])
        self.position = end
        return Request(
            buffer[position : position + BHS_LENGTH],
            buffer[position + BHS_LENGTH : header_end] if ahs_length else _EMPTY,
            buffer[data_start : data_start + data_length] if data_length else _EMPTY,
            damaged,
        )
