"""A device of the kernel that cannot be served: its commands are answered instead of waiting."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

import trio

from ploopd.disownable import disownable
from ploopd.errors import BusyError, LockedError, PloopError, UsageError
from ploopd.frontends.tcmu.restart import RestartNotes
from ploopd.frontends.tcmu.ring import Command, Ring, RingError
from ploopd.frontends.tcmu.uio import Kernel, SharedMemory, UioDevice
from ploopd.scsi.sense import Asc, Sense, SenseKey
from ploopd.scsi.task import Status

SECONDS: Final = 10.0
"""For one access to the kernel's files."""

LOOK_SECONDS: Final = 0.1
"""Between looks whether the kernel has finished making the device."""

T = TypeVar("T")

_NOT_READY: Final = Sense(
    SenseKey.NOT_READY, Asc.LOGICAL_UNIT_NOT_READY_MANUAL_INTERVENTION_REQUIRED
)

log = logging.getLogger(__name__)


class Refusal:
    """Answers the commands of `uio` in place of a device that could not be had because of `error`.

    Where somebody has to change something first, with NOT READY; where the storage may come back,
    with BUSY, so that initiators try again.  A device that another process may have, or may come
    to have, is left alone.
    """

    def __init__(
        self,
        kernel: Kernel,
        uio: UioDevice,
        error: PloopError,
        notes: RestartNotes,
        limiter: trio.CapacityLimiter,
    ) -> None:
        self._kernel = kernel
        self._uio = uio
        self._notes = notes
        self._limiter = limiter
        self._ours = not isinstance(error, BusyError | LockedError) and error.field != "device"
        wrong = isinstance(error, UsageError)
        self._status = Status.CHECK_CONDITION if wrong else Status.BUSY
        self._sense = _NOT_READY.pack(descriptor_format=False) if wrong else b""

    async def answer(self, seconds: float) -> None:
        """Answer what comes for that long."""
        with trio.move_on_after(seconds):
            if not self._ours:
                await trio.sleep_forever()
            try:
                made = partial(self._kernel.made, self._uio)
                while not await self._in_thread(made):  # noqa: ASYNC110 (the kernel does not tell)
                    await trio.sleep(LOOK_SECONDS)
                file = await self._in_thread(partial(self._kernel.open, self._uio), _close)
            except PloopError:
                await trio.sleep_forever()
            try:
                await self._answer(file)
            except RingError as error:
                log.warning("event=tcmu-ring device=%s error=%r", self._uio, str(error))
            finally:
                trio.lowlevel.notify_closing(file.fileno())
                file.close()
            await trio.sleep_forever()

    async def _answer(self, file: SharedMemory) -> None:
        """Until the device is removed.  Every command is answered at once, so the next one who
        takes the ring may go on where this one ends."""
        left = self._notes.take(self._uio)
        view = file.view()
        try:
            ring = Ring(view)
        except RingError:
            view.release()
            raise
        ours = not ring.waiting or ring.tail == left
        try:
            while ours:  # else its handler ended without a note: see `Attachment`
                for entry in ring.take():
                    if isinstance(entry, Command):
                        ring.answer(entry.command_id, self._status, self._sense)
                ring.settle()
                file.tell()
                await trio.lowlevel.wait_readable(file.fileno())
                ours = file.acknowledge()
        finally:
            if ours:
                self._notes.leave(self._uio, ring.tail)
            ring.close()

    async def _in_thread(
        self, blocking: Callable[[], T], undo: Callable[[T], object] = lambda _: None
    ) -> T:
        return await disownable(
            blocking,
            deadline=SECONDS,
            what=f"opening {self._uio}",
            undo=undo,
            limiter=self._limiter,
        )


def _close(file: SharedMemory) -> None:
    file.close()
