"""GetInfo."""

from __future__ import annotations

import os

from ploopd.control import messages
from ploopd.control.context import ControlContext
from ploopd.control.server import Operation, Send


def operations(context: ControlContext) -> list[Operation]:
    """What this module serves."""

    async def get_info(_parameters: messages.Empty, _send: Send) -> messages.DaemonInfo:
        return messages.DaemonInfo(
            version=context.version,
            pid=os.getpid(),
            uptime=context.devices.env.clock() - context.started,
            iqn=context.iqn,
            portals=context.portals,
            devices=len(context.devices),
        )

    return [Operation(method=messages.GET_INFO, handler=get_info)]
