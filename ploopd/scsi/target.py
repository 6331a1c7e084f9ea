"""A SCSI target device: its logical units and the nexuses that use them.

Source: SAM-5 4.6 (SCSI device model).
"""

from __future__ import annotations

from ploopd.scsi.logical_unit import LogicalUnit
from ploopd.scsi.nexus import Nexus
from ploopd.scsi.unit_attention import UnitAttention

MAX_LUN = 0x3FFF
"""The highest LUN of flat space addressing (SAM-5 4.7.7.3)."""


class Target:
    """`name`: the target's SCSI name, for iSCSI its IQN."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.units: dict[int, LogicalUnit] = {}
        self.nexuses: list[Nexus] = []

    def add_unit(self, lun: int, unit: LogicalUnit) -> None:
        """Offer `unit` as `lun`.  Raises ValueError if the number is taken or impossible."""
        if not 0 <= lun <= MAX_LUN:
            raise ValueError(f"LUN {lun} is not between 0 and {MAX_LUN}")
        if lun in self.units:
            raise ValueError(f"LUN {lun} of {self.name} is taken")
        self.units[lun] = unit
        self._luns_changed()

    def remove_unit(self, lun: int) -> None:
        """Take a LUN away.  Its running tasks end by themselves; new ones get 05/25/00."""
        del self.units[lun]
        self._luns_changed()
        for nexus in self.nexuses:
            nexus.drop_lun(lun)

    def open_nexus(self, initiator_port: str, target_port: str) -> Nexus:
        """A new I_T nexus.  The port names are SCSI names: `iqn…,i,0x<isid>`, `iqn…,t,0x<tpgt>`."""
        nexus = Nexus(self, initiator_port, target_port)
        self.nexuses.append(nexus)
        return nexus

    def _luns_changed(self) -> None:
        for nexus in self.nexuses:
            nexus.establish(UnitAttention.LUNS_CHANGED)
