"""What all messages are made of."""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all parameters and replies."""


class Empty(Message, frozen=True, kw_only=True):
    """No parameters, or nothing to say but "done"."""


class DeviceName(Message, frozen=True, kw_only=True):
    """Which device: its name as `device list` shows it."""

    name: str
