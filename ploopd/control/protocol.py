"""The Varlink wire format: NUL-terminated JSON messages, bytes in and values out, no I/O.

Source: https://varlink.org/Method-Call (call, reply, `more`, `continues`, `oneway`, errors).
Errors of ours travel with all their fields, so that the client raises what the daemon raised.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from ploopd.errors import ExitCode, PloopError, StorageError

MAX_MESSAGE = 1 << 20
"""Bytes of one message, the NUL included; longer ones end the connection."""

ERROR_PREFIX = "org.ploopd.Control."
SERVICE_ERROR_PREFIX = "org.varlink.service."


DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding a message can raise: wrong JSON, wrong UTF-8, and too many brackets."""

_EMPTY = msgspec.Raw(b"{}")


class ProtocolError(PloopError):
    """The peer sent something that is not Varlink; the connection is of no more use."""


class Call(msgspec.Struct, frozen=True, omit_defaults=True):
    """A method call: `method` is the interface name, a dot and the method's name."""

    method: str
    parameters: msgspec.Raw = _EMPTY
    more: bool = False
    oneway: bool = False


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """An answer; `continues` announces another one, `error` is an error's qualified name."""

    parameters: msgspec.Raw = _EMPTY
    continues: bool = False
    error: str | None = None


class Failure(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The parameters of every error of `org.ploopd.Control`: the fields of a `PloopError`."""

    message: str
    exit_code: int
    path: str | None = None
    field: str | None = None
    value: Any = None
    hint: str | None = None
    errno: int | None = None


class FrameReader:
    """Cuts a byte stream into messages."""

    def __init__(self, limit: int = MAX_MESSAGE) -> None:
        self._limit = limit
        self._pending = bytearray()

    @property
    def partial(self) -> bool:
        """Has a message begun that has not ended?"""
        return bool(self._pending)

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that `data` completes, without their NULs.

        Raises `ProtocolError` when a message is longer than the limit.
        """
        *complete, rest = data.split(b"\0")
        messages = []
        for part in complete:
            self._append(part)
            messages.append(bytes(self._pending))
            self._pending.clear()
        self._append(rest)
        return messages

    def _append(self, part: bytes) -> None:
        if len(self._pending) + len(part) >= self._limit:
            raise ProtocolError(f"a message is longer than {self._limit} bytes")
        self._pending += part


def encode(message: Call | Reply) -> bytes:
    """One message as it goes on the wire."""
    return msgspec.json.encode(message) + b"\0"


def encode_parameters(parameters: msgspec.Struct, *, exact: bool = False) -> msgspec.Raw:
    """A call's or reply's parameters as JSON.

    A file name that is not UTF-8 is shown with escapes; with `exact` it is a UnicodeEncodeError.
    """
    try:
        return msgspec.Raw(msgspec.json.encode(parameters))
    except UnicodeEncodeError:
        if exact:
            raise
        return msgspec.Raw(msgspec.json.encode(_escaped(msgspec.to_builtins(parameters))))


def _escaped(value: Any) -> Any:
    """`value` with everything in its strings escaped that UTF-8 does not have."""
    match value:
        case str():
            return value.encode(errors="backslashreplace").decode()
        case list():
            return [_escaped(one) for one in value]
        case dict():
            return {key: _escaped(one) for key, one in value.items()}
    return value


def decode_call(data: bytes) -> Call:
    """Raises `ProtocolError` for anything that is not a Varlink call."""
    return _decode(data, Call)


def decode_reply(data: bytes) -> Reply:
    """Raises `ProtocolError` for anything that is not a Varlink reply."""
    return _decode(data, Reply)


_Message = TypeVar("_Message", Call, Reply)


def _decode(data: bytes, kind: type[_Message]) -> _Message:
    try:
        return msgspec.json.decode(data, type=kind)
    except DECODE_ERRORS as error:
        raise ProtocolError(f"a {kind.__name__.lower()} cannot be read: {error}") from error


def error_reply(error: PloopError) -> Reply:
    """The reply that carries an error; its name is the exit code's, in Varlink's spelling."""
    failure = Failure(
        message=error.message,
        exit_code=int(error.exit_code),
        path=error.path,
        field=error.field,
        value=error.value
        if isinstance(error.value, str | int | float | None)
        else str(error.value),
        hint=error.hint,
        errno=error.errno if isinstance(error, StorageError) else None,
    )
    return Reply(
        parameters=encode_parameters(failure), error=ERROR_PREFIX + error_name(error.exit_code)
    )


def error_name(code: ExitCode) -> str:
    """`NOT_FOUND` → `NotFound`; plain failures are `Failed`."""
    if code in (ExitCode.OK, ExitCode.ERROR):
        return "Failed"
    return "".join(word.capitalize() for word in code.name.split("_"))


def service_error(name: str, **parameters: str) -> Reply:
    """A reply with one of the errors of `org.varlink.service`."""
    return Reply(
        parameters=msgspec.Raw(msgspec.json.encode(parameters)), error=SERVICE_ERROR_PREFIX + name
    )


def error_from_reply(reply: Reply) -> PloopError:
    """The error that an error reply stands for."""
    name = reply.error or ""
    if not name.startswith(ERROR_PREFIX):
        detail = bytes(reply.parameters).decode(errors="replace")
        return PloopError(f"the daemon answered {name} {detail}")
    try:
        failure = msgspec.json.decode(reply.parameters, type=Failure)
        code = ExitCode(failure.exit_code)
    except (msgspec.DecodeError, ValueError) as error:
        raise ProtocolError(f"an error reply cannot be read: {error}") from error
    if failure.errno is not None:
        return _storage_error(failure, code)
    return PloopError(
        failure.message,
        path=failure.path,
        field=failure.field,
        value=failure.value,
        hint=failure.hint,
        exit_code=code,
    )


def _storage_error(failure: Failure, code: ExitCode) -> StorageError:
    offset = failure.value if isinstance(failure.value, int) else None
    error = StorageError(
        failure.errno or 0, "request", path=failure.path, offset=offset, message=failure.message
    )
    error.hint = failure.hint
    error.exit_code = code
    return error
