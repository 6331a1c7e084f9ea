"""Replacing the storage under a device: architecture section "the gate", step by step.

    stop admission → drain → close the old files → open, lock, verify and mark the new ones →
    replay → probe write and sync → record → swap → clear standby → release

Everything is looked at before the first step, so that most wrong arguments are refused before
anything is touched.  A failure or a cancellation at any step leaves the device in standby, and the
recovery can be tried again; only a device that was active and whose storage is untouched goes on
as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import trio

from ploopd.control.candidate import is_conclusive, require_geometry
from ploopd.control.plan import Plan, ReloadPlan, ReplaceOptions, ReplacePlan, intentions
from ploopd.control.steps import (
    RECOVERY_STEPS,
    Deadlines,
    OnStep,
    ReplaceReport,
    Step,
    StepRecord,
)
from ploopd.devices import Device, OpenedVolume
from ploopd.disownable import disownable
from ploopd.errors import BusyError, ExitCode, PloopError
from ploopd.gate.events import EventKind
from ploopd.gate.state import GateState
from ploopd.storage.volume import Volume

__all__ = [
    "Deadlines",
    "OnStep",
    "ReplaceOptions",
    "ReplaceReport",
    "Step",
    "StepRecord",
    "clear_latch",
    "leave_standby",
    "reload",
    "replace",
]

T = TypeVar("T")


async def replace(
    device: Device,
    image: str,
    *,
    force: bool = False,
    level: int | None = None,
    guid: str | None = None,
    keep_name: bool = False,
    keep_descriptor: bool = False,
    dry_run: bool = False,
    drain_deadline: float = 5.0,
    deadlines: Deadlines | None = None,
    on_step: OnStep | None = None,
) -> ReplaceReport:
    """Put `image` in the place of a delta of `device`; the same path again is allowed.

    The delta is the top, or that of `level` (0 is the top) or `guid`.  `force` accepts an image
    that is marked as in use.  `keep_name` renames `image` to the name of the old file.
    `keep_descriptor` leaves DiskDescriptor.xml as it is.  With `dry_run` nothing is touched: all
    checks are made, and the report says what would be done.  `on_step` is called after each step,
    in the event loop's thread.

    Raises `BusyError` if the device is being recovered already, a `PloopError` that names the file
    for an image that cannot be used, and `StorageError` or a timeout when the storage does not
    work; the device is in standby then, unless nothing had been touched.
    """
    require_idle(device)
    options = ReplaceOptions(
        force=force, level=level, guid=guid, keep_name=keep_name, keep_descriptor=keep_descriptor
    )
    plan = ReplacePlan(device, image, options)
    limits = deadlines or Deadlines(drain=drain_deadline)
    return await Recovery(device, plan, limits, on_step).run(dry_run=dry_run)


async def reload(
    device: Device,
    *,
    dry_run: bool = False,
    deadlines: Deadlines | None = None,
    on_step: OnStep | None = None,
) -> ReplaceReport:
    """Close the files of `device` and open them again from where they were opened, as vz9 reloads
    a table; a DiskDescriptor.xml that has changed is taken up.

    Parameters and errors are those of `replace`.
    """
    require_idle(device)
    plan = ReloadPlan(device)
    return await Recovery(device, plan, deadlines or Deadlines(), on_step).run(dry_run=dry_run)


def require_idle(device: Device) -> None:
    """Raise `BusyError` while another recovery of the device is under way."""
    if device.replacing:
        raise BusyError(
            "the device is being replaced already, or reloaded", field="device", value=device.name
        )


def leave_standby(device: Device, *, force: bool = False) -> None:
    """Go on with the same storage, for an operator who has put the device into standby.

    Raises `BusyError` when a storage error has put it there (`force` goes on all the same) or
    when the device has no open volume: only replace helps.
    """
    if device.replacing or device.gate.state is GateState.RECOVERING:
        raise BusyError("the device is being recovered", field="device", value=device.name)
    if not device.volume_open:
        raise BusyError(
            "has no open image since a replace failed",
            field="device",
            value=device.name,
            hint=f"ploopctl device replace {device.name} --image FILE",
        )
    if device.gate.faulted and not force:
        raise BusyError(
            f"is in standby because its storage failed: {device.gate.cause}",
            field="device",
            value=device.name,
            hint=f"ploopctl device replace {device.name} --image FILE",
        )
    device.gate.leave_standby()


def clear_latch(device: Device) -> str:
    """Let a device that a storage failure has made read-only be written to again; returns the
    failure.

    Raises `BusyError` if there was none.
    """
    failure = device.gate.latched
    if failure is None:
        raise BusyError(
            "is not latched read-only", field="device", value=device.name, hint="nothing to clear"
        )
    device.gate.clear_latch()
    return str(failure)


class Recovery:
    """One call of `replace` or `reload`, or (a class below this one) of `resize`."""

    def __init__(
        self, device: Device, plan: Plan, deadlines: Deadlines, on_step: OnStep | None
    ) -> None:
        self.device = device
        self.plan = plan
        self.deadlines = deadlines
        self.on_step = on_step
        self.started = trio.current_time()
        self.steps: list[StepRecord] = []
        self.looked = False
        self.prepared = False
        self.untouched = True
        self.opened: OpenedVolume | None = None

    async def run(self, *, dry_run: bool) -> ReplaceReport:
        self.device.replacing = True
        try:
            await self._check(dry_run=dry_run)
            if dry_run:
                self._tell_the_rest()
            else:
                await self._execute()
        finally:
            if self.prepared:
                await self._discard()
            self.device.replacing = False
        plan = self.plan
        return ReplaceReport(
            device=self.device.name,
            image=plan.subject,
            previous=plan.previous,
            steps=tuple(self.steps),
            level=plan.level,
            guid=plan.guid,
            dry_run=dry_run,
        )

    async def _execute(self) -> None:
        gate = self.device.gate
        gate.begin_recovery()
        gate.report(EventKind.REPLACE_STARTED, image=self.plan.subject)
        failure: BaseException | None = PloopError("the replace was interrupted")
        try:
            self._did(Step.STOP)
            await self._recover()
            failure = None
        except (PloopError, OSError) as error:
            failure = error
            raise
        finally:
            if failure is not None:
                await self._give_up(failure)

    async def _recover(self) -> None:
        device = self.device
        await self._drain_and_close()
        await self._alter()
        opened = self.opened = await self._open()
        volume, gate = opened.volume, device.gate  # the file may be another one than was looked at
        geometry = (device.expected_size(volume.size), gate.cluster_size)
        require_geometry(self.plan.subject, (volume.size, volume.cluster_size), geometry)
        await device.start_volume(opened.volume)
        self._did(Step.OPEN, "; ".join(opened.volume.notes))
        await self._replay(opened.volume)
        await self._probe(opened.volume)
        await self._record()
        self._swap(opened)

    # -- the steps -------------------------------------------------------------------------

    async def _check(self, *, dry_run: bool) -> None:
        """Look at what is to be opened before anything is touched, and prepare the record.

        In standby an I/O error decides nothing: an error may stick to the file until the old
        descriptors are closed.
        """
        if self.device.recording.locked():
            raise BusyError(
                "an earlier recovery still hangs in changing the name of a file",
                field="device",
                value=self.device.name,
                hint="wait until its file system has answered",
            )
        try:
            await self._look(thorough=True)
            self.looked = True
            record = self.plan.record
            self.prepared = not dry_run
            await self._recording(record.check if dry_run else record.prepare, self.deadlines.check)
        except PloopError as error:
            if dry_run or self.device.gate.state is GateState.ACTIVE or is_conclusive(error):
                raise
            self._did(Step.CHECK, f"postponed: {error}")
        else:
            self._did(Step.CHECK)

    async def _drain_and_close(self) -> None:
        device = self.device
        executing = device.gate.executing_count
        if not await device.gate.drain(self.deadlines.drain):
            self.untouched = False
            device.abandon(device.opened)  # before any checkpoint: see Gate.drain
            self._did(Step.DRAIN, f"{executing} in execution, the hung ones were disowned")
            self._did(Step.CLOSE, "abandoned")
            return
        self._did(Step.DRAIN, f"{executing} in execution" if executing else "")
        if not device.volume_open:
            self._did(Step.CLOSE, "closed before")
            return
        self.untouched = False
        problem = await device.close_volume(device.opened, self.deadlines.close)
        self._did(Step.CLOSE, f"ignored: {problem}" if problem else "")

    async def _alter(self) -> None:
        """Change the closed files: nothing to do where others take their place."""

    async def _open(self) -> OpenedVolume:
        """Open, lock and verify the new files, and mark the top as in use (synced)."""
        plan, device = self.plan, self.device
        await self._look(thorough=not self.looked)
        self.untouched = False
        return await device.open_volume(
            plan.opens, plan.substitutes, device.volume, self.deadlines.open
        )

    async def _replay(self, volume: Volume) -> None:
        """Write again what was acknowledged and may have been lost with the old storage."""
        written = 0
        with trio.move_on_after(self.deadlines.replay) as scope:
            for hook in self.device.replay_hooks:
                written += await hook(volume)
        if scope.cancelled_caught:
            raise self._timeout(Step.REPLAY, self.deadlines.replay)
        self._did(Step.REPLAY, f"{written} bytes" if written else "")

    async def _probe(self, volume: Volume) -> None:
        """The storage must take a write and a sync before anything depends on it."""
        if volume.read_only:
            self._did(Step.PROBE, "read-only")
            return
        with trio.move_on_after(self.deadlines.probe) as scope:
            await volume.probe_write()
        if scope.cancelled_caught:
            raise self._timeout(Step.PROBE, self.deadlines.probe)
        self._did(Step.PROBE)

    async def _record(self) -> None:
        """Whoever opens the device after a crash from here on finds the new image."""
        told = await self._recording(self.plan.record.commit, self.deadlines.record)
        self.prepared = False
        self._did(Step.RECORD, told)

    def _swap(self, opened: OpenedVolume) -> None:
        """No checkpoint from here on: the rest happens as a whole."""
        device = self.device
        volume, size = opened.volume, device.size
        device.gate.swap(device.under_gate(volume), device.standby_errnos(volume))
        device.install(opened)
        if device.size != size:
            device.size_changed(size)
        self.opened = None
        self.plan.adopted(device)
        self._did(Step.SWAP)
        parked = device.gate.parked_count
        device.gate.leave_standby()
        self._did(Step.RELEASE, f"{parked} parked requests" if parked else "")

    # -- helpers ---------------------------------------------------------------------------

    async def _look(self, *, thorough: bool) -> None:
        await self._in_thread(
            partial(self.plan.look, self.device.hung_operations(), thorough=thorough),
            self.deadlines.check,
            f"looking at {self.plan.subject}",
        )

    async def _recording(self, change: Callable[[], T], deadline: float) -> T:
        """Call what changes names.  A call that hangs keeps every other one from beginning."""
        lock = self.device.recording

        def alone() -> T:
            if not lock.acquire(blocking=False):
                raise BusyError(
                    "an earlier change of a file's name still hangs", path=self.plan.subject
                )
            try:
                return change()
            finally:
                lock.release()

        return await self._in_thread(alone, deadline, f"recording {self.plan.subject}")

    async def _in_thread(self, blocking: Callable[[], T], deadline: float, what: str) -> T:
        return await disownable(
            blocking,
            deadline=deadline,
            what=what,
            undo=lambda _: None,
            limiter=self.device.env.open_limiter,
        )

    async def _discard(self) -> None:
        """Leave nothing of the record behind, unless its storage hangs."""
        with trio.CancelScope(shield=True):  # bounded by the deadline
            try:
                await self._recording(self.plan.record.discard, self.deadlines.check)
            except PloopError as error:
                self.device.gate.report(
                    EventKind.REPLACE_STEP, step="discard", detail=f"ignored: {error}"
                )

    async def _give_up(self, failure: BaseException) -> None:
        """Leave nothing behind but a device in standby."""
        if self.opened is not None:
            with trio.CancelScope(shield=True):  # bounded by the deadline
                await self.device.close_volume(self.opened, self.deadlines.close)
        self.device.gate.fail_recovery(failure, untouched=self.untouched)

    def _tell_the_rest(self) -> None:
        told = intentions(self.plan, self.device)
        for step in RECOVERY_STEPS:
            if step is not Step.CHECK:
                self._did(step, told.get(step.value, ""), planned=True)

    def _did(self, step: Step, detail: str = "", *, planned: bool = False) -> None:
        record = StepRecord(
            step=step,
            elapsed=trio.current_time() - self.started,
            detail=detail,
            planned=planned,
        )
        self.steps.append(record)
        if not planned:
            self.device.gate.report(
                EventKind.REPLACE_STEP, step=step.value, elapsed=record.elapsed, detail=detail
            )
        if self.on_step is not None:
            self.on_step(record)

    def _timeout(self, step: Step, seconds: float) -> PloopError:
        return PloopError(
            f"{step.value} took longer than {seconds:g} s",
            path=self.plan.subject,
            exit_code=ExitCode.TIMEOUT,
        )
