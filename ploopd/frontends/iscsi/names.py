"""iSCSI names (RFC 7143 4.2.7, RFC 3722, RFC 3980): checked before they reach a log or a file."""

from __future__ import annotations

import re

MAX_NAME_LENGTH = 223

_IQN = re.compile(r"iqn\.[0-9]{4}-(0[1-9]|1[0-2])\.[a-z0-9][a-z0-9.\-]*(:[a-z0-9.:\-_]+)?")
_EUI = re.compile(r"eui\.[0-9a-f]{16}")
_NAA = re.compile(r"naa\.([0-9a-f]{16}|[0-9a-f]{32})")
_PORT_SUFFIX = ",i,0x"


def normalize_name(name: str) -> str | None:
    """The name as it is compared (lower case), or None if it is no iSCSI name.

    Only ASCII letters, digits and `.-:_` are accepted, so look-alikes, control characters and path
    separators never get further than here.  (`_` is not in RFC 3722 but is in common use.)
    """
    if not name.isascii() or len(name) > MAX_NAME_LENGTH:
        return None
    lowered = name.lower()
    for pattern in (_IQN, _EUI, _NAA):
        if pattern.fullmatch(lowered):
            return lowered
    return None


def initiator_port(name: str, isid: bytes) -> str:
    """The initiator's SCSI port name: what persistent reservations hang on (RFC 7143 4.4.2)."""
    return f"{name}{_PORT_SUFFIX}{isid.hex()}"


def target_port(name: str, portal_group_tag: int) -> str:
    """The target's SCSI port name."""
    return f"{name},t,0x{portal_group_tag:04x}"
