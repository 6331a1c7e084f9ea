"""The three strings that `/sys/block/<device>/queue/standby` shows."""

from __future__ import annotations

from enum import StrEnum


class StandbyState(StrEnum):
    """What a queue's `standby` attribute reads."""

    NOT_SUPPORTED = "not supported"
    ON = "on"
    OFF = "off"


def standby_state(*, check: bool, standby_en: bool, standby: bool) -> StandbyState:
    """The state of a queue: both fuses must be on before the STANDBY flag means anything."""
    if not (check and standby_en):
        return StandbyState.NOT_SUPPORTED
    return StandbyState.ON if standby else StandbyState.OFF
