"""Growing a device while it is served: its image is grown offline (`ploopd.storage.grow`) between
two openings, with the steps of a recovery.  Initiators see a pause, and then another capacity.

What cannot be done is refused before anything is touched, or the device goes on with its old size.
Only a storage that fails meanwhile leaves it in standby; a reload or a replace then takes the image
as it is, of the old size or of the new one.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from ploopd.control.candidate import require_geometry, require_quiet
from ploopd.control.plan import Hung
from ploopd.control.record import NoRecord, Record
from ploopd.control.recovery import Recovery, require_idle
from ploopd.control.steps import Deadlines, OnStep, Step
from ploopd.devices import Device
from ploopd.errors import BusyError, ExitCode, PloopError, ReadOnlyError, StorageError, UsageError
from ploopd.gate.state import GateState
from ploopd.storage.grow import grow_image, planned, verify_whole
from ploopd.storage.opener import open_stack


@dataclass(frozen=True, slots=True, kw_only=True)
class ResizeReport:
    """`size` of the device now and `previous` before, in bytes."""

    device: str
    size: int
    previous: int


async def resize(
    device: Device,
    size: int,
    *,
    exact: bool = False,
    deadlines: Deadlines | None = None,
    on_step: OnStep | None = None,
) -> ResizeReport:
    """Give `device` and its image `size` bytes, rounded up to whole clusters; `exact` refuses a
    size that would have to be rounded.  The size that it has is no error, and changes nothing.

    Raises `BusyError` for a device that is not active or whose requests do not end, `UsageError`
    for a smaller size or one that the image cannot have, `ReadOnlyError`, `StorageError` without
    room, and what reopening an image raises.
    """
    require_idle(device)
    _require_working(device)
    plan = ResizePlan(device, size, exact=exact)
    return await _Resize(device, plan, deadlines or Deadlines(), on_step).resize()


def _require_working(device: Device) -> None:
    """Growing is for a storage that nothing is wrong with."""

    def refused(message: str, hint: str) -> BusyError:
        return BusyError(message, field="device", value=device.name, hint=hint)

    if device.volume.read_only:
        raise ReadOnlyError("is served read-only", path=device.image)
    if device.gate.state is not GateState.ACTIVE or not device.volume_open:
        raise refused(
            f"is in standby ({device.gate.cause}), and grows when it is active again",
            f"ploopctl device standby {device.name} wait --state off",
        )
    failure = device.gate.latched or device.volume.sync_failed
    if failure is not None or device.may_change_late:
        raise refused(
            f"its storage has failed: {failure or 'late writes may still change the image'}",
            f"ploopctl device replace {device.name} --image COPY, and resize it then",
        )


class ResizePlan:
    """The same files are opened again; `size` is what their disk has then, known after the look.

    See `plan.Plan`.
    """

    def __init__(self, device: Device, size: int, *, exact: bool) -> None:
        self.subject = self.previous = self.opens = device.image
        self.level: int | None = None
        self.guid: str | None = None
        self.substitutes: Mapping[str, str] = device.substitutes
        self.record: Record = NoRecord("")
        self.size = size
        self._exact = exact
        self._device = device

    def look(self, hung: Hung, *, thorough: bool) -> None:
        """See `Plan.look`.  Not a second time: the files are being changed by then."""
        if not thorough:
            return
        device = self._device
        options = device.options.open
        files, stack = open_stack(
            self.opens,
            locking=False,
            options=options,
            substitutes=self.substitutes,
            layer=device.env.layer,
        )
        try:
            verify_whole(files, stack, self.substitutes)
            geometry = (device.gate.size, device.gate.cluster_size)
            require_geometry(self.subject, (stack.size, stack.cluster_size), geometry)
            require_quiet(stack.top.file.path, stack.top.inode, hung)
            growth = planned(stack, self.size)
            missing = 0 if growth is None else growth.missing_room(stack)
        finally:
            stack.close()
        wanted, self.size = self.size, device.gate.size if growth is None else growth.size
        if self._exact and self.size != wanted:
            raise UsageError(
                f"the disk {device.name} has clusters of {device.gate.cluster_size} bytes",
                path=self.subject,
                field="size",
                value=wanted,
                hint=f"the next size that it can have is {self.size}",
            )
        if missing:
            raise StorageError(
                errno.ENOSPC,
                "grow",
                path=self.subject,
                message=f"its file system lacks {missing} bytes for the longer BAT [ENOSPC]",
            )

    def adopted(self, device: Device) -> None:
        """See `Plan.adopted`."""


class _Resize(Recovery):
    """One call of `resize`."""

    def __init__(
        self, device: Device, plan: ResizePlan, deadlines: Deadlines, on_step: OnStep | None
    ) -> None:
        super().__init__(device, plan, deadlines, on_step)
        self._wanted = plan
        self._failure: PloopError | None = None

    async def resize(self) -> ResizeReport:
        device, previous = self.device, self.device.size
        device.replacing = True
        try:
            await self._check(dry_run=False)
            if self._wanted.size != previous:
                _require_working(device)  # it was not stopped while it was looked at
                await self._execute()
        finally:
            device.replacing = False
        if self._failure is not None:
            raise self._failure
        return ResizeReport(device=device.name, size=device.size, previous=previous)

    async def _drain_and_close(self) -> None:
        device = self.device
        executing = device.gate.executing_count
        if not await device.gate.drain(self.deadlines.drain, disown=False):
            raise BusyError(
                f"{device.gate.executing_count} requests have not ended within "
                f"{self.deadlines.drain:g} s",
                field="device",
                value=device.name,
                hint="try again when its storage is not as busy",
            )
        self._did(Step.DRAIN, f"{executing} in execution" if executing else "")
        if device.gate.faulted:
            raise BusyError(f"its storage has failed: {device.gate.cause}", path=device.image)
        self.untouched = False
        problem = await device.close_volume(device.opened, self.deadlines.close)
        if problem is not None:
            raise problem
        self._did(Step.CLOSE)

    async def _alter(self) -> None:
        """A failure is told when the image has been opened again, as large as it is then.

        One that hangs is not waited for, and keeps the files locked until it has ended.
        """
        device, size = self.device, self._wanted.size
        device.growing_to = size
        grow = partial(
            grow_image,
            device.image,
            size,
            options=device.options.open,
            substitutes=device.substitutes,
            layer=device.env.layer,
        )
        try:
            grown = await self._in_thread(grow, self.deadlines.grow, f"growing {device.image}")
        except PloopError as error:
            if error.exit_code is ExitCode.TIMEOUT:
                raise
            self._failure = error
            self._did(Step.GROW, f"failed: {error}")
        else:
            moved = f", {grown.moved} clusters moved" if grown.moved else ""
            self._did(Step.GROW, f"from {grown.previous} to {grown.size} bytes{moved}")
