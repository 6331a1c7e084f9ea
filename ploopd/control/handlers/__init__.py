"""What the methods of the control interface do: one module per noun.

`operations(context)` of each module is what it adds to the server; `all_operations` gathers them.
"""

from __future__ import annotations

from ploopd.control.context import ControlContext
from ploopd.control.handlers import device, events, info, lio, recovery, standby
from ploopd.control.server import Operation


def all_operations(context: ControlContext) -> list[Operation]:
    """Every operation of `org.ploopd.Control`."""
    return [
        *info.operations(context),
        *device.operations(context),
        *recovery.operations(context),
        *standby.operations(context),
        *events.operations(context),
        *lio.operations(context),
    ]
