"""Devices for the kernel's target: the daemon's own, or images that a backstore names."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace as changed
from functools import partial

import trio

from ploopd.control.automation import Automation, RecoveryPolicy
from ploopd.control.recovery import replace
from ploopd.control.resize import resize
from ploopd.device_table import DeviceTable
from ploopd.devices import Device, DeviceOptions
from ploopd.disownable import disownable
from ploopd.errors import NotFoundError, PloopError, UsageError
from ploopd.frontends.tcmu.attachment import Served
from ploopd.frontends.tcmu.names import Reference
from ploopd.gate.events import EventKind
from ploopd.gate.state import GateState
from ploopd.scsi.logical_unit import LogicalUnit

CHECK_SECONDS = 15.0
"""For an image to be looked at."""

log = logging.getLogger(__name__)


class KernelDevice:
    """A device as the front end sees it; `on_bind` is called when it is about to be served,
    `automation` stands aside while it grows."""

    def __init__(
        self, device: Device, on_bind: Callable[[Device], None], automation: Automation
    ) -> None:
        self.device = device
        self._on_bind = on_bind
        self._automation = automation

    @property
    def name(self) -> str:
        return self.device.name

    @property
    def size(self) -> int:
        return self.device.size

    @property
    def unit(self) -> LogicalUnit:
        return self.device.unit

    @property
    def parking(self) -> bool:
        return self.device.gate.state is not GateState.ACTIVE

    def bind(self) -> None:
        self.device.bind()
        self._on_bind(self.device)

    def unbind(self) -> None:
        self.device.unbind()

    async def grow(self, size: int) -> None:
        """See `resize`; the size must be one that the image can have."""
        async with self._automation.operator(self.device):
            await resize(self.device, size, exact=True)

    async def wait_resized(self) -> None:
        await self.device.resized.wait()


class KernelDevices:
    """Finds or opens what a backstore's configuration string names; `options` and `policy` are for
    images that are opened here.  A device that was opened here is closed when its last backstore is
    gone.  `automation` recovers devices, and stands aside for who changes a medium."""

    def __init__(
        self,
        table: DeviceTable,
        options: DeviceOptions,
        automation: Automation,
        policy: RecoveryPolicy | None = None,
    ) -> None:
        self._table = table
        self.options = options
        self.policy = policy or RecoveryPolicy()
        self._automation = automation
        self._users: dict[Device, int] = {}
        self._opened: set[Device] = set()
        self._announced: set[Device] = set()
        self._opening = trio.Lock()

    async def acquire(self, reference: Reference) -> Served:
        """Raises NotFoundError for an unknown name and what opening an image raises."""
        async with self._opening:
            device = self._find(reference)
            if device is None:
                assert reference.image is not None
                device = await self._table.add(reference.image, self.options)
                self._opened.add(device)
                self._automation.add(device, self.policy)
            self._users[device] = self.users(device) + 1
            return KernelDevice(device, self._served, self._automation)

    def _served(self, device: Device) -> None:
        """A device is not added before: one that cannot be served is opened again and again."""
        if device in self._opened and device not in self._announced:
            self._announced.add(device)
            device.announce()

    def users(self, device: Device) -> int:
        """How many backstores use the device."""
        return self._users.get(device, 0)

    def _find(self, reference: Reference) -> Device | None:
        if reference.device is not None:
            for device in self._table:
                if device.name == reference.device:
                    return device
            names = ", ".join(device.name for device in self._table) or "none"
            raise NotFoundError(
                "no such device", field="device", value=reference.device, hint=f"there are: {names}"
            )
        assert reference.image is not None
        wanted = os.path.realpath(reference.image)
        for device in self._table:
            if os.path.realpath(device.image) == wanted:
                return device
        return None

    async def release(self, device: Served) -> None:
        """Close the device if it was opened here and this was its last backstore."""
        assert isinstance(device, KernelDevice)
        async with self._opening:
            self._users[device.device] -= 1
            if self._users[device.device]:
                return
            del self._users[device.device]
            if device.device not in self._opened:
                return
            self._opened.discard(device.device)
            async with self._automation.operator(device.device):
                self._automation.remove(device.device)
            try:
                await self._table.remove(device.device)
            except PloopError as error:
                log.error("event=close-failed device=%s error=%r", device.name, str(error))  # noqa: TRY400
            if device.device in self._announced:
                self._announced.discard(device.device)
                device.device.gate.report(EventKind.DEVICE_REMOVED)

    async def check(self, reference: Reference) -> None:
        """Whether `acquire` would succeed; raises what it would raise.  Changes nothing: the image
        is opened read-only and closed again."""
        if self._find(reference) is not None:
            return
        assert reference.image is not None
        options = self.options
        opener = self._table.env.opener(changed(options.open, read_only=True))
        volume = await disownable(
            partial(opener, reference.image, {}, None),
            deadline=CHECK_SECONDS,
            what=f"opening {reference.image}",
            undo=lambda volume: volume.abandon(),
            limiter=self._table.env.open_limiter,
        )
        volume.abandon()

    async def change_medium(self, device: Served, reference: Reference) -> None:
        """Replace the device's top delta by the image of `reference`; raises what that raises."""
        assert isinstance(device, KernelDevice)
        if reference.image is None:
            raise UsageError(
                "is a device's name; a medium is an image's path",
                field="cfgstring",
                value=str(reference),
            )
        async with self._automation.operator(device.device):
            await replace(device.device, reference.image)
