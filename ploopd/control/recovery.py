"""Replacing the storage under a device: architecture section "the gate", step by step.

    stop admission → drain → close the old top → open, lock, verify and mark the new one →
    replay → probe write and sync → swap → clear standby → release

The file is looked at before the first step, so that most wrong arguments are refused before
anything is touched.  A failure or a cancellation at any step leaves the device in standby, and
replace can be tried again; only a device that was active and whose storage is untouched goes on as
it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial

import trio

from ploopd.control.candidate import (
    Requirements,
    inspect,
    is_conclusive,
    require_fit,
    require_geometry,
    require_quiet,
)
from ploopd.devices import Device, OpenedVolume
from ploopd.disownable import disownable
from ploopd.errors import BusyError, ExitCode, PloopError
from ploopd.gate.events import EventKind
from ploopd.gate.state import GateState
from ploopd.storage.identity import keep_identity
from ploopd.storage.probe import ImageFormat
from ploopd.storage.volume import Volume


class Step(Enum):
    """The steps in their order; the values are what an operator sees."""

    CHECK = "check"
    STOP = "stop admission"
    DRAIN = "drain"
    CLOSE = "close old"
    OPEN = "open new"
    REPLAY = "replay"
    PROBE = "probe"
    SWAP = "swap"
    RELEASE = "release"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """A step that was done: `elapsed` seconds since the call, `detail` what is worth telling."""

    step: Step
    elapsed: float
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaceReport:
    """A replace that succeeded: the image now served, the one before, and the steps."""

    device: str
    image: str
    previous: str
    steps: Sequence[StepRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """Seconds that each step may take before it is given up."""

    check: float = 10.0
    drain: float = 5.0
    close: float = 5.0
    open: float = 60.0
    replay: float = 60.0
    probe: float = 10.0


OnStep = Callable[[StepRecord], None]


async def replace(
    device: Device,
    image: str,
    *,
    force: bool = False,
    drain_deadline: float = 5.0,
    deadlines: Deadlines | None = None,
    on_step: OnStep | None = None,
) -> ReplaceReport:
    """Make `image` the top delta of `device`; the same path again is allowed.

    `force` accepts an image that is marked as in use.  `on_step` is called after each step, in the
    event loop's thread.  Raises `BusyError` if the device is being replaced already, a `PloopError`
    that names the file for an image that cannot be used, and `StorageError` or a timeout when the
    storage does not work; the device is in standby then.
    """
    if device.replacing:
        raise BusyError("the device is being replaced already", field="device", value=device.name)
    device.replacing = True
    try:
        limits = deadlines or Deadlines(drain=drain_deadline)
        return await _Replacement(device, image, force, limits, on_step).run()
    finally:
        device.replacing = False


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


class _Replacement:
    """One call of `replace`."""

    def __init__(
        self,
        device: Device,
        image: str,
        force: bool,
        deadlines: Deadlines,
        on_step: OnStep | None,
    ) -> None:
        self.device = device
        self.image = os.path.abspath(image)
        self.force = force
        self.deadlines = deadlines
        self.on_step = on_step
        self.started = trio.current_time()
        self.steps: list[StepRecord] = []
        self.untouched = True
        self.opened: OpenedVolume | None = None

    async def run(self) -> ReplaceReport:
        device, gate = self.device, self.device.gate
        previous = next(each.path for each in device.volume.layers if each.level == 0)
        await self._check()
        gate.begin_recovery()
        gate.report(EventKind.REPLACE_STARTED, image=self.image)
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
        await self._keep_identity()
        return ReplaceReport(
            device=device.name, image=self.image, previous=previous, steps=tuple(self.steps)
        )

    async def _recover(self) -> None:
        device = self.device
        await self._drain_and_close()
        opened = self.opened = await self._open()
        volume, gate = opened.volume, device.gate  # the file may be another one than was looked at
        geometry = (gate.size, gate.cluster_size)
        require_geometry(self.image, (volume.size, volume.cluster_size), geometry)
        await device.start_volume(opened.volume)
        self._did(Step.OPEN, "; ".join(opened.volume.notes))
        await self._replay(opened.volume)
        await self._probe(opened.volume)
        self._swap(opened)

    # -- the steps -------------------------------------------------------------------------

    async def _check(self) -> None:
        """Look at the image before anything is touched.

        In standby an I/O error decides nothing: an error may stick to the file until the old
        descriptors are closed.
        """
        try:
            await self._examine()
        except PloopError as error:
            if self.device.gate.state is GateState.ACTIVE or is_conclusive(error):
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

    async def _open(self) -> OpenedVolume:
        """Open, lock and verify the new top, and mark it as in use (synced)."""
        device = self.device
        await self._examine()
        image, top = (device.image, self.image) if device.has_descriptor else (self.image, None)
        self.untouched = False
        return await device.open_volume(image, top, device.volume, self.deadlines.open)

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

    def _swap(self, opened: OpenedVolume) -> None:
        """No checkpoint from here on: the rest happens as a whole."""
        device = self.device
        device.gate.swap(device.under_gate(opened.volume))
        device.install(opened)
        self.opened = None
        if device.has_descriptor:
            device.top = self.image
        else:
            device.image = self.image
        self._did(Step.SWAP)
        parked = device.gate.parked_count
        device.gate.leave_standby()
        self._did(Step.RELEASE, f"{parked} parked requests" if parked else "")

    # -- helpers ---------------------------------------------------------------------------

    async def _examine(self) -> None:
        """Read the image's header and compare it with the device."""
        device = self.device
        volume = device.volume
        looking = partial(
            inspect,
            self.image,
            raw=volume.format_version == 0,
            image_format=ImageFormat.RAW if device.has_descriptor else device.options.open.format,
            layer=device.env.layer,
        )
        candidate = await disownable(
            looking,
            deadline=self.deadlines.check,
            what=f"looking at {self.image}",
            undo=lambda _: None,
            limiter=device.env.open_limiter,
        )
        require_fit(
            candidate,
            Requirements(
                format_version=volume.format_version,
                size=device.gate.size,
                cluster_size=device.gate.cluster_size,
                top=device.top_inode,
                lower=frozenset(volume.inode_numbers() - {device.top_inode}),
                force=self.force,
            ),
        )
        require_quiet(candidate, device.hung_operations())

    async def _keep_identity(self) -> None:
        """Let the new image be the same disk when it is served again later; best effort."""
        device = self.device
        if device.has_descriptor or device.volume.read_only:
            return
        try:
            await disownable(
                partial(keep_identity, self.image, device.identity),
                deadline=self.deadlines.check,
                what="keeping the identity",
                undo=lambda _: None,
                limiter=device.env.open_limiter,
            )
        except PloopError as error:
            device.gate.report(EventKind.REPLACE_STEP, step="identity", detail=str(error))

    async def _give_up(self, failure: BaseException) -> None:
        """Leave nothing behind but a device in standby."""
        if self.opened is not None:
            with trio.CancelScope(shield=True):  # bounded by the deadline
                await self.device.close_volume(self.opened, self.deadlines.close)
        self.device.gate.fail_recovery(failure, untouched=self.untouched)

    def _did(self, step: Step, detail: str = "") -> None:
        record = StepRecord(step=step, elapsed=trio.current_time() - self.started, detail=detail)
        self.steps.append(record)
        self.device.gate.report(
            EventKind.REPLACE_STEP, step=step.value, elapsed=record.elapsed, detail=detail
        )
        if self.on_step is not None:
            self.on_step(record)

    def _timeout(self, step: Step, seconds: float) -> PloopError:
        return PloopError(
            f"{step.value} took longer than {seconds:g} s",
            path=self.image,
            exit_code=ExitCode.TIMEOUT,
        )
