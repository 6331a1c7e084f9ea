"""GetInfo, GetConfig."""

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

    async def get_config(_parameters: messages.Empty, _send: Send) -> messages.ConfigText:
        return messages.ConfigText(toml=context.config_text())

    return [
        Operation(method=messages.GET_INFO, handler=get_info),
        Operation(method=messages.GET_CONFIG, handler=get_config),
    ]
