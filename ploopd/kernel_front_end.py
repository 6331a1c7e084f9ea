"""The kernel's target as a front end of the daemon: server, devices and message bus."""

from __future__ import annotations

import logging
from pathlib import Path

import trio

from ploopd.control.automation import Automation, RecoveryPolicy
from ploopd.device_table import DeviceTable
from ploopd.devices import DeviceOptions
from ploopd.errors import NotFoundError, UsageError
from ploopd.frontends.tcmu.names import Reference
from ploopd.frontends.tcmu.server import TcmuServer
from ploopd.frontends.tcmu.uio import Kernel
from ploopd.kernel_devices import KernelDevices

STATE_DIRECTORY = Path("/run/ploopd/tcmu")
"""For notes from one daemon to the next; gone with the kernel that they are about."""

log = logging.getLogger(__name__)


class KernelFrontEnd:
    """Serves backstores of the kind `user:ploop`; `options` and `policy` are for images that they
    name."""

    def __init__(
        self,
        table: DeviceTable,
        options: DeviceOptions,
        automation: Automation,
        policy: RecoveryPolicy | None = None,
        *,
        state: Path = STATE_DIRECTORY,
        kernel: Kernel | None = None,
    ) -> None:
        self.devices = KernelDevices(table, options, automation, policy)
        self.server = TcmuServer(self.devices, state, kernel=kernel)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled, after `shutdown`; started when what is there is being served."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._on_the_bus)
            await nursery.start(self.server.serve)
            task_status.started()

    async def shutdown(self, grace: float) -> None:
        """Let go of the kernel's devices so that the next daemon can go on; see `TcmuServer`."""
        await self.server.shutdown(grace)

    async def _on_the_bus(self) -> None:
        try:
            from ploopd.frontends.tcmu.dbus_service import BusService
        except ImportError as error:
            log.info(
                "event=dbus-absent reason=%r",
                f"{error}; targetcli does not show user:ploop without: pip install 'ploopd[dbus]'",
            )
            return
        await BusService(self).serve()

    # -- targetcli's questions -------------------------------------------------------------

    def another_handler(self, there: bool) -> None:
        """tcmu-runner has the name on the bus, or not."""
        self.server.another = there

    async def check(self, reference: Reference) -> None:
        """Raises PloopError if a backstore could not be served from `reference`."""
        await self.devices.check(reference)

    async def change_medium(self, backstore: str, reference: Reference, size: int) -> None:
        """Serve another image under the backstore; raises PloopError."""
        attachment = self.server.attached.get(backstore)
        if attachment is None:
            names = ", ".join(self.server.attached) or "none"
            raise NotFoundError(
                "is not served", field="backstore", value=backstore, hint=f"there are: {names}"
            )
        device = attachment.device
        if size not in (0, device.size):
            raise UsageError(
                f"the disk has {device.size} bytes and keeps its size",
                field="size",
                value=size,
                hint=f"give size={device.size}",
            )
        await self.devices.change_medium(device, reference)
