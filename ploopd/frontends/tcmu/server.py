"""The front end: finds the kernel's devices of subtype `ploop`, serves each by one of ours.

Devices are found in sysfs, at the start and whenever netlink says that something has changed;
without netlink every second.  Netlink replies are sent only for devices that wait for them: the
kernel asks for replies once any program has promised them, tcmu-runner for example, and takes the
first one that comes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import random
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from ploopd.disownable import disownable
from ploopd.errors import BusyError, ExitCode, NotFoundError, PloopError, StorageError, UsageError
from ploopd.frontends.tcmu import netlink
from ploopd.frontends.tcmu.attachment import CONFIGFS_SECONDS, Attachment, Served
from ploopd.frontends.tcmu.names import Reference, parse_config, parse_kernel_name
from ploopd.frontends.tcmu.refusal import Refusal
from ploopd.frontends.tcmu.restart import RestartNotes
from ploopd.frontends.tcmu.uio import Kernel, UioDevice
from ploopd.frontends.tcmu.waiver import Waiver

SCAN_SECONDS = 1.0
"""Between looks into sysfs without netlink; with it ten times as long."""

SUBSCRIBE_SECONDS = 5.0
"""Until netlink is tried again; it comes with the kernel's module."""

RETRY_FIRST, RETRY_MOST = 0.5, 30.0
"""Seconds until a device that could not be served is tried again, growing."""

MADE_FIRST, MADE_MOST = 0.001, 0.2
"""Seconds between looks whether the kernel has finished making a device, growing."""

UNTOLD_SECONDS = 2.0
"""For a device to be made that netlink has not told us of."""

TAKEN_BACK = (
    "another program, tcmu-runner for example, has told the kernel that it does not know it; "
    "create it again, to be sure with control=nl_reply_supported=-1 or by ploopctl lio export"
)

KERNEL = (0, 0)
"""Netlink's address of the kernel."""

log = logging.getLogger(__name__)


class Provider(Protocol):
    """Where devices come from (the daemon)."""

    async def acquire(self, reference: Reference) -> Served:
        """The device that `reference` names; an image that is not served yet is opened.

        Raises PloopError."""
        ...

    async def release(self, device: Served) -> None:
        """The front end does not use it any more."""
        ...

    async def change_medium(self, device: Served, reference: Reference) -> None:
        """Serve another image under the same device.  Raises PloopError."""
        ...


class TcmuServer:
    """Serves the kernel's devices; `attached` are those that are being served, by backstore name.

    `state`: the directory for notes from one daemon to the next.  `another`: there is another
    handler of TCMU devices, tcmu-runner; found out here when the kernel says that somebody was
    faster, and by whoever knows earlier.
    """

    def __init__(self, provider: Provider, state: Path, *, kernel: Kernel | None = None) -> None:
        self.attached: dict[str, Attachment] = {}
        self._provider = provider
        self._kernel = kernel or Kernel()
        self._notes = RestartNotes(state, self._kernel.boot_id())
        self._limiter = trio.CapacityLimiter(16)
        self.another = False
        self._waiver = Waiver(self._kernel, lambda: self.another)
        self._known: dict[UioDevice, trio.CancelScope] = {}
        self._ended: dict[UioDevice, trio.Event] = {}
        self._started: dict[UioDevice, trio.Event] = {}
        self._failures: dict[UioDevice, PloopError] = {}
        self._waiting: set[UioDevice] = set()
        self._new: set[UioDevice] = set()
        self._told: set[UioDevice] = set()
        self._gone: set[UioDevice] = set()
        self._wake = trio.Event()
        self._changed = trio.Event()
        self._stopping = False
        self._interval = SCAN_SECONDS

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled, after `shutdown`; started when the devices that are there were found."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._listen, nursery)
            nursery.start_soon(self._waiver.serve)
            await self._scan(nursery)
            task_status.started()
            while True:
                with trio.move_on_after(self._interval):
                    await self._wake.wait()
                # Before looking: what comes up while it looks may be too late for this look.
                self._wake = trio.Event()
                await self._scan(nursery)

    def failure(self, backstore: str) -> PloopError | None:
        """Why the backstore called so is not served; None if it is, or is not known (yet)."""
        for uio, failure in self._failures.items():
            if uio.name.backstore == backstore:
                return failure
        return None

    async def wait_attached(self, backstore: str, seconds: float) -> Attachment:
        """The attachment of the backstore called so, which has just been made.

        Raises PloopError when it cannot be served, or is not after `seconds`."""
        self._wake.set()
        with trio.move_on_after(seconds):
            while backstore not in self.attached:
                failure = self.failure(backstore)
                if failure is not None:
                    raise failure
                await self._changed.wait()
            return self.attached[backstore]
        raise PloopError(
            f"the kernel's device was not there after {seconds:g} s",
            field="backstore",
            value=backstore,
            exit_code=ExitCode.TIMEOUT,
        )

    async def shutdown(self, grace: float) -> None:
        """Let go of all devices; see `Attachment.stop`.  Initiators see a pause until the next
        daemon comes."""
        self._stopping = True
        for attachment in tuple(self.attached.values()):
            attachment.stop(grace)
        for uio, scope in tuple(self._known.items()):
            if uio.name.backstore not in self.attached:
                scope.cancel()
        for ended in tuple(self._ended.values()):
            await ended.wait()

    # -- finding ---------------------------------------------------------------------------

    async def _scan(self, nursery: trio.Nursery) -> None:
        try:
            devices = await disownable(
                self._kernel.devices,
                deadline=CONFIGFS_SECONDS,
                what="looking for the kernel's devices",
                undo=lambda _: None,
                limiter=self._limiter,
            )
        except PloopError as error:
            log.warning("event=tcmu-scan error=%r", str(error))
            return
        self._gone &= set(devices)
        for uio in devices:
            if uio not in self._known and uio not in self._gone and not self._stopping:
                self._known[uio] = trio.CancelScope()
                self._ended[uio] = trio.Event()
                self._started[uio] = trio.Event()
                nursery.start_soon(self._keep, uio, nursery)
        for uio, scope in tuple(self._known.items()):
            if uio not in devices and uio.name.backstore not in self.attached:
                scope.cancel()

    async def _keep(self, uio: UioDevice, nursery: trio.Nursery) -> None:
        """Serve one device until it goes away; try again when that fails, and meanwhile answer
        what comes."""
        pause = RETRY_FIRST
        try:
            with self._known[uio]:
                await self._learn(uio)
                while not self._stopping:
                    try:
                        await self._attach(uio, nursery)
                        return
                    except PloopError as error:
                        self._failed(uio, error)
                        refusal = Refusal(self._kernel, uio, error, self._notes, self._limiter)
                    await refusal.answer(pause * random.uniform(0.8, 1.2))
                    pause = min(RETRY_MOST, pause * 2)
        finally:
            del self._known[uio]
            self._started.pop(uio).set()
            self._failures.pop(uio, None)
            self._waiting.discard(uio)
            self._ended.pop(uio).set()
            self._announce()
            self._wake.set()

    async def _attach(self, uio: UioDevice, nursery: trio.Nursery) -> None:
        reference = parse_config(uio.name.config)
        device = await self._provider.acquire(reference)
        try:
            attachment = Attachment(self._kernel, uio, device, self._notes, self._limiter)
            attachment.alone = lambda: len(self.attached) == 1
            attachment.new = lambda: uio in self._new
            if not await attachment.check():
                self._new.add(uio)
                self._started[uio].set()  # the kernel may be waiting for our yes
                if not await self._until_made(uio):
                    return
            await attachment.start()
            self._new.discard(uio)
            self.attached[uio.name.backstore] = attachment
            self._failures.pop(uio, None)
            self._started[uio].set()
            self._announce()
            log.info("event=tcmu-attached uio=%s device=%s", uio, device.name)
            nursery.start_soon(attachment.agree_on_write_cache)
            try:
                await attachment.serve()
            except PloopError:
                # What of it is still being executed must not happen after the kernel was told
                # to repeat it.
                await attachment.settled.wait()
                raise
            finally:
                if self.attached.get(uio.name.backstore) is attachment:
                    del self.attached[uio.name.backstore]
                log.info("event=tcmu-detached uio=%s device=%s", uio, device.name)
        finally:
            with trio.CancelScope(shield=True):
                await self._provider.release(device)

    async def _until_made(self, uio: UioDevice) -> bool:
        """Until the kernel has finished making the device; False if it takes it back instead.

        That is not told: netlink has only said that there is a new one.  If it has not said so to
        us, because we were not there, it may be waiting for the reply of a handler that is not
        there any more."""
        pause, waited, forgotten = MADE_FIRST, 0.0, False
        while await self._look(self._kernel.present, uio):
            if await self._look(self._kernel.made, uio):
                return True
            await trio.sleep(pause)
            waited += pause
            pause = min(MADE_MOST, pause * 2)
            if waited > UNTOLD_SECONDS and not (forgotten or self.another or uio in self._told):
                forgotten = True
                done = await self._look(lambda _: self._kernel.reset_netlink(), uio)
                log.warning("event=tcmu-netlink-reset uio=%s done=%s", uio, done)
        log.warning("event=tcmu-taken-back uio=%s note=%r", uio, TAKEN_BACK)
        return False

    async def _look(self, question: Callable[[UioDevice], bool], uio: UioDevice) -> bool:
        return await disownable(
            partial(question, uio),
            deadline=CONFIGFS_SECONDS,
            what=f"the configuration of {uio}",
            undo=lambda _: None,
            limiter=self._limiter,
        )

    def _announce(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _failed(self, uio: UioDevice, error: PloopError) -> None:
        before = self._failures.get(uio)
        self._failures[uio] = error
        self._started[uio].set()
        self._announce()
        if before is None or str(before) != str(error):
            log.error("event=tcmu-failed uio=%s error=%r", uio, str(error))

    # -- netlink ---------------------------------------------------------------------------

    async def _listen(
        self,
        nursery: trio.Nursery,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Subscribe to the kernel's events; while there is no such family, go on without them."""
        started = False
        while True:
            try:
                channel, family = await _subscribe()
                break
            except (netlink.NetlinkError, OSError) as error:
                if not started:
                    log.info("event=tcmu-no-netlink reason=%r", str(error))
                    task_status.started()
                    started = True
            await trio.sleep(SUBSCRIBE_SECONDS)
        with channel:
            self._interval = 10 * SCAN_SECONDS
            if not started:
                task_status.started()
            self._wake.set()  # what came before was not told
            while True:
                try:
                    datagram, sender = await channel.recvfrom(1 << 16)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:  # events were lost: look ourselves
                        raise
                    self._gone.clear()
                    self._wake.set()
                    continue
                if sender[0] != KERNEL[0]:
                    continue
                try:
                    self._note_another(netlink.overruled(datagram))
                    events = list(netlink.parse_events(datagram, family))
                except netlink.NetlinkError as error:
                    log.warning("event=tcmu-netlink error=%r", str(error))
                    continue
                for event in events:
                    nursery.start_soon(self._happened, event, channel, family)

    async def _happened(
        self, event: netlink.Event, channel: trio.socket.SocketType, family: netlink.Family
    ) -> None:
        name = parse_kernel_name(event.name)
        if name is None or name.subtype != "ploop":
            return
        uio = UioDevice(minor=event.minor, name=name)
        if event.kind is netlink.EventKind.ADDED:
            self._new.add(uio)
            self._told.add(uio)
        elif event.kind is netlink.EventKind.REMOVED:
            self._new.discard(uio)
            self._told.discard(uio)
        handle: dict[netlink.EventKind, Callable[[UioDevice, netlink.Event], Awaitable[None]]] = {
            netlink.EventKind.ADDED: self._added,
            netlink.EventKind.REMOVED: self._removed,
            netlink.EventKind.RECONFIGURED: self._reconfigured,
        }
        waits = await self._waits_for_reply(uio, event.kind)
        status = 0
        try:
            await handle[event.kind](uio, event)
        except PloopError as error:
            status = -_errno_of(error)
            log.warning("event=tcmu-refused uio=%s error=%r", uio, str(error))
        if event.kind is netlink.EventKind.ADDED and name.configfs in self._waiver.granted:
            self._waiver.granted.discard(name.configfs)
            waits = True  # it may have been granted after the kernel began to wait
        if waits:
            with contextlib.suppress(OSError):
                await channel.sendto(netlink.reply(event, family, status), KERNEL)

    def _note_another(self, overruled: bool) -> None:
        if overruled and not self.another:
            log.warning("event=tcmu-another note='somebody else replies to the kernel, too'")
            self.another = True

    async def _waits_for_reply(self, uio: UioDevice, kind: netlink.EventKind) -> bool:
        """A reply that nobody waits for makes the kernel complain, one that is missing makes it
        wait for ever."""
        if kind is netlink.EventKind.REMOVED:
            return uio in self._waiting  # its directory is locked by the very rmdir that waits

        return await self._learn(uio)

    async def _learn(self, uio: UioDevice) -> bool:
        """Ask the kernel, and remember it for the device's removal."""
        waits = True
        with contextlib.suppress(PloopError):
            waits = await self._look(self._kernel.waits_for_replies, uio)
        if waits:
            self._waiting.add(uio)
        return waits

    async def _added(self, uio: UioDevice, event: netlink.Event) -> None:
        self._gone.discard(uio)
        await self._until_started(uio)
        failure = self._failures.get(uio)
        if failure is not None:
            raise failure

    async def _until_started(self, uio: UioDevice) -> None:
        """Until it is served, or could not be."""
        self._wake.set()
        for _ in range(50):  # until the scan has found it
            started = self._started.get(uio)
            if started is not None:
                await started.wait()
                return
            await trio.sleep(0.02)

    async def _removed(self, uio: UioDevice, event: netlink.Event) -> None:
        self._gone.add(uio)  # sysfs shows it for a while, and nobody must open it again
        ended = self._ended.get(uio)
        if ended is None:
            return
        attachment = self.attached.get(uio.name.backstore)
        if attachment is not None and attachment.uio == uio:
            attachment.stop(None)
        else:
            self._known[uio].cancel()
        await ended.wait()

    async def _reconfigured(self, uio: UioDevice, event: netlink.Event) -> None:
        """What is written again unchanged succeeds: `targetctl restore` writes everything."""
        await self._until_started(uio)  # a restore writes as soon as it has been made
        while (
            uio in self._known
            and uio not in self._failures
            and uio.name.backstore not in self.attached
        ):
            await self._changed.wait()
        attachment = self.attached.get(uio.name.backstore)
        if attachment is None:
            raise self._failures.get(uio) or NotFoundError(
                "is not served", field="device", value=str(uio)
            )
        device = attachment.device
        if event.size is not None and event.size != device.size:
            await attachment.resize(event.size)
        if event.write_cache is not None and event.write_cache != device.unit.modes.write_cache:
            device.unit.modes.write_cache = event.write_cache
            device.unit.modes_changed(None)
        if event.config is not None:
            config = event.config.removeprefix("ploop/")
            if config != uio.name.config:
                await self._provider.change_medium(device, parse_config(config))


def _errno_of(error: PloopError) -> int:
    """What the configfs operation fails with; the log has the reason."""
    if isinstance(error, NotFoundError):
        return errno.ENOENT
    if isinstance(error, BusyError):
        return errno.EBUSY
    if isinstance(error, StorageError):
        return error.errno
    return errno.EINVAL if isinstance(error, UsageError) else errno.EIO


async def _subscribe() -> tuple[trio.socket.SocketType, netlink.Family]:
    """A socket that gets TCM-USER's events.  Raises NetlinkError without the family, OSError."""
    raw = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, netlink.NETLINK_GENERIC
    )
    try:
        raw.bind((0, 0))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        channel = trio.socket.from_stdlib_socket(raw)
        await channel.sendto(netlink.family_request(), KERNEL)
        with trio.fail_after(CONFIGFS_SECONDS):
            family = netlink.parse_family(await channel.recv(1 << 16))
        raw.setsockopt(netlink.SOL_NETLINK, netlink.NETLINK_ADD_MEMBERSHIP, family.group)
    except BaseException:
        raw.close()
        raise
    return channel, family
