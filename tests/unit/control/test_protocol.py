"""Framing, encoding and errors of the control protocol."""

from __future__ import annotations

import errno

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ploopd.control import protocol
from ploopd.control.interface import control_description
from ploopd.control.messages import METHODS
from ploopd.control.protocol import (
    Call,
    FrameReader,
    ProtocolError,
    Reply,
    decode_call,
    decode_reply,
    encode,
    error_from_reply,
    error_reply,
)
from ploopd.errors import ExitCode, NotFoundError, ParkTimeoutError, PloopError, StorageError


@given(st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\0", b"")), max_size=8), st.data())
def test_frames_do_not_depend_on_how_the_bytes_arrive(
    bodies: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(body + b"\0" for body in bodies)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    reader = FrameReader()
    frames: list[bytes] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        frames += reader.feed(stream[start:end])
    assert frames == bodies
    assert not reader.partial


def test_a_message_without_end_is_refused_at_the_limit() -> None:
    reader = FrameReader(limit=100)
    assert reader.feed(b"x" * 99 + b"\0") == [b"x" * 99]
    reader.feed(b"y" * 99)
    assert reader.partial
    with pytest.raises(ProtocolError, match="longer than 100 bytes"):
        reader.feed(b"y")


def test_call_and_reply_survive_the_wire() -> None:
    call = Call(method="a.B", parameters=msgspec.Raw(b'{"x":1}'), more=True)
    wire = encode(call)
    assert wire.endswith(b"\0")
    assert wire.count(b"\0") == 1
    decoded = decode_call(wire[:-1])
    assert (decoded.method, bytes(decoded.parameters), decoded.more) == ("a.B", b'{"x":1}', True)
    reply = decode_reply(encode(Reply(continues=True))[:-1])
    assert reply.continues
    assert reply.error is None


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b'{"method":1}', b"GET / HTTP/1.1\r\n", b'{"parameters":{}}', b"\xff"],
)
def test_what_is_not_a_call_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_call(data)


@pytest.mark.parametrize(
    "error",
    [
        PloopError("all fields", path="/a b", field="BAT[7]", value=123, hint="run it"),
        NotFoundError("no such device", value="disk0", field="device"),
        StorageError(errno.ENOSPC, "write", path="/x", offset=4096),
        StorageError(errno.EIO, "read", path="/x"),
        ParkTimeoutError("write"),
        PloopError("standby", exit_code=ExitCode.STANDBY),
    ],
)
def test_an_error_arrives_as_it_was_raised(error: PloopError) -> None:
    arrived = error_from_reply(decode_reply(encode(error_reply(error))[:-1]))
    assert str(arrived) == str(error)
    assert arrived.exit_code == error.exit_code
    assert isinstance(arrived, StorageError) == isinstance(error, StorageError)
    if isinstance(error, StorageError):
        assert isinstance(arrived, StorageError)
        assert (arrived.errno, arrived.offset) == (error.errno, error.offset)


def test_an_error_of_another_interface_is_still_an_error() -> None:
    reply = protocol.service_error("MethodNotFound", method="org.ploopd.Control.Nope")
    assert "MethodNotFound" in str(error_from_reply(reply))


def test_a_broken_error_reply_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        error_from_reply(Reply(error="org.ploopd.Control.Failed"))


def test_every_exit_code_has_an_error_in_the_description() -> None:
    description = control_description()
    for code in ExitCode:
        assert f"error {protocol.error_name(code)} (" in description


def test_every_method_and_field_is_in_the_description() -> None:
    description = control_description()
    for method in METHODS:
        assert f"\nmethod {method.name}(" in description
        for struct in (method.parameters, method.reply):
            for field in msgspec.structs.fields(struct):
                assert f"{field.name}: " in description
    assert "type Layer (path: string, kind: string, level: int" in description
