"""The configured devices as LUNs of the embedded target: opened, offered, and taken away again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import trio

from ploopd.config import DeviceConfig
from ploopd.control.automation import Automation
from ploopd.device_settings import device_options, recovery_policy
from ploopd.device_table import DeviceTable
from ploopd.devices import Device
from ploopd.errors import PloopError
from ploopd.gate.events import EventKind
from ploopd.gate.state import GateState
from ploopd.scsi.nexus import ItlNexus
from ploopd.scsi.target import Target

DRAIN_SECONDS = 10.0
"""For the commands of a LUN that is taken away to end."""

LOOK_SECONDS = 0.02
"""How often it is looked whether they have."""

log = logging.getLogger(__name__)

Users = Callable[[Device], str | None]
"""What else uses a device, in words; None if nothing does."""


@dataclass(slots=True, kw_only=True, eq=False)
class Lun:
    """A device with its number and that configuration of it that is in force.

    `streaming`: who was sending data when it was to be taken away and was not.
    """

    number: int
    device: Device
    config: DeviceConfig
    streaming: tuple[ItlNexus, ...] = ()


class Luns:
    """The LUNs of `target`; `users` are the other front ends.

    `retired`: numbers that were taken away.  They are not given out again unless somebody asks for
    them by number: an initiator that has not noticed would take the new disk for the old one.
    """

    def __init__(
        self, table: DeviceTable, target: Target, automation: Automation, users: Users
    ) -> None:
        self._table = table
        self._target = target
        self._automation = automation
        self._users = users
        self._luns: list[Lun] = []
        self.retired: set[int] = set()

    def __iter__(self) -> Iterator[Lun]:
        return iter(tuple(self._luns))

    async def open(self, name: str, config: DeviceConfig) -> Device:
        """Open a device that no initiator sees yet.  Raises what `DeviceTable.add` raises."""
        device = await self._table.add(config.image, device_options(config), name=name)
        for note in device.volume.notes:
            log.warning("event=image-note device=%s note=%r", device.name, note)
        return device

    async def close(self, device: Device) -> None:
        """Close a device that is no LUN; what goes wrong is logged."""
        with trio.CancelScope(shield=True):  # it has deadlines of its own
            try:
                await self._table.remove(device)
            except PloopError as error:
                log.error("event=close-failed device=%s error=%r", device.name, str(error))  # noqa: TRY400

    def offer(self, number: int, device: Device, config: DeviceConfig) -> None:
        """Initiators see the device from now on.  Raises ValueError if the number is taken."""
        self._target.add_unit(number, device.unit)
        self._automation.add(device, recovery_policy(config))
        device.bind()
        self._luns.append(Lun(number=number, device=device, config=config))
        device.announce(lun=number)

    async def remove(self, lun: Lun, *, force: bool = False) -> str | None:
        """Take a LUN away and close its device; returns why not, if it stays.

        Commands that arrive are refused at once, those in execution end.  `force`: a device in
        standby goes, too, and what waits for it fails.
        """
        device = lun.device
        reason = self._needed(device, force=force)
        if reason is not None:
            return reason
        async with self._automation.operator(device):
            itls = (*lun.streaming, *device.unit.itls)
            self._target.remove_unit(lun.number)
            if force and device.gate.state is not GateState.ACTIVE:
                device.give_up()
            ended = await self._drained(device, itls)
            if not ended and force:
                device.give_up()
                ended = True
            reason = self._needed(device, force=force)
            if reason is None and not ended:
                reason = f"commands in execution did not end within {DRAIN_SECONDS:g} s"
            if reason is not None:
                self._target.add_unit(lun.number, device.unit)
                lun.streaming = tuple(itl for itl in itls if itl.streams)
                return reason
        self._automation.remove(device)
        self._luns.remove(lun)
        self.retired.add(lun.number)
        device.unbind()
        await self.close(device)
        device.gate.report(EventKind.DEVICE_REMOVED, lun=lun.number)
        return None

    def _needed(self, device: Device, *, force: bool) -> str | None:
        """Why the device cannot be taken away now."""
        if device.replacing or device.gate.state is GateState.RECOVERING:
            return "it is being replaced"
        used = self._users(device)
        if used is not None:
            return used
        if device.gate.state is GateState.STANDBY and not force:
            return "it is in standby; with --force what waits for it fails"
        return None

    @staticmethod
    async def _drained(device: Device, itls: tuple[ItlNexus, ...]) -> bool:
        """Wait until nothing of the device is executed any more; False after DRAIN_SECONDS, and
        when it is in standby, where nothing ends."""
        with trio.move_on_after(DRAIN_SECONDS):
            while True:
                busy = device.gate.executing_count or any(itl.streams for itl in itls)
                if not busy and not len(device.unit.tasks):
                    return True
                if device.gate.state is not GateState.ACTIVE and device.gate.flags.supported:
                    return False
                await trio.sleep(LOOK_SECONDS)
        return False

    def numbers_of(self, device: Device) -> list[int]:
        """The LUNs at which initiators find the device."""
        return [lun for lun, unit in self._target.units.items() if unit is device.unit]

    def unbind(self) -> None:
        """The target has ended: nobody promises any more to clear standby."""
        luns, self._luns = self._luns, []
        for lun in luns:
            lun.device.unbind()
