"""Unit attention conditions of one I_T_L nexus.

Source: SAM-5 5.14 (unit attention condition).  Each kind is pending at most once; a reset comes
before everything else.
"""

from __future__ import annotations

from enum import Enum

from ploopd.scsi.sense import Asc, Sense, SenseKey


class UnitAttention(Enum):
    """The conditions this target establishes, most important first."""

    POWER_ON = Asc.POWER_ON_RESET_OR_BUS_DEVICE_RESET_OCCURRED
    DEVICE_RESET = Asc.BUS_DEVICE_RESET_FUNCTION_OCCURRED
    NEXUS_LOSS = Asc.I_T_NEXUS_LOSS_OCCURRED
    COMMANDS_CLEARED = Asc.COMMANDS_CLEARED_BY_ANOTHER_INITIATOR
    CAPACITY_CHANGED = Asc.CAPACITY_DATA_HAS_CHANGED
    MODE_CHANGED = Asc.MODE_PARAMETERS_CHANGED
    LUNS_CHANGED = Asc.REPORTED_LUNS_DATA_HAS_CHANGED

    @property
    def sense(self) -> Sense:
        return Sense(SenseKey.UNIT_ATTENTION, self.value)


PRIORITY = {attention: rank for rank, attention in enumerate(UnitAttention)}


class UnitAttentions:
    """The pending conditions of one I_T_L nexus, in order of priority."""

    __slots__ = ("_pending",)

    def __init__(self) -> None:
        self._pending: list[UnitAttention] = []

    def __len__(self) -> int:
        return len(self._pending)

    def establish(self, attention: UnitAttention) -> None:
        """Add a condition; one that is pending already stays as it is."""
        if attention not in self._pending:
            self._pending.append(attention)
            self._pending.sort(key=PRIORITY.__getitem__)

    def take(self) -> UnitAttention | None:
        """Report the most important condition, which clears it; None if nothing is pending."""
        return self._pending.pop(0) if self._pending else None

    def clear(self, attention: UnitAttention) -> None:
        """Drop a condition that was reported by other means."""
        if attention in self._pending:
            self._pending.remove(attention)
