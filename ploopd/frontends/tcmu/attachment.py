"""One device of the kernel, served by one of ours: open, take over the ring, serve, let go."""

from __future__ import annotations

import contextlib
import logging
import select
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

import trio

from ploopd.disownable import disownable
from ploopd.errors import PloopError, UsageError
from ploopd.fileio.polling import AdaptivePoll
from ploopd.frontends.tcmu.handler import Handler
from ploopd.frontends.tcmu.restart import RestartNotes
from ploopd.frontends.tcmu.ring import Ring, RingError
from ploopd.frontends.tcmu.uio import Kernel, SharedMemory, UioDevice
from ploopd.scsi.logical_unit import LogicalUnit
from ploopd.sleeper import Sleeper

CONFIGFS_SECONDS = 10.0
"""For one access to configfs; the kernel may never come back from one."""

GIVE_BACK_SECONDS = 2.0
"""For commands in execution to end after the others have been given back."""

PATIENCE = 1
"""Milliseconds to wait for the next command without the loop, where that is not in vain."""

TURN = 256
"""Commands worked on in a row before other tasks get their turn."""

log = logging.getLogger(__name__)

RESTORE_SECONDS = 1.0
"""For `targetctl restore` to write a new device's attributes."""

T = TypeVar("T")


class Served(Protocol):
    """What a front end needs of a device (`ploopd.devices.Device`)."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def unit(self) -> LogicalUnit: ...

    @property
    def parking(self) -> bool:
        """Requests are parked instead of being executed."""
        ...

    def bind(self) -> None: ...

    def unbind(self) -> None: ...

    async def grow(self, size: int) -> None:
        """Become a disk of `size` bytes, with the image.  Raises PloopError."""
        ...

    async def wait_resized(self) -> None:
        """Return when the disk gets another size."""
        ...


class Attachment:
    """`uio` served by `device`.

    `check`, and `start` once the kernel has made the device, raise a PloopError when that cannot
    be; then `serve` runs until the kernel removes it, `stop` or cancellation.  `ended` is set when
    nothing of it is open any more, `settled` when none of its commands is in execution any more,
    either.  `alone` says whether no other device is served, `new` whether nobody has ever opened
    the kernel's.
    """

    def __init__(
        self,
        kernel: Kernel,
        uio: UioDevice,
        device: Served,
        notes: RestartNotes,
        limiter: trio.CapacityLimiter,
    ) -> None:
        self.uio = uio
        self.device = device
        self.ended = trio.Event()
        self.settled = trio.Event()
        self.alone = _always
        self.new = _never
        self._kernel = kernel
        self._notes = notes
        self._limiter = limiter
        self._taking = trio.CancelScope()
        self._grace: float | None = None
        self._idle = trio.Event()
        self._teller = Sleeper()
        self._waiter = select.poll()
        self._told_size = device.size
        self._file: SharedMemory
        self._handler: Handler

    # -- beginning -------------------------------------------------------------------------

    async def check(self) -> bool:
        """Whether the kernel has finished making the device.  One that it has not is made ready for
        `start`, but not opened.  The disk grows if the kernel wants a larger one; raises UsageError
        if it wants a smaller one."""
        await self._match_size()
        return await self._in_thread(self._check)

    def _check(self) -> bool:
        made = self._kernel.made(self.uio)
        if not made:  # nobody else has it, and a LUN may come as soon as it is made
            self._set_up()
        return made

    async def start(self) -> None:
        """Open the device and take over its ring.  Raises PloopError; nothing stays open then."""
        await self._match_size()
        self._file = await disownable(
            self._prepare,
            deadline=CONFIGFS_SECONDS,
            what=f"opening the kernel's device {self.uio}",
            undo=lambda file: file.close(),
            limiter=self._limiter,
        )
        try:
            await self._take_over()
        except BaseException:
            self._file.close()
            raise
        self._waiter.register(self._file.fileno(), select.POLLIN)
        self.device.bind()

    def _prepare(self) -> SharedMemory:
        """In a thread: open, set what a parking handler needs."""
        file = self._kernel.open(self.uio)
        self._set_up()
        return file

    async def _match_size(self) -> None:
        kernel, uio, device = self._kernel, self.uio, self.device
        text = await self._in_thread(partial(kernel.attribute, uio, "dev_size"))
        self._told_size = int(text) if text is not None and text.isdecimal() else device.size
        if self._told_size > device.size:
            await device.grow(self._told_size)
        if self._told_size != device.size:
            raise UsageError(
                f"the disk {device.name} has {device.size} bytes",
                path=kernel.directory(uio),
                field="dev_size",
                value=self._told_size,
                hint=f"create the backstore with size={device.size}, or a larger one to grow it",
            )

    async def _follow_size(self) -> None:
        """The disk may grow for other reasons than the kernel's: say so there."""
        while True:
            if self.device.size != self._told_size:
                await self._tell_size()
            else:
                await self.device.wait_resized()

    async def _tell_size(self) -> None:
        """The kernel sends the event of a change then, which is none any more."""
        kernel, uio = self._kernel, self.uio
        self._told_size = size = self.device.size

        def tell() -> None:
            if kernel.attribute(uio, "dev_size") != str(size):
                kernel.set_attribute(uio, "dev_size", size)

        with contextlib.suppress(PloopError):
            await self._in_thread(tell)

    async def resize(self, size: int) -> None:
        """Somebody gives the backstore another size.  Raises PloopError when the disk cannot have
        it; the kernel, which may have believed it, is told then what size there is."""
        self._told_size = size
        device = self.device
        try:
            if size < device.size:
                raise UsageError(
                    f"the disk {device.name} has {device.size} bytes, and can only become larger",
                    field="dev_size",
                    value=size,
                )
            await device.grow(size)
        except PloopError:
            await self._tell_size()
            raise

    def _set_up(self) -> None:
        kernel, uio = self._kernel, self.uio
        # The kernel must not give up a command that is parked: it would still be executed.  Not
        # possible while a LUN exports the device, which is so after a restart, when it was done.
        new = kernel.attribute(uio, "cmd_time_out") != "0"
        if new:
            self._notes.forget(uio)
        if new and not kernel.set_attribute(uio, "cmd_time_out", 0):
            log.warning("event=tcmu-timeout device=%s note='cmd_time_out stays'", uio)
        kernel.set_attribute(uio, "tmr_notification", 1)

    async def _take_over(self) -> None:
        left = await self._in_thread(partial(self._notes.take, self.uio))
        ring = self._open_ring()
        untouched = ring is not None and ring.tail == 0 and self.new()
        reset = ring is None or (ring.waiting and ring.tail != left and not untouched)
        if reset:
            # Whoever served it ended without a note: the kernel answers what is in the ring BUSY,
            # and nothing new comes in meanwhile.  The old process is gone, or we could not open.
            if ring is not None:
                ring.close()
            log.warning("event=tcmu-reset device=%s", self.uio)
            await self._in_thread(self._reset)
            ring = self._open_ring()
            if ring is None:
                raise PloopError(
                    "the kernel's ring is not usable", field="device", value=str(self.uio)
                )
        assert ring is not None
        # Always: whoever was here before may have died between blocking and this.
        try:
            await self._in_thread(partial(self._kernel.action, self.uio, "block_dev", 0))
        except BaseException:
            ring.close()
            raise
        self._handler = Handler(ring, self.device.unit, self.device.name, self._teller.wake)

    def _open_ring(self) -> Ring | None:
        """The ring, or None if what is there makes no sense."""
        view = self._file.view()
        try:
            return Ring(view)
        except RingError as error:
            view.release()
            log.warning("event=tcmu-ring device=%s error=%r", self.uio, str(error))
            return None

    def _reset(self) -> None:
        self._kernel.action(self.uio, "block_dev", 1)
        if not self._kernel.action(self.uio, "reset_ring", 1):
            raise PloopError(
                "the kernel does not reset the ring", field="device", value=str(self.uio)
            )

    async def _in_thread(self, blocking: Callable[[], T]) -> T:
        return await disownable(
            blocking,
            deadline=CONFIGFS_SECONDS,
            what=f"the kernel's configuration of {self.uio}",
            undo=lambda _: None,
            limiter=self._limiter,
        )

    async def agree_on_write_cache(self) -> None:
        """Let the kernel's `emulate_write_cache`, which is 0 in the beginning, say what the disk
        does; of a device that was served before, or is being restored, it says what was wanted.
        """
        kernel, uio, modes = self._kernel, self.uio, self.device.unit.modes
        with trio.move_on_after(RESTORE_SECONDS):  # let a restore write what it has
            await self.ended.wait()
            return

        def agree() -> bool | None:
            wanted: bool | None = None
            value = kernel.attribute(uio, "emulate_write_cache")
            if value is not None and value != str(int(modes.write_cache)):
                if self._notes.agreed(uio):
                    wanted = value == "1"
                else:
                    kernel.set_attribute(uio, "emulate_write_cache", int(modes.write_cache))
            self._notes.agree(uio)
            return wanted

        with contextlib.suppress(PloopError):
            wanted = await self._in_thread(agree)
            if wanted is not None and not self.ended.is_set():
                modes.write_cache = wanted
                self.device.unit.modes_changed(None)

    # -- serving ---------------------------------------------------------------------------

    async def serve(self) -> None:
        """Serve until removed or stopped; lets go of everything.  Raises PloopError for a ring that
        cannot be understood any more."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell)
                nursery.start_soon(self._follow_size)
                with self._taking:
                    await self._take()
                if self._grace is not None and self._handler.broken is None:
                    with trio.CancelScope(shield=True):
                        await self._drain(self._grace)
                nursery.cancel_scope.cancel()
        finally:
            self._close()
        broken = self._handler.broken
        if broken is not None:
            raise PloopError(
                f"the kernel's ring is broken: {broken}", field="device", value=str(self.uio)
            ) from broken

    async def _take(self) -> None:
        handler, file, poll = self._handler, self._file, AdaptivePoll()
        ring = handler.ring
        file.tell()  # of answers whose giver died before it could
        turn = 0
        while True:
            if handler.process():
                file.tell()
            if handler.broken is not None:
                return
            turn += handler.taken or 1
            # The initiator often has its next command there when `tell` comes back.
            if ring.waiting and not ring.outstanding and turn < TURN:
                continue
            if not file.acknowledge():
                return  # the device was removed
            # What has come before is seen now, what comes later wakes.
            if not ring.waiting and not self._more_comes(poll):
                turn = 0
                await trio.lowlevel.wait_readable(file.fileno())
            elif turn >= TURN or handler.busy:
                turn = 0
                await trio.lowlevel.checkpoint()

    def _more_comes(self, poll: AdaptivePoll) -> bool:
        """Sleep without the loop for a moment, until a command comes: the loop's sleep costs more.

        Only where nobody else can be waiting for the loop: one device, nothing in execution; and
        where they come one by one: of many, more come together while the loop sleeps.
        """
        handler = self._handler
        if handler.taken > 1 or handler.busy or not self.alone() or not poll.wanted():
            return False
        found = bool(self._waiter.poll(PATIENCE))
        poll.ended(found)
        return found

    async def _tell(self) -> None:
        """Tell the kernel of answers that were given outside of `_take`, of many at once."""
        handler = self._handler
        while True:
            await self._teller.sleep()
            self._file.tell()
            if handler.broken is not None:
                self._taking.cancel()
            if not handler.busy:
                self._idle.set()

    def stop(self, grace: float | None) -> None:
        """Take nothing more.  With `grace`, commands in execution have that many seconds to end and
        the rest is given back for the initiators to repeat; None: the kernel removes the device,
        and has taken care of its commands."""
        self._grace = grace
        self._taking.cancel()

    async def _drain(self, grace: float) -> None:
        """Answer everything that was taken, so that the next daemon can go on."""
        handler = self._handler
        if not self.device.parking:
            await self._wait_idle(grace)
        if handler.busy:
            handler.give_back()
            self._file.tell()
            await self._wait_idle(GIVE_BACK_SECONDS)
        if handler.ring.drained:
            self._notes.leave(self.uio, handler.ring.tail)
        else:
            log.warning("event=tcmu-not-drained device=%s commands=%d", self.uio, handler.busy)

    async def _wait_idle(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            while self._handler.busy:
                self._idle = trio.Event()
                await self._idle.wait()

    def _close(self) -> None:
        self._file.tell()
        self._handler.close(self.settled.set)  # first: what is parked is dropped, not failed
        self.device.unbind()
        trio.lowlevel.notify_closing(self._file.fileno())
        self._file.close()
        self.ended.set()


def _always() -> bool:
    return True


def _never() -> bool:
    return False
