"""One device of the kernel, served by one of ours: open, take over the ring, serve, let go."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

import trio

from ploopd.disownable import disownable
from ploopd.errors import PloopError, UsageError
from ploopd.frontends.tcmu.handler import Handler
from ploopd.frontends.tcmu.restart import RestartNotes
from ploopd.frontends.tcmu.ring import Ring, RingError
from ploopd.frontends.tcmu.uio import Kernel, SharedMemory, UioDevice
from ploopd.scsi.logical_unit import LogicalUnit

CONFIGFS_SECONDS = 10.0
"""For one access to configfs; the kernel may never come back from one."""

GIVE_BACK_SECONDS = 2.0
"""For commands in execution to end after the others have been given back."""

log = logging.getLogger(__name__)

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


class Attachment:
    """`uio` served by `device`.

    `start` raises a PloopError when that cannot be; then `serve` runs until the kernel removes the
    device, `stop` or cancellation.  `ended` is set when nothing of it is open any more;
    `waits_for_replies`: the kernel wants netlink events of this device to be answered.
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
        self.waits_for_replies = True
        self._kernel = kernel
        self._notes = notes
        self._limiter = limiter
        self._taking = trio.CancelScope()
        self._grace: float | None = None
        self._idle = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        self._file: SharedMemory
        self._handler: Handler

    # -- beginning -------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the device and take over its ring.  Raises PloopError; nothing stays open then."""
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
        self.device.bind()

    def _prepare(self) -> SharedMemory:
        """In a thread: check the size, set what a parking handler needs, open."""
        kernel, uio = self._kernel, self.uio
        told = kernel.attribute(uio, "dev_size")
        if told is not None and told.isdecimal() and int(told) != self.device.size:
            raise UsageError(
                f"the disk {self.device.name} has {self.device.size} bytes",
                path=kernel.directory(uio),
                field="dev_size",
                value=int(told),
                hint=f"create the backstore with size={self.device.size}",
            )
        self.waits_for_replies = kernel.attribute(uio, "nl_reply_supported") == "1"
        file = kernel.open(uio)
        # The kernel must not give up a command that is parked: it would still be executed.  Not
        # possible while a LUN exports the device, which is so after a restart, when it was done.
        if kernel.attribute(uio, "cmd_time_out") != "0" and not kernel.set_attribute(
            uio, "cmd_time_out", 0
        ):
            log.warning("event=tcmu-timeout device=%s note='cmd_time_out stays'", uio)
        kernel.set_attribute(uio, "tmr_notification", 1)
        return file

    async def _take_over(self) -> None:
        left = await self._in_thread(partial(self._notes.take, self.uio))
        ring = self._open_ring()
        reset = ring is None or (ring.waiting and ring.tail != left)
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
        self._handler = Handler(ring, self.device.unit, self.device.name, self._answered)
        if reset:
            await self._in_thread(partial(self._kernel.action, self.uio, "block_dev", 0))

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

    # -- serving ---------------------------------------------------------------------------

    async def serve(self) -> None:
        """Serve until removed or stopped; lets go of everything.  Raises PloopError for a ring that
        cannot be understood any more."""
        try:
            with self._taking:
                await self._take()
            if self._grace is not None:
                with trio.CancelScope(shield=True):
                    await self._drain(self._grace)
        except RingError as error:
            raise PloopError(
                f"the kernel's ring is broken: {error}", field="device", value=str(self.uio)
            ) from error
        finally:
            self._close()

    async def _take(self) -> None:
        handler, file = self._handler, self._file
        while True:
            if handler.process():
                file.tell()
            await trio.lowlevel.wait_readable(file.fileno())
            if not file.acknowledge():
                return  # the device was removed

    def _answered(self) -> None:
        self._token.run_sync_soon(self._tell, idempotent=True)

    def _tell(self) -> None:
        if not self.ended.is_set():
            self._file.tell()
            if not self._handler.busy:
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
        self.ended.set()
        self._file.tell()
        self.device.unbind()
        self._handler.close()
        trio.lowlevel.notify_closing(self._file.fileno())
        self._file.close()
