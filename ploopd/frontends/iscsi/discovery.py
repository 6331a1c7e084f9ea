"""Text exchanges in full feature phase, above all SendTargets (RFC 7143 11.10, appendix C)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ploopd.frontends.iscsi.config import format_address
from ploopd.frontends.iscsi.flow import Flow
from ploopd.frontends.iscsi.parameters import KEYS, NegotiationError, redeclare
from ploopd.frontends.iscsi.pdu import (
    CONTINUE,
    FINAL,
    RESERVED_TAG,
    Opcode,
    RejectReason,
    Request,
)
from ploopd.frontends.iscsi.text import NOT_UNDERSTOOD, TextError, encode_text, parse_text

MAX_COLLECTED = 64 * 1024
WILDCARDS = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 - recognised, not bound to


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """What discovery can show: targets, and the addresses they are reached at.

    `local` is the address that this initiator connected to; it stands for wildcard portals.
    """

    targets: Sequence[str]
    addresses: Sequence[tuple[str, int]]
    local: tuple[str, int]
    portal_group_tag: int

    def describe(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """The TargetName and TargetAddress records of the targets."""
        records: list[tuple[str, str]] = []
        for name in names:
            records.append(("TargetName", name))
            for host, port in self.addresses:
                shown = self.local[0] if host in WILDCARDS else host
                address = f"{format_address(shown, port)},{self.portal_group_tag}"
                records.append(("TargetAddress", address))
        return records


class _RefusedError(Exception):
    """The text deserves a Reject PDU."""


class TextExchange:
    """The text negotiation of one connection: at most one exchange at a time.

    `own` is the session's target, None in a discovery session.
    """

    def __init__(self, flow: Flow, directory: Callable[[], Directory], own: str | None) -> None:
        self._flow = flow
        self._directory = directory
        self._own = own
        self._collected = bytearray()
        self._output = b""
        self._transfer_tag = RESERVED_TAG
        self._task_tag = RESERVED_TAG
        self._next_tag = 0

    def receive(self, request: Request) -> None:
        """A text request; answers it."""
        if request.word20 == RESERVED_TAG:
            self._reset()
        elif request.word20 != self._transfer_tag or request.tag != self._task_tag:
            self._reset()
            self._flow.reject(request, RejectReason.INVALID_PDU_FIELD)
            return
        self._task_tag = request.tag
        incomplete = bool(request.flags & CONTINUE)
        if incomplete and request.flags & FINAL:
            self._reset()
            self._flow.reject(request, RejectReason.PROTOCOL_ERROR)
            return
        self._collected += request.data
        try:
            if len(self._collected) > MAX_COLLECTED:
                raise _RefusedError
            if not incomplete and not self._output:
                self._output = encode_text(self._answer())
                self._collected.clear()
        except (_RefusedError, TextError, NegotiationError):
            self._reset()
            self._flow.reject(request, RejectReason.PROTOCOL_ERROR)
            return
        self._send(request)

    def _reset(self) -> None:
        self._collected.clear()
        self._output = b""
        self._transfer_tag = RESERVED_TAG

    def _send(self, request: Request) -> None:
        limit = self._flow.parameters.max_send_segment
        piece, self._output = self._output[:limit], self._output[limit:]
        more = bool(self._output)
        final = not more and bool(request.flags & FINAL)
        if final:
            self._transfer_tag = RESERVED_TAG
        elif self._transfer_tag == RESERVED_TAG:
            self._next_tag = (self._next_tag + 1) & 0x7FFFFFFF
            self._transfer_tag = self._next_tag
        self._flow.tx.emit(
            Opcode.TEXT_RESPONSE,
            (FINAL if final else 0) | (CONTINUE if more else 0),
            tag=request.tag,
            word20=self._transfer_tag,
            data=piece,
        )

    def _answer(self) -> list[tuple[str, str]]:
        pairs = parse_text(bytes(self._collected))
        answers: list[tuple[str, str]] = []
        rest: list[tuple[str, str]] = []
        for name, value in pairs:
            if name == "SendTargets":
                answers += self._send_targets(value)
            elif name.startswith(("X-", "X#")):
                answers.append((name, NOT_UNDERSTOOD))
            elif name in KEYS:
                rest.append((name, value))
            else:
                # A public key that does not exist: a mistake, most likely a misspelt SendTargets,
                # which initiators expect to be told about by a Reject.
                raise _RefusedError
        return answers + redeclare(self._flow.parameters, rest)

    def _send_targets(self, value: str) -> list[tuple[str, str]]:
        directory = self._directory()
        if self._own is not None:
            # A normal session learns about its own target and nothing else.
            if value not in ("", "All", self._own):
                raise _RefusedError
            return directory.describe([self._own])
        if value == "All":
            return directory.describe(directory.targets)
        if value in directory.targets:
            return directory.describe([value])
        raise _RefusedError
