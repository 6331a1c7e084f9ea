"""The standby state string of a device."""

from __future__ import annotations

from ploopd.control.messages.base import Message


class StandbyState(Message, frozen=True, kw_only=True):
    """The state string: `not supported`, `on` or `off`.

    `executing`: requests that the storage has and has not answered; while there are none, a device
    in standby leaves its image alone."""

    standby: str
    executing: int = 0


class StandbyWaitParameters(Message, frozen=True, kw_only=True):
    """Wait until the state string is `standby`, for `timeout` seconds at most."""

    name: str
    standby: str
    timeout: float = 30.0
