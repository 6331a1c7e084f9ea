"""The native protocol of systemd's journal: a log record as a datagram of fields.

Source: https://systemd.io/JOURNAL_NATIVE_PROTOCOL.  Fields beside MESSAGE are what makes
`journalctl PLOOPD_DEVICE=root` and `PLOOPD_EVENT=standby-entered` possible.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import struct
import uuid
from collections.abc import Mapping
from typing import Final, TextIO

from ploopd.gate.events import Event

SOCKET: Final = "/run/systemd/journal/socket"
_MESSAGE_IDS: Final = uuid.UUID("3a3f5c0e-6f4c-4b53-9f6e-0d1a6c1f7b52")
_LONGEST: Final = 48 << 10  # of one value: a datagram must fit into the socket's send buffer
_FIRST_WORDS: Final = re.compile(r"event=([\w-]+)(?: device=([\w.-]+))?")


def is_journal(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `stream` leads to the journal: $JOURNAL_STREAM names its device and inode."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def datagram(record: logging.LogRecord, message: str) -> bytes:
    """`record` as the journal takes it; `message` is its text."""
    fields = {
        "MESSAGE": message,
        "PRIORITY": str(_priority(record.levelno)),
        "SYSLOG_IDENTIFIER": "ploopd",
        "PLOOPD_LOGGER": record.name,
    }
    event = getattr(record, "ploopd_event", None)
    if isinstance(event, Event):
        fields |= event_fields(event)
    elif (words := _FIRST_WORDS.match(message)) is not None:
        fields["PLOOPD_EVENT"] = words[1]
        if words[2] is not None:
            fields["PLOOPD_DEVICE"] = words[2]
    return b"".join(_field(name, value) for name, value in fields.items())


def event_fields(event: Event) -> dict[str, str]:
    """PLOOPD_EVENT, PLOOPD_DEVICE, one for each detail, MESSAGE_ID, and ERRNO as a number."""
    fields = {"PLOOPD_EVENT": event.kind.value, "PLOOPD_DEVICE": event.device}
    for name, value in event.details.items():
        fields[f"PLOOPD_{name.upper()}"] = str(value)
    number = getattr(errno, str(event.details.get("errno", "")), None)
    if isinstance(number, int):
        fields["ERRNO"] = str(number)
    fields["MESSAGE_ID"] = uuid.uuid5(_MESSAGE_IDS, event.kind.value).hex
    return fields


def _field(name: str, value: str) -> bytes:
    data = value.encode(errors="backslashreplace")[:_LONGEST]
    if b"\n" not in data:
        return b"%s=%s\n" % (name.encode(), data)
    return b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(data)), data)


def _priority(level: int) -> int:
    """The syslog priority of a logging level."""
    for limit, priority in ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6)):
        if level >= limit:
            return priority
    return 7
