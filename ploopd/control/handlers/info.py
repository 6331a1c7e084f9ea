"""GetInfo, GetConfig, Reload."""

from __future__ import annotations

import os

from ploopd.control import messages
from ploopd.control.context import ControlContext
from ploopd.control.server import Operation, Send
from ploopd.errors import UnsupportedError


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

    async def reload(parameters: messages.ReloadAll, _send: Send) -> messages.ReloadReply:
        if context.reload is None:
            raise UnsupportedError("this daemon has no configuration files")
        report = await context.reload(parameters.force)
        return messages.ReloadReply(
            added=list(report.added),
            removed=list(report.removed),
            changed=list(report.changed),
            refused=[
                messages.ReloadRefusal(device=each.device, reason=each.reason)
                for each in report.refused
            ],
            needs_restart=list(report.needs_restart),
        )

    return [
        Operation(method=messages.RELOAD, handler=reload, outlives_client=True),
        Operation(method=messages.GET_INFO, handler=get_info),
        Operation(method=messages.GET_CONFIG, handler=get_config),
    ]
