"""A device: volume, gate and logical unit put together.

A device keeps its gate, its unit and its identity for as long as it is served; the volume under the
gate may be exchanged (`ploopd.control.recovery`).
"""

from __future__ import annotations

import errno
import math
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field

import trio

from ploopd.disownable import disownable
from ploopd.errors import ExitCode, PloopError, StorageError
from ploopd.fileio.buffers import BufferPool
from ploopd.fileio.engine import IoEngine
from ploopd.fileio.oslayer import REAL, OsLayer
from ploopd.gate.errnos import standby_errnos
from ploopd.gate.events import Event, EventBus, EventKind
from ploopd.gate.filter import Gate
from ploopd.gate.limits import ParkLimits
from ploopd.scsi.cdb import BLOCK_SHIFT
from ploopd.scsi.logical_unit import LogicalUnit
from ploopd.storage.device import BlockDevice
from ploopd.storage.journaling import DEFAULT_JOURNAL_SIZE, Journaling, JournalMode
from ploopd.storage.opener import NO_SUBSTITUTES, OpenOptions, open_volume
from ploopd.storage.volume import Volume
from scst_shim import QueueFlags, StandbyCheck

CLOSE_DEADLINE = 10.0
"""Seconds that closing a volume may take before it is abandoned."""

OPEN_THREADS = 8
"""Volumes that are opened at once; those that hang, and were given up, do not count."""

Inode = tuple[int, int]
"""Device and inode number of a file."""

Clock = Callable[[], float]
Opener = Callable[[str, Mapping[str, str], Volume | None], Volume]
"""(image, files by GUID instead of those that its descriptor names, volume whose files are still
open or None) → volume; blocking."""

ReplayHook = Callable[[Volume], Awaitable[int]]
"""Brings a replaced volume up to date before it is used; returns the bytes it has written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOptions:
    """How one image is served.

    `standby` False: no front end sets its EN fuse, so that storage errors reach the initiator.
    `extra_standby_errnos`: beside those that its kind of storage has (`gate.errnos`).
    `journal_size`: bytes that may be kept of writes that are acknowledged and not yet flushed.
    """

    open: OpenOptions = field(default_factory=OpenOptions)
    write_cache: bool = True
    physical_block_size: int = 4096
    standby: bool = True
    limits: ParkLimits = field(default_factory=ParkLimits)
    extra_standby_errnos: Collection[int] = ()
    journal: JournalMode = JournalMode.AUTO
    journal_size: int = DEFAULT_JOURNAL_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What all devices of a daemon share.

    `check` is the global fuse; `clock` gives seconds; `layer` are the system calls of every image
    file.
    """

    engine: IoEngine
    buffers: BufferPool
    check: StandbyCheck
    events: EventBus = field(default_factory=EventBus)
    clock: Clock = time.monotonic
    layer: OsLayer = REAL
    open_limiter: trio.CapacityLimiter = field(
        default_factory=lambda: trio.CapacityLimiter(OPEN_THREADS)
    )

    def opener(self, options: OpenOptions) -> Opener:
        """The function that opens a device's volumes."""

        def open_with(image: str, substitutes: Mapping[str, str], inherit: Volume | None) -> Volume:
            return open_volume(
                image,
                options,
                self.engine,
                layer=self.layer,
                substitutes=substitutes,
                inherit=inherit,
            )

        return open_with


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedVolume:
    """A volume and the inode of its top; `substitutes`: see `Device.open_volume`."""

    volume: Volume
    inode: Inode
    substitutes: Mapping[str, str]


def expected_size(found: int, size: int, growing_to: int | None) -> int:
    """What an image of `found` bytes must have: `size`, or that to which it was being grown when
    the storage failed."""
    return found if found == growing_to else size


class Device:
    """One image being served.

    `run` must be running while requests are made.  `volume` is the current volume, closed after a
    replace that failed half-way (`volume_open` False); `substitutes` are files that are served
    instead of those that the descriptor (`has_descriptor`) names, by GUID; `top_inode` are device
    and inode of the current top delta; `replay_hooks` run before a replaced volume is probed.
    `recording` is held by the thread that changes the names of files.  `growing_to`: the size in
    bytes that its image may have although the device has not; `resized` is set when the device has
    another size, and is another event after that.
    """

    def __init__(
        self, name: str, image: str, options: DeviceOptions, env: Environment, opener: Opener
    ) -> None:
        self.name = name
        self.image = image
        self.options = options
        self.env = env
        self.substitutes: Mapping[str, str] = NO_SUBSTITUTES
        self.recording = threading.Lock()
        self.replacing = False
        self.journaling = Journaling(
            options.journal, options.journal_size, self._flush_failed, self._doubt
        )
        self.replay_hooks: list[ReplayHook] = [self.journaling.replay]
        self.flags = QueueFlags(name, env.check)
        self._extra_standby_errnos = options.extra_standby_errnos
        self._opener = opener
        self._nursery: trio.Nursery | None = None
        self._deadlines = trio.Event()
        self.volume: Volume
        self.volume_open = False
        self.growing_to: int | None = None
        self.resized = trio.Event()
        self.top_inode: Inode
        self.has_descriptor = False
        self._abandoned: list[OpenedVolume] = []
        self._late_references: dict[Inode, set[int]] = {}
        self.identity: uuid.UUID
        self.gate: Gate
        self.unit: LogicalUnit

    @classmethod
    async def open(
        cls,
        image: str,
        *,
        name: str,
        env: Environment,
        options: DeviceOptions | None = None,
        opener: Opener | None = None,
    ) -> Device:
        """Open `image` and put a device on it.  Raises what `open_volume` raises."""
        options = options or DeviceOptions()
        device = cls(name, image, options, env, opener or env.opener(options.open))
        opened = await device.open_volume(image, NO_SUBSTITUTES, None)
        device.install(opened)
        device.has_descriptor = opened.volume.layers[0].guid is not None
        volume = opened.volume
        device.identity = volume.identity
        device.gate = Gate(
            device.under_gate(volume),
            name=name,
            fuses=device.flags,
            clock=env.clock,
            on_event=device._publish,
            limits=options.limits,
            standby_errnos=device.standby_errnos(volume),
        )
        device.unit = LogicalUnit(
            device.gate,
            identity=volume.identity,
            serial=volume.identity.hex,
            read_only=volume.read_only,
            write_cache=options.write_cache,
            physical_exponent=(options.physical_block_size >> BLOCK_SHIFT).bit_length() - 1,
            thin=True,
            buffers=env.buffers,
            clock=env.clock,
            defer=trio.lowlevel.current_trio_token().run_sync_soon,
        )
        return device

    @property
    def size(self) -> int:
        """Bytes of the virtual disk."""
        return self.gate.size

    @property
    def opened(self) -> OpenedVolume:
        """The current volume with its inode."""
        return OpenedVolume(volume=self.volume, inode=self.top_inode, substitutes=self.substitutes)

    # -- front ends ------------------------------------------------------------------------

    def bind(self) -> None:
        """The device is added to a front end."""
        if self.options.standby:
            self.gate.bind()

    def unbind(self) -> None:
        """The device is removed from a front end."""
        if self.options.standby:
            self.gate.unbind()

    def announce(self, **details: str | int) -> None:
        """Publish that the device is served from now on."""
        self.gate.report(
            EventKind.DEVICE_ADDED,
            image=self.image,
            size=self.size,
            mode="ro" if self.gate.read_only else "rw",
            **details,
        )

    # -- life ------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the device's tasks; cancel it after `close`."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await nursery.start(self.volume.run)
            nursery.start_soon(self._expire)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                # What a disowned thread opens from now on is let go, not closed by a task.
                self._nursery = None

    async def close(self) -> None:
        """Close the volume; raises StorageError when it could not be closed cleanly.

        A storage that hangs is abandoned after CLOSE_DEADLINE.  After a storage error that nobody
        has recovered from the in-use word stays set.
        """
        if not self.volume_open:
            self._report_lost()
            return
        if self.gate.faulted or self.gate.latched is not None:
            self.volume.doubt()
        with trio.move_on_after(CLOSE_DEADLINE / 2):
            await self.journaling.make_up()
        error = await self.close_volume(self.opened, CLOSE_DEADLINE)
        if error is None:
            self.journaling.closed()
        self._report_lost()
        if error is not None:
            raise error

    def _report_lost(self) -> None:
        """What is in the journal: the storage may not have it, and nobody writes it any more."""
        status = self.journaling.status
        if status is not None and status.requests:
            self.gate.report(EventKind.JOURNAL_LOST, requests=status.requests, bytes=status.data)

    def give_up(self) -> None:
        """Nobody is going to recover the device: what waits for that fails, and a storage that
        hangs is let go."""
        self.flags.clear_standby_en()
        if self.gate.executing_count:
            self.gate.begin_recovery()
            self.gate.disown()
            self.abandon(self.opened)
            self.gate.fail_recovery(PloopError("the device is removed", path=self.image))

    async def _expire(self) -> None:
        """Answer BUSY to requests that have been parked for too long."""
        self.gate.notify_parked(self._deadline_changed)
        while True:
            self._deadlines = trio.Event()
            deadline = self.gate.next_deadline()
            left = math.inf if deadline is None else max(0.0, deadline - self.env.clock())
            with trio.move_on_after(left):
                await self._deadlines.wait()
            self.gate.expire(self.env.clock())

    def _deadline_changed(self) -> None:
        self._deadlines.set()

    # -- volumes, for recovery -------------------------------------------------------------

    async def open_volume(
        self,
        image: str,
        substitutes: Mapping[str, str],
        inherit: Volume | None,
        deadline: float = math.inf,
    ) -> OpenedVolume:
        """Open `image` (with `substitutes`: GUID → file) in a worker thread.

        The thread is disowned after `deadline` seconds (PloopError, exit code TIMEOUT); a volume
        that it still comes up with is closed again.
        """
        # Of all volumes there were, the ones of attempts that failed among them.
        late = {inode: frozenset(hosts) for inode, hosts in self._late_references.items()}

        def blocking() -> OpenedVolume:
            volume = self._opener(image, substitutes, inherit)
            inode = volume.layers[0].inode
            volume.withdraw(late.get(inode, ()))
            return OpenedVolume(volume=volume, inode=inode, substitutes=substitutes)

        return await disownable(
            blocking,
            deadline=deadline,
            what=f"opening {image}",
            undo=self._close_late,
            limiter=self.env.open_limiter,
        )

    async def start_volume(self, volume: Volume) -> None:
        """Run the tasks of a volume that was opened while the device is running."""
        if self._nursery is None:
            raise RuntimeError(f"{self.name} is not running")
        await self._nursery.start(volume.run)

    def install(self, opened: OpenedVolume) -> None:
        """`opened` is the device's volume from now on."""
        self.volume, self.top_inode = opened.volume, opened.inode
        self.substitutes = opened.substitutes
        self.volume_open = True

    def expected_size(self, found: int) -> int:
        """What the size of a volume must be that has `found` bytes."""
        return expected_size(found, self.gate.size, self.growing_to)

    def size_changed(self, previous: int) -> None:
        """The gate has a larger volume now: tell initiators and front ends, before anything is
        executed on it."""
        self.growing_to = None
        self.unit.capacity_changed()
        self.gate.report(EventKind.RESIZED, size=self.size, previous=previous)
        self.resized.set()
        self.resized = trio.Event()

    def under_gate(self, volume: Volume) -> BlockDevice:
        """What the gate is to use of `volume` from now on: it may get a journal around it.

        What the journal held is forgotten if it has been replayed into `volume`.
        """
        return self.journaling.attach(volume)

    def standby_errnos(self, volume: Volume) -> Collection[int]:
        """What puts the device into standby when it is served from `volume`."""
        return standby_errnos(remote=volume.remote, extra=self._extra_standby_errnos)

    def set_extra_standby_errnos(self, errnos: Collection[int]) -> None:
        """An operator's order, at once and for every volume that follows.

        Raises `UsageError` for one that says nothing of the storage.
        """
        self.gate.set_standby_errnos(standby_errnos(remote=self.volume.remote, extra=errnos))
        self._extra_standby_errnos = errnos

    def _publish(self, event: Event) -> None:
        """An event of the gate."""
        if event.kind in (EventKind.STANDBY_LEFT, EventKind.LATCH_CLEARED):
            self.journaling.trust()  # an operator has decided to go on with this storage
        self.env.events.publish(event)

    def _flush_failed(self, error: StorageError) -> None:
        """A flush that only the journal wanted has failed."""
        self.gate.judge(error)

    def _doubt(self) -> StorageError | None:
        """The failure, also of a read, after which a sync that succeeds proves nothing."""
        gate = self.gate
        if gate.latched is not None or not gate.faulted:
            return gate.latched
        return StorageError(errno.EIO, "flush", message=f"the storage has failed: {gate.cause}")

    async def close_volume(self, opened: OpenedVolume, deadline: float) -> PloopError | None:
        """Close a volume, or abandon it after `deadline` seconds; returns what went wrong.

        Never raises: whoever closes a volume that has failed expects that to fail as well.
        """
        volume = opened.volume
        if volume is self.volume:
            self.volume_open = False
        ended = trio.Event()
        problem: list[StorageError] = []

        async def close() -> None:
            try:
                await volume.close()
                self._remember_late(opened)
            except StorageError as error:
                problem.append(error)
                self.abandon(opened)
            ended.set()

        if self._nursery is None:
            with trio.move_on_after(deadline):
                await close()
        else:  # not here: what hangs inside it must not hold the caller
            self._nursery.start_soon(close)
            with trio.move_on_after(deadline):
                await ended.wait()
        if ended.is_set():
            return problem[0] if problem else None
        self.abandon(opened)
        return PloopError(
            f"did not close within {deadline:g} s and was abandoned",
            path=volume.path,
            exit_code=ExitCode.TIMEOUT,
        )

    def abandon(self, opened: OpenedVolume) -> None:
        """Let go of a volume whose storage hangs; never waits."""
        if opened.volume is self.volume:
            self.volume_open = False
        opened.volume.abandon()
        self._abandoned.append(opened)
        self._remember_late(opened)

    def _remember_late(self, opened: OpenedVolume) -> None:
        late = opened.volume.late_references()
        if late:
            self._late_references.setdefault(opened.inode, set()).update(late)

    def _close_late(self, opened: OpenedVolume) -> None:
        """Close a volume that was opened too late."""
        if self._nursery is None:
            opened.volume.abandon()
        else:
            self._nursery.start_soon(self.close_volume, opened, CLOSE_DEADLINE)

    @property
    def may_change_late(self) -> bool:
        """Whether a storage that has failed may still change the top delta behind our backs."""
        return bool(self._late_references.get(self.top_inode))

    def hung_operations(self) -> list[tuple[Inode, int]]:
        """For each abandoned top delta how many operations have not come back from the kernel."""
        self._abandoned = [each for each in self._abandoned if each.volume.in_flight]
        return [(each.inode, each.volume.in_flight) for each in self._abandoned]
