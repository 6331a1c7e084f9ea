"""TCM-USER messages, built here independently with the kernel's layout."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ploopd.frontends.tcmu import netlink
from ploopd.frontends.tcmu.netlink import Event, EventKind, Family, NetlinkError

FAMILY = Family(message_type=0x1C, group=7)


def attribute(number: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), number) + value + bytes(-len(value) % 4)


def message(message_type: int, command: int, *attributes: bytes) -> bytes:
    body = struct.pack("=BBH", command, 2, 0) + b"".join(attributes)
    return struct.pack("=IHHII", 16 + len(body), message_type, 0, 0, 0) + body


def event(command: int, *more: bytes) -> bytes:
    return message(
        FAMILY.message_type,
        command,
        attribute(1, b"tcm-user/0/disk/ploop//vz/disk.hds\0"),
        attribute(2, struct.pack("=I", 3)),
        attribute(8, struct.pack("=I", 11)),
        *more,
    )


def test_events_are_told() -> None:
    (added,) = netlink.parse_events(event(1), FAMILY)
    assert added == Event(
        kind=EventKind.ADDED, name="tcm-user/0/disk/ploop//vz/disk.hds", minor=3, device_id=11
    )
    (removed,) = netlink.parse_events(event(2), FAMILY)
    assert removed.kind is EventKind.REMOVED


def test_a_reconfiguration_says_what_changed() -> None:
    (size,) = netlink.parse_events(event(3, attribute(5, struct.pack("=Q", 1 << 40))), FAMILY)
    assert (size.size, size.config, size.write_cache) == (1 << 40, None, None)
    (config,) = netlink.parse_events(event(3, attribute(4, b"ploop/x\0")), FAMILY)
    assert config.config == "ploop/x"
    (cache,) = netlink.parse_events(event(3, attribute(6, b"\1")), FAMILY)
    assert cache.write_cache is True


def test_several_messages_in_a_datagram_and_strangers_among_them() -> None:
    stranger = message(0x1D, 1, attribute(1, b"x\0"))
    unknown = message(FAMILY.message_type, 9)
    events = list(netlink.parse_events(event(1) + stranger + unknown + event(2), FAMILY))
    assert [e.kind for e in events] == [EventKind.ADDED, EventKind.REMOVED]


def test_a_reply_names_the_device_and_the_error() -> None:
    (added,) = netlink.parse_events(event(1), FAMILY)
    data = netlink.reply(added, FAMILY, -2)
    length, message_type, flags, _, _ = struct.unpack_from("=IHHII", data)
    assert (length, message_type, flags) == (len(data), FAMILY.message_type, 1)
    command, version, _ = struct.unpack_from("=BBH", data, 16)
    assert (command, version) == (4, 2)
    assert data[20:] == attribute(7, struct.pack("=i", -2)) + attribute(8, struct.pack("=I", 11))


def test_the_family_is_found_in_the_controllers_answer() -> None:
    groups = attribute(1, attribute(1, b"config\0") + attribute(2, struct.pack("=I", 42)))
    answer = message(0x10, 1, attribute(1, struct.pack("=H", 0x1C)), attribute(7 | 0x8000, groups))
    assert netlink.parse_family(answer) == Family(message_type=0x1C, group=42)


def test_a_missing_module_is_told() -> None:
    error = struct.pack("=IHHII", 36, 2, 0, 1, 0) + struct.pack("=i", -2) + bytes(16)
    with pytest.raises(NetlinkError, match="no family TCM-USER"):
        netlink.parse_family(error)


def test_somebody_was_faster() -> None:
    """ENODEV is the kernel's answer to a reply that nobody waits for."""

    def error(code: int) -> bytes:
        return struct.pack("=IHHIIi", 36, 2, 0, 1, 0, code) + bytes(16)

    assert netlink.overruled(error(-errno.ENODEV))
    assert netlink.overruled(error(0) + error(-errno.ENODEV))
    assert not netlink.overruled(error(-errno.EINVAL))
    assert not netlink.overruled(event(1))
    assert not list(netlink.parse_events(error(-errno.ENODEV), FAMILY))


def test_this_kernel_understands_the_question() -> None:
    """The controller itself is everywhere; it is asked for a family that every kernel has."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETLINK_GENERIC) as kernel:
        kernel.bind((0, 0))
        kernel.settimeout(5)
        kernel.send(netlink.family_request())
        answer = kernel.recv(65536)
    if struct.unpack_from("=H", answer, 4)[0] == 2:
        with pytest.raises(NetlinkError, match="error 2"):  # ENOENT: understood, not loaded
            netlink.parse_family(answer)
    else:
        assert netlink.parse_family(answer).group


@given(data=st.binary(max_size=200))
def test_any_bytes_are_events_or_an_error(data: bytes) -> None:
    with contextlib.suppress(NetlinkError):
        list(netlink.parse_events(data, FAMILY))


@given(cut=st.integers(0, 200), position=st.integers(0, 80), value=st.integers(0, 255))
def test_damaged_events_are_refused_or_understood(cut: int, position: int, value: int) -> None:
    data = bytearray(event(3, attribute(5, struct.pack("=Q", 1))))
    data[min(position, len(data) - 1)] = value
    with contextlib.suppress(NetlinkError):
        list(netlink.parse_events(bytes(data[: len(data) - cut % len(data)]), FAMILY))
