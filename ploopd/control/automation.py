"""Automatic recovery: who ends a standby that a storage error has begun, when nobody is there.

`reopen` looks at the file that the device had, then at its candidates, verifies the first that
answers and replaces with it; `command` runs a program that does what it knows to do and calls
`ploopctl device replace`.  Both go on, with growing pauses, for as long as the device is in
standby.  An operator always wins: a replace or a reload by hand stops an attempt that is under way,
and what an operator puts into standby stays there.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import trio

from ploopd.control import recovery, verification
from ploopd.control.hook import HookResult, run_hook
from ploopd.control.verification import Fingerprint
from ploopd.devices import Device
from ploopd.disownable import disownable
from ploopd.errors import PloopError
from ploopd.gate.events import Event, EventKind
from ploopd.gate.state import GateState

JITTER = 0.25
"""Pauses vary by this part, so that many devices do not ask one storage at the same moment."""

REPORT_SECONDS = 60.0
"""An attempt that fails as the one before is reported no more often."""

LOOK_SECONDS = 10.0
"""What looking at a file may take."""

T = TypeVar("T")

log = logging.getLogger(__name__)

Hook = Callable[[Sequence[str], Mapping[str, str], float], Awaitable[HookResult]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPolicy:
    """How one device is recovered, see `DeviceConfig`; seconds."""

    mode: Literal["manual", "reopen", "command"] = "manual"
    candidates: Sequence[str] = ()
    command: Sequence[str] = ()
    delay: float = 1.0
    delay_max: float = 30.0
    timeout: float = 60.0


class Automation:
    """The automatic recovery of all devices.  `control` is the control socket, for programs."""

    def __init__(
        self, control: Path, *, rng: random.Random | None = None, hook: Hook = run_hook
    ) -> None:
        self._control = control
        self._rng = rng or random.Random()
        self._hook = hook
        self._recoverers: dict[str, Recoverer] = {}
        self._nursery: trio.Nursery | None = None

    def add(self, device: Device, policy: RecoveryPolicy) -> None:
        """Before `run` or while it runs.  A device of mode "manual" is left alone."""
        if policy.mode == "manual":
            return
        self._begin(device, policy)

    def change(self, device: Device, policy: RecoveryPolicy) -> None:
        """From now on `device` is recovered by another policy; an attempt of another mode ends."""
        recoverer = self._recoverers.get(device.name)
        if recoverer is not None:
            recoverer.change(policy)
        elif policy.mode != "manual":
            self._begin(device, policy)

    def remove(self, device: Device) -> None:
        """The device goes away."""
        recoverer = self._recoverers.pop(device.name, None)
        if recoverer is not None:
            recoverer.stop()

    def _begin(self, device: Device, policy: RecoveryPolicy) -> None:
        recoverer = Recoverer(device, policy, self._control, self._rng, self._hook)
        self._recoverers[device.name] = recoverer
        if self._nursery is not None:
            self._nursery.start_soon(recoverer.run)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Recover devices until cancelled: an attempt under way then ends in one piece."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for recoverer in self._recoverers.values():
                nursery.start_soon(recoverer.run)
            task_status.started()
            await trio.sleep_forever()

    @asynccontextmanager
    async def operator(self, device: Device) -> AsyncIterator[None]:
        """An operator recovers `device` now: an attempt of ours ends first, and none begins."""
        recoverer = self._recoverers.get(device.name)
        if recoverer is None:
            yield
            return
        async with recoverer.stood_aside():
            yield

    def hold(self, device: Device) -> None:
        """An operator has put `device` into standby, or wants it to stay there."""
        recoverer = self._recoverers.get(device.name)
        if recoverer is not None:
            recoverer.hold()

    def describe(self, device: Device) -> str:
        """What is done for `device`, in a few words for an operator."""
        recoverer = self._recoverers.get(device.name)
        return "manual" if recoverer is None else recoverer.describe()


class DeviceFiles:
    """The files that a device may have, looked at in threads that can be let go."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._looking: set[str] = set()

    async def fingerprint(self, path: str) -> Fingerprint | None:
        """See `verification.fingerprint`; raises PloopError when there is no answer."""
        return await self._look(partial(verification.fingerprint, path), path)

    async def verify(self, path: str, *, closed_by_us: bool) -> None:
        """See `verification.verify`."""
        look = partial(verification.verify, self._device, path, closed_by_us=closed_by_us)
        await self._look(look, path)

    async def replace(self, path: str) -> None:
        """See `recovery.replace`; the file has been verified."""
        force = verification.accepts_in_use(self._device)
        await recovery.replace(self._device, path, force=force)

    async def _look(self, blocking: Callable[[], T], path: str) -> T:
        """While one look hangs there is no other, so that threads do not pile up."""
        if path in self._looking:
            raise PloopError("does not answer: an earlier look at it still hangs", path=path)
        began = False

        def look() -> T:
            nonlocal began
            began = True
            try:
                return blocking()
            finally:
                self._looking.discard(path)

        self._looking.add(path)
        try:
            return await disownable(
                look,
                deadline=LOOK_SECONDS,
                what=f"looking at {path}",
                undo=lambda _: None,
                limiter=self._device.env.open_limiter,
            )
        finally:
            if not began:  # no thread was free, and now none will begin
                self._looking.discard(path)


@dataclass(slots=True, kw_only=True)
class _Refusal:
    """A file that was found to be the wrong one: why, what it was like, and when."""

    reason: str
    found: Fingerprint | None
    time: float


@dataclass(slots=True, kw_only=True)
class _Episode:
    """One standby: what has been tried.  `ours`: files that we have opened, and perhaps closed."""

    delay: float
    attempts: int = 0
    refused: dict[str, _Refusal] = field(default_factory=dict)
    ours: set[str] = field(default_factory=set)
    last_error: str = ""
    reported: float | None = None


class Recoverer:
    """The automatic recovery of one device."""

    def __init__(
        self,
        device: Device,
        policy: RecoveryPolicy,
        control: Path,
        rng: random.Random,
        hook: Hook,
        files: DeviceFiles | None = None,
    ) -> None:
        self._device = device
        self._files = files or DeviceFiles(device)
        self._policy = policy
        self._control = control
        self._rng = rng
        self._hook = hook
        self._changed = trio.Event()
        self._operators = 0
        self._held = False
        self._cause: Mapping[str, str | int | float] = {}
        self._episode = _Episode(delay=policy.delay)
        self._attempt: trio.CancelScope | None = None
        self._replacing = self._overtaken = False
        self._ended = trio.Event()
        self._scope = trio.CancelScope()
        self._pause = trio.CancelScope()
        self._unsubscribe = device.env.events.subscribe(self._on_event)

    # -- what the operator does ------------------------------------------------------------

    @asynccontextmanager
    async def stood_aside(self) -> AsyncIterator[None]:
        """No attempt of ours; one under way is cancelled and has ended.  A program goes on: it may
        be the one that has sent the operator."""
        self._operators += 1
        try:
            if self._policy.mode == "reopen" and self._attempt is not None:
                self._attempt.cancel()
                await self._ended.wait()
            yield
        finally:
            self._operators -= 1
            self._wake()

    def hold(self) -> None:
        """Until the device is active again nothing is done for it."""
        if self._held or self._policy.mode == "manual":
            return
        self._held = True
        self._device.gate.report(EventKind.HELD)
        if self._attempt is not None:
            self._attempt.cancel()

    def change(self, policy: RecoveryPolicy) -> None:
        """See `Automation.change`."""
        other = policy.mode != self._policy.mode
        self._policy = policy
        self._episode.delay = policy.delay
        if other and self._attempt is not None:
            self._attempt.cancel()
        self._pause.cancel()  # what is new may help at once
        self._wake()

    def stop(self) -> None:
        """See `Automation.remove`."""
        self._unsubscribe()
        self._scope.cancel()

    def describe(self) -> str:
        """See `Automation.describe`."""
        mode = self._policy.mode
        if mode == "manual":
            return mode
        if self._held:
            return f"{mode}, held by an operator"
        episode = self._episode
        if not self._wanted() or not episode.attempts:
            return mode
        told = f": {episode.last_error}" if episode.last_error else ""
        return f"{mode}, {episode.attempts} attempts{told}"

    # -- the loop --------------------------------------------------------------------------

    async def run(self) -> None:
        """Recover the device from every standby, until cancelled."""
        with self._scope:
            while True:
                while not self._wanted():
                    await self._wait()
                episode = self._episode  # a success begins another one
                await self._try()
                pause = episode.delay * self._rng.uniform(1 - JITTER, 1 + JITTER)
                episode.delay = min(2 * episode.delay, self._policy.delay_max)
                with trio.move_on_after(pause) as self._pause:
                    while self._wanted():
                        await self._wait()

    def _wanted(self) -> bool:
        """Whether the device is in a standby that is ours to end."""
        device = self._device
        return (
            self._policy.mode != "manual"
            and device.gate.state is GateState.STANDBY
            and device.gate.faulted
            and not self._held
            and not self._operators
            and not device.replacing
        )

    async def _try(self) -> None:
        """One attempt, which an operator may cancel."""
        self._episode.attempts += 1
        self._ended = trio.Event()
        try:
            with trio.CancelScope() as self._attempt:
                if self._policy.mode == "reopen":
                    await self._reopen()
                else:
                    await self._command()
        finally:
            self._attempt = None
            self._ended.set()
        if self._overtaken:
            # It was recovered in the very moment in which the operator wanted it to stay.
            self._overtaken = False
            self._device.gate.enter_standby("entered by ploopctl")

    async def _wait(self) -> None:
        await self._changed.wait()
        self._changed = trio.Event()

    def _wake(self) -> None:
        self._changed.set()

    def _on_event(self, event: Event) -> None:
        if event.device != self._device.name:
            return
        if event.kind is EventKind.STANDBY_ENTERED:
            self._cause = event.details
        elif event.kind in (EventKind.RECOVERED, EventKind.STANDBY_LEFT):
            self._episode = _Episode(delay=self._policy.delay)
            self._overtaken = self._held and self._replacing
            self._held = self._overtaken
        self._wake()

    # -- reopen ----------------------------------------------------------------------------

    async def _reopen(self) -> None:
        """Try the file that the device had, then the candidates; return after the first success."""
        served = verification.served_path(self._device)
        for path in dict.fromkeys((served, *self._policy.candidates)):
            try:
                await self._replace_with(path, served=path == served)
            except PloopError as error:
                self._failed(path, error)
            else:
                self._moved(path, served)
                return

    def _moved(self, path: str, served: str) -> None:
        """Another file has taken over; what is configured still names the old one."""
        if path != served and not self._device.has_descriptor:
            log.warning(
                "event=recovered-elsewhere device=%s image=%s instead_of=%s hint=%r",
                self._device.name,
                path,
                served,
                "name the new file in the configuration before the next start",
            )

    async def _replace_with(self, path: str, *, served: bool) -> None:
        """Verify the file and replace with it; raises PloopError."""
        device, episode = self._device, self._episode
        found = await self._files.fingerprint(path)
        refusal = episode.refused.get(path)
        now = trio.current_time()
        if refusal and refusal.found == found and now < refusal.time + REPORT_SECONDS:
            raise PloopError(refusal.reason, path=path)
        closed_by_us = path in episode.ours or (served and not device.volume_open)
        try:
            await self._files.verify(path, closed_by_us=closed_by_us)
        except PloopError as error:
            if verification.is_refusal(error):
                self._refuse(path, error, found)
                raise
            # Errors may stick to a file for as long as the device has it open.
            if not (served and device.volume_open):
                raise
        episode.ours.add(path)
        device.env.events.quiet.add(device.name)
        self._replacing = True
        try:
            await self._files.replace(path)
        except PloopError as error:
            if verification.is_refusal(error):
                self._refuse(path, error, found)
            raise
        finally:
            device.env.events.quiet.discard(device.name)
            self._replacing = False

    def _refuse(self, path: str, error: PloopError, found: Fingerprint | None) -> None:
        """Remember that the file is the wrong one; an event only if it was not known."""
        before = self._episode.refused.get(path)
        reason = error.message
        refusal = _Refusal(reason=reason, found=found, time=trio.current_time())
        self._episode.refused[path] = refusal
        if before is None or before.reason != reason:
            self._device.gate.report(EventKind.CANDIDATE_REFUSED, image=path, error=str(error))

    def _failed(self, path: str, error: PloopError) -> None:
        """One line now and then; the storage is known not to work."""
        episode = self._episode
        episode.last_error = str(error)
        now = trio.current_time()
        level = logging.DEBUG
        if path not in episode.refused and (
            episode.reported is None or now >= episode.reported + REPORT_SECONDS
        ):
            episode.reported = now
            level = logging.INFO
        log.log(
            level,
            "event=recovery-attempt-failed device=%s image=%s attempt=%d error=%r",
            self._device.name,
            path,
            episode.attempts,
            str(error),
        )

    # -- command ---------------------------------------------------------------------------

    async def _command(self) -> None:
        device, episode = self._device, self._episode
        began = trio.current_time()
        try:
            result = await self._hook(self._policy.command, self._variables(), self._policy.timeout)
        except OSError as error:
            episode.last_error = f"cannot be run: {error}"
            device.gate.report(
                EventKind.RECOVERY_COMMAND,
                status=-1,
                elapsed=trio.current_time() - began,
                stderr=f"{self._policy.command[0]} {episode.last_error}",
            )
            return
        episode.last_error = f"exit code {result.status}" if result.status else ""
        device.gate.report(
            EventKind.RECOVERY_COMMAND,
            status=result.status,
            elapsed=result.elapsed,
            stderr=f"stopped after its time\n{result.stderr}"
            if result.timed_out
            else result.stderr,
        )

    def _variables(self) -> dict[str, str]:
        """What a program is told."""
        device = self._device
        return {
            "PLOOPD_EVENT": EventKind.STANDBY_ENTERED.value,
            "PLOOPD_DEVICE": device.name,
            "PLOOPD_IMAGE": verification.served_path(device),
            "PLOOPD_ERRNO": str(self._cause.get("errno", "")),
            "PLOOPD_CAUSE": device.gate.cause,
            "PLOOPD_STATE": device.gate.standby_text,
            "PLOOPD_ATTEMPT": str(self._episode.attempts),
            "PLOOPD_CONTROL": str(self._control),
        }
