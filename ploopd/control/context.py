"""What the handlers of the control interface work on."""

from __future__ import annotations

import difflib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ploopd.control.automation import Automation
from ploopd.control.event_log import EventLog
from ploopd.device_table import DeviceTable
from ploopd.devices import Device
from ploopd.errors import NotFoundError
from ploopd.lio_exports import LioExports

if TYPE_CHECKING:
    from ploopd.reload import ReloadReport


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlContext:
    """The daemon, as its handlers see it.

    `urls(device)` are the URLs of a device; `started` is on the devices' clock.
    `event_log` has what happened to them, `automation` recovers them.
    `config_text()` is the configuration as it is now, as TOML, and `reload(force)`
    reads the files of it again, if there are any.  `lio` exports the devices through the kernel's
    target, if this daemon serves that.
    """

    devices: DeviceTable
    urls: Callable[[str], list[str]]
    iqn: str
    portals: list[str]
    version: str
    started: float
    event_log: EventLog
    automation: Automation
    lio: LioExports | None = None
    reload: Callable[[bool], Awaitable[ReloadReport]] | None = None
    config_text: Callable[[], str] = str

    def find(self, name: str) -> Device:
        """The device called `name`.  Raises `NotFoundError`, which proposes the nearest name."""
        try:
            return self.devices.get(name)
        except NotFoundError as error:
            names = [device.name for device in self.devices]
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            if near:
                error.hint = f"did you mean {near[0]}? See `ploopctl device list`"
            raise
