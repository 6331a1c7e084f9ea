"""SCST's part of the ploop standby contract: two fuses, three state strings, and a watcher."""

from scst_shim.fuses import QueueFlags, StandbyCheck
from scst_shim.states import StandbyState, standby_state
from scst_shim.watcher import Watcher

__all__ = ["QueueFlags", "StandbyCheck", "StandbyState", "Watcher", "standby_state"]
