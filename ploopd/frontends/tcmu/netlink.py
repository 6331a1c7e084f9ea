"""Generic netlink messages of the family TCM-USER: bytes in, events out, replies back.

Source: <linux/netlink.h>, <linux/genetlink.h>, <linux/target_core_user.h> (TCMU_NETLINK version 2).
The kernel multicasts an event when a device is added, removed or reconfigured.  If its device waits
for replies (`nl_reply_supported`), the configfs operation that caused the event goes on only when
one has come.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

NETLINK_GENERIC: Final = 16
SOL_NETLINK: Final = 270
NETLINK_ADD_MEMBERSHIP: Final = 1

FAMILY: Final = "TCM-USER"
GROUP: Final = "config"
VERSION: Final = 2

_HEADER = struct.Struct("=IHHII")
_GENERIC = struct.Struct("=BBH")
_ATTRIBUTE = struct.Struct("=HH")
_TYPE_MASK: Final = 0x3FFF
_REQUEST: Final = 1
_NLMSG_ERROR: Final = 2
_NLMSG_MIN_TYPE: Final = 0x10

_CONTROLLER: Final = 0x10
_GETFAMILY: Final = 3
_CTRL_FAMILY_ID: Final = 1
_CTRL_FAMILY_NAME: Final = 2
_CTRL_MCAST_GROUPS: Final = 7
_GROUP_NAME: Final = 1
_GROUP_ID: Final = 2

_DEVICE: Final = 1
_MINOR: Final = 2
_DEV_CFG: Final = 4
_DEV_SIZE: Final = 5
_WRITECACHE: Final = 6
_CMD_STATUS: Final = 7
_DEVICE_ID: Final = 8


class NetlinkError(Exception):
    """A message that cannot be understood, or the kernel's refusal."""


class EventKind(IntEnum):
    """What happened to a device; a reply's number is higher by 3."""

    ADDED = 1
    REMOVED = 2
    RECONFIGURED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One event.

    `name`: of the uio device, `tcm-user/HBA/BACKSTORE/SUBTYPE/CONFIG`; `minor`: the N of
    /dev/uioN; `device_id`: what a reply has to name.  `config`, `size` (bytes) or `write_cache` is
    set in a RECONFIGURED event, according to what changed.
    """

    kind: EventKind
    name: str
    minor: int
    device_id: int
    config: str | None = None
    size: int | None = None
    write_cache: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Where TCM-USER is: message type and multicast group."""

    message_type: int
    group: int


def family_request(sequence: int = 1) -> bytes:
    """Ask the controller for the family."""
    name = _attribute(_CTRL_FAMILY_NAME, FAMILY.encode() + b"\0")
    return _message(_CONTROLLER, _GETFAMILY, 1, name, sequence)


def parse_family(datagram: bytes) -> Family:
    """The controller's answer.  Raises NetlinkError, also when the module is not loaded."""
    for message_type, payload in _messages(datagram):
        if message_type == _NLMSG_ERROR:
            (code,) = struct.unpack_from("=i", payload)
            raise NetlinkError(f"the kernel has no family {FAMILY} (error {-code})")
        attributes = dict(_attributes(payload[_GENERIC.size :]))
        (family,) = struct.unpack_from("=H", _wanted(attributes, _CTRL_FAMILY_ID))
        for _, group in _attributes(_wanted(attributes, _CTRL_MCAST_GROUPS)):
            fields = dict(_attributes(group))
            if _text(_wanted(fields, _GROUP_NAME)) == GROUP:
                (number,) = struct.unpack_from("=I", _wanted(fields, _GROUP_ID))
                return Family(message_type=family, group=number)
    raise NetlinkError(f"the family {FAMILY} has no multicast group {GROUP}")


def parse_events(datagram: bytes, family: Family) -> Iterator[Event]:
    """The events of one datagram; messages of other families and unknown commands are skipped.

    Raises NetlinkError for a message that is cut off or lacks what it must have.
    """
    for message_type, payload in _messages(datagram):
        if message_type != family.message_type:
            continue
        if len(payload) < _GENERIC.size:
            raise NetlinkError("message without a generic header")
        command, _, _ = _GENERIC.unpack_from(payload)
        if command not in EventKind.__members__.values():
            continue
        fields = dict(_attributes(payload[_GENERIC.size :]))
        cache = fields.get(_WRITECACHE)
        yield Event(
            kind=EventKind(command),
            name=_text(_wanted(fields, _DEVICE)),
            minor=_number(fields, _MINOR, "=I"),
            device_id=_number(fields, _DEVICE_ID, "=I"),
            config=_text(fields[_DEV_CFG]) if _DEV_CFG in fields else None,
            size=_number(fields, _DEV_SIZE, "=Q") if _DEV_SIZE in fields else None,
            write_cache=None if cache is None else bool(cache[0]),
        )


def overruled(datagram: bytes) -> bool:
    """Does the kernel say of a reply of ours that nobody waits for it (any more)?"""
    for message_type, payload in _messages(datagram):
        if message_type == _NLMSG_ERROR and len(payload) >= 4:
            (code,) = struct.unpack_from("=i", payload)
            if code == -errno.ENODEV:
                return True
    return False


def reply(event: Event, family: Family, status: int, sequence: int = 0) -> bytes:
    """The answer to `event`: `status` is 0 or a negative errno, which becomes the error of the
    configfs operation."""
    payload = _attribute(_CMD_STATUS, struct.pack("=i", status))
    payload += _attribute(_DEVICE_ID, struct.pack("=I", event.device_id))
    return _message(family.message_type, event.kind + 3, VERSION, payload, sequence)


def _message(message_type: int, command: int, version: int, payload: bytes, sequence: int) -> bytes:
    body = _GENERIC.pack(command, version, 0) + payload
    length = _HEADER.size + len(body)
    return _HEADER.pack(length, message_type, _REQUEST, sequence, 0) + body


def _attribute(number: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, number) + value + bytes(-length % 4)


def _messages(datagram: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, payload) of each message.  Raises NetlinkError for one that is cut off."""
    at = 0
    while at + _HEADER.size <= len(datagram):
        length, message_type, _, _, _ = _HEADER.unpack_from(datagram, at)
        if not _HEADER.size <= length <= len(datagram) - at:
            raise NetlinkError(f"message of {length} bytes in {len(datagram) - at}")
        if message_type >= _NLMSG_MIN_TYPE or message_type == _NLMSG_ERROR:
            yield message_type, datagram[at + _HEADER.size : at + length]
        at += (length + 3) & ~3


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, number = _ATTRIBUTE.unpack_from(data, at)
        if not _ATTRIBUTE.size <= length <= len(data) - at:
            raise NetlinkError(f"attribute of {length} bytes in {len(data) - at}")
        yield number & _TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


def _wanted(fields: dict[int, bytes], number: int) -> bytes:
    if number not in fields:
        raise NetlinkError(f"attribute {number} is missing")
    return fields[number]


def _number(fields: dict[int, bytes], number: int, form: str) -> int:
    value = _wanted(fields, number)
    if len(value) < struct.calcsize(form):
        raise NetlinkError(f"attribute {number} has {len(value)} bytes")
    return int(struct.unpack_from(form, value)[0])


def _text(value: bytes) -> str:
    return value.split(b"\0", 1)[0].decode(errors="surrogateescape")
