"""The composition root: a `ServeConfig` in, a running daemon out.

Knows every part and is known by none.  A start claims the control socket first, because that is
quick to refuse, then the portals, then opens the images one after the other, then serves; an end
goes the other way round, each step with a deadline, so that a storage that hangs cannot keep the
process alive.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from ploopd import __version__
from ploopd.config import ServeConfig
from ploopd.config_text import config_text
from ploopd.control import messages
from ploopd.control.automation import Automation
from ploopd.control.context import ControlContext
from ploopd.control.event_log import EventLog
from ploopd.control.handlers import all_operations
from ploopd.control.interface import SERVICE_INTERFACE
from ploopd.control.listener import ControlSocket, claim_control_socket
from ploopd.control.server import ControlServer
from ploopd.device_settings import device_luns, device_names, device_options, recovery_policy
from ploopd.device_table import DeviceTable
from ploopd.devices import Device, Environment
from ploopd.errors import ExitCode, PloopError, UnsupportedError
from ploopd.fileio.engine import IoEngine, make_engine
from ploopd.frontends.iscsi import fast_path
from ploopd.frontends.iscsi.config import format_address
from ploopd.frontends.iscsi.server import IscsiServer
from ploopd.gate.events import Event, EventKind
from ploopd.gate.state import GateState
from ploopd.kernel_front_end import KernelFrontEnd
from ploopd.lio_exports import LioExports
from ploopd.luns import Luns
from ploopd.reload import ConfigSource, Reloader, ReloadReport
from ploopd.scsi.target import Target
from ploopd.systemd import Notifier
from scst_shim import StandbyCheck

if TYPE_CHECKING:
    from ploopd.frontends.fuse.server import FuseView

LOGOUT_GRACE = 3.0
"""Seconds that initiators have to log out after they were asked to."""

CLOSE_SECONDS = 15.0
"""Seconds for flushing and closing all images; what hangs longer is left as it is."""

_STATE_CHANGES = frozenset(
    {
        EventKind.DEVICE_ADDED,
        EventKind.DEVICE_REMOVED,
        EventKind.STANDBY_ENTERED,
        EventKind.STANDBY_LEFT,
        EventKind.RECOVERED,
    }
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """One LUN that is ready: `url` is `iscsi://HOST:PORT/IQN/LUN`, `size` bytes."""

    device: str
    url: str
    image: str
    size: int


Ready = Callable[[list[Export], Path], None]
"""Called with the LUNs and the path of the control socket."""


async def serve_images(
    config: ServeConfig,
    ready: Ready,
    notifier: Notifier | None = None,
    source: ConfigSource | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; calls `ready` once, when every LUN can be used.

    `notifier` tells the service manager.  With a `source` SIGHUP reads the configuration again.

    Raises `PloopError` when it cannot start (nothing is served then) and when an image could not be
    closed cleanly at the end.
    """
    config.check()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if source is not None or signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        # Without files the terminal was closed.  Under nohup the signal is ignored, and stays so.
        numbers.append(signal.SIGHUP)
    with trio.open_signal_receiver(*numbers) as signals:
        control = claim_control_socket(config.control)
        try:
            async with _running_engine(config) as engine:
                daemon = _Daemon(config, engine, control, notifier or Notifier({}), source)
                await daemon.run(signals, ready)
        finally:
            control.close()
    log.info("event=stopped")


def request_path() -> str:
    """What runs it: "compiled" or "interpreted" (docs/decisions/compiled.md)."""
    return "interpreted" if (fast_path.__file__ or "").endswith(".py") else "compiled"


@asynccontextmanager
async def _running_engine(config: ServeConfig) -> AsyncIterator[IoEngine]:
    """The I/O engine with its task; the last thing to end, because closing needs it."""
    engine = make_engine(config.engine)
    log.info("event=io-engine kind=%s request_path=%s", engine.kind, request_path())
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            try:
                yield engine
            finally:
                nursery.cancel_scope.cancel()
    finally:
        engine.close()


def make_view(devices: DeviceTable, directory: Path) -> FuseView:
    """The FUSE view.  Raises `UnsupportedError` where pyfuse3 is not installed."""
    try:
        from ploopd.frontends.fuse.server import FuseView
    except ImportError as error:
        raise UnsupportedError(
            f"a view needs pyfuse3, which cannot be imported: {error}",
            field="sysfs",
            value=str(directory),
            hint="pip install 'ploopd[fuse]' (it needs libfuse3: apt-get install libfuse3-dev)",
        ) from error
    return FuseView(devices, directory)


class _Daemon:
    """The parts of one run."""

    def __init__(
        self,
        config: ServeConfig,
        engine: IoEngine,
        control: ControlSocket,
        notifier: Notifier,
        source: ConfigSource | None,
    ) -> None:
        self.config = config
        self.control = control
        self.notifier = notifier
        self.check = StandbyCheck()
        self.env = Environment(
            engine=engine, buffers=engine.buffers, check=self.check, clock=trio.current_time
        )
        self.devices = DeviceTable(self.env)
        self.target = Target(config.iscsi.iqn)
        self.iscsi = IscsiServer(
            config.iscsi, {config.iscsi.iqn: self.target}, clock=trio.current_time, storage=engine
        )
        self.portals: list[tuple[str, int]] = []
        self.fused = False
        self.view = None if config.sysfs is None else make_view(self.devices, config.sysfs)
        self.automation = Automation(control.path)
        self.kernel = self._kernel_front_end() if config.lio else None
        self.exports = None if self.kernel is None else LioExports(self.devices, self.kernel)
        self.luns = Luns(self.devices, self.target, self.automation, self._users)
        self.reloadable = source is not None
        self.reloader = Reloader(
            config,
            source,
            luns=self.luns,
            table=self.devices,
            automation=self.automation,
            iscsi=self.iscsi,
            kernel=None if self.kernel is None else self.kernel.devices,
        )
        self.hung_up = trio.Event()
        self.control_scope = trio.CancelScope()
        self.reload_scope = trio.CancelScope()
        self.automation_scope = trio.CancelScope()
        self.asking = trio.CancelScope()
        self.stopping = trio.CancelScope(shield=True)
        self.started = trio.current_time()
        self.event_log = EventLog(self.env.events)
        self.env.events.subscribe(self._state_changed)

    def _state_changed(self, event: Event) -> None:
        if event.kind in _STATE_CHANGES:
            self.notifier.status(self._status())

    async def run(self, signals: AsyncIterator[int], ready: Ready) -> None:
        """Start, wait for a signal, stop.  A second signal ends the sessions without waiting for
        the initiators, a third one does not wait for the storage either."""
        async with trio.open_nursery() as nursery:
            stop = trio.Event()
            nursery.start_soon(self._watch_signals, signals, stop)
            nursery.start_soon(self.notifier.feed)
            await nursery.start(self.devices.run)
            problems: list[PloopError] = []
            try:
                if await self._start(nursery, stop):
                    ready(self._exports(), self.control.path)
                    self.notifier.ready(self._status())
                    nursery.start_soon(self._reload_on_signal)
                    await stop.wait()
            finally:
                with self.stopping:
                    problems = await self._stop(stop)
                if self.stopping.cancelled_caught:
                    problems = [PloopError("ended by a signal before the images were closed")]
            nursery.cancel_scope.cancel()
        if problems:
            raise problems[0]

    async def _watch_signals(self, signals: AsyncIterator[int], stop: trio.Event) -> None:
        async for number in signals:
            log.info("event=signal name=%s", signal.Signals(number).name)
            if number == signal.SIGHUP and self.reloadable:
                self.hung_up.set()
                continue
            if self.asking.cancel_called:
                self.stopping.cancel()
            elif stop.is_set():
                self.asking.cancel()
            stop.set()

    async def _start(self, nursery: trio.Nursery, stop: trio.Event) -> bool:
        """Bring everything up; False when a signal came first."""
        finished = False
        async with trio.open_nursery() as starting:

            async def give_up() -> None:
                await stop.wait()
                starting.cancel_scope.cancel()

            starting.start_soon(give_up)
            await self.iscsi.bind()  # first: to be refused must not change an image
            if self.view is not None:
                await self.view.check()
            await self._open_devices()
            if self.view is not None:
                await nursery.start(self.view.serve)
            await nursery.start(self._recover)
            self.portals = await nursery.start(self.iscsi.serve)
            if self.kernel is not None:
                await nursery.start(self.kernel.run)
            await nursery.start(self._serve_control)
            finished = True
            starting.cancel_scope.cancel()
        return finished

    def _kernel_front_end(self) -> KernelFrontEnd:
        options = device_options(self.config.backstores)
        policy = recovery_policy(self.config.backstores)
        return KernelFrontEnd(self.devices, options, self.automation, policy)

    async def _serve_control(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with self.control_scope:
            server = self._control_server()
            await server.serve(self.control.socket, task_status=task_status)

    async def _recover(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with self.automation_scope:
            await self.automation.run(task_status=task_status)

    async def _open_devices(self) -> None:
        self.check.enable()  # the front ends begin: whatever they do, a device needs its EN as well
        self.fused = True
        configs = self.config.devices
        names, numbers = device_names(configs), device_luns(configs)
        for name, number, config in zip(names, numbers, configs, strict=True):
            device = await self.luns.open(name, config)
            self.luns.offer(number, device, config)

    def _users(self, device: Device) -> str | None:
        """What uses the device beside the embedded target."""
        if self.kernel is not None and (count := self.kernel.devices.users(device)):
            return f"backstores of the kernel's target use it: {count}"
        if self.view is not None and (count := self.view.users(device)):
            return f"its file in the view is open {count} times"
        return None

    async def _reload(self, force: bool) -> ReloadReport:
        """See `Reloader.reload`."""
        self.notifier.reloading()
        try:
            return await self.reloader.reload(force=force)
        finally:
            if not self.reload_scope.cancel_called:
                self.notifier.ready(self._status())

    async def _reload_on_signal(self) -> None:
        with self.reload_scope:
            while True:
                await self.hung_up.wait()
                self.hung_up = trio.Event()
                with suppress(PloopError):  # the log says why
                    await self._reload(force=False)

    def _control_server(self) -> ControlServer:
        if self.control.instead_of is not None:
            log.warning(
                "event=control-path path=%s reason=%r",
                self.control.path,
                f"another ploopd holds {self.control.instead_of}",
            )
        context = ControlContext(
            devices=self.devices,
            urls=self._urls,
            iqn=self.target.name,
            portals=[format_address(host, port) for host, port in self.portals],
            version=__version__,
            started=self.started,
            event_log=self.event_log,
            automation=self.automation,
            lio=self.exports,
            config_text=self._config_text,
            reload=self._reload,
        )
        info = messages.ServiceInfo(
            vendor="ploopd",
            product="ploopd",
            version=__version__,
            url="",
            interfaces=[SERVICE_INTERFACE, messages.INTERFACE],
        )
        return ControlServer(all_operations(context), info)

    def _config_text(self) -> str:
        devices = [(device.name, device.image) for device in self.devices]
        return config_text(self.reloader.config, devices, listens=bool(self.portals))

    def _urls(self, name: str) -> list[str]:
        """Where initiators find the device called `name`."""
        luns = self.luns.numbers_of(self.devices.get(name))
        return [
            f"iscsi://{format_address(host, port)}/{self.target.name}/{lun}"
            for host, port in self.portals
            for lun in luns
        ]

    def _status(self) -> str:
        """One line for `systemctl status`."""
        waiting = [one.name for one in self.devices if one.gate.state is not GateState.ACTIVE]
        text = f"serving {len(self.devices)} devices"
        return f"{text}; in standby: {', '.join(waiting)}" if waiting else text

    def _exports(self) -> list[Export]:
        return [
            Export(
                device=device.name,
                url=next(iter(self._urls(device.name)), ""),
                image=device.image,
                size=device.size,
            )
            for device in self.devices
        ]

    async def _stop(self, stop: trio.Event) -> list[PloopError]:
        """Log the initiators out, close the images; what could not be done cleanly."""
        stop.set()
        self.notifier.stopping()
        # A replacement that is under way ends here, in one piece or in standby.
        self.control_scope.cancel()
        self.reload_scope.cancel()
        self.automation_scope.cancel()
        with trio.move_on_after(CLOSE_SECONDS):
            await self.reloader.idle()
        problems = self._unexecuted()  # a session that ends drops what it has parked
        with self.asking, trio.move_on_after(2 * LOGOUT_GRACE):
            await self.iscsi.shutdown(LOGOUT_GRACE)
        if self.asking.cancelled_caught:
            with trio.move_on_after(LOGOUT_GRACE):
                await self.iscsi.shutdown(0.0)
        if self.kernel is not None:
            with trio.move_on_after(2 * LOGOUT_GRACE):
                await self.kernel.shutdown(LOGOUT_GRACE)
        if self.view is not None:
            await self.view.stop()
        self._take_fuses_out()
        with trio.move_on_after(CLOSE_SECONDS) as closing:
            problems += await self.devices.close()
        if closing.cancelled_caught:
            problems.append(PloopError(f"images did not close within {CLOSE_SECONDS:g} s"))
        for problem in problems:
            log.error("event=close-failed error=%r", str(problem))
        return problems

    def _take_fuses_out(self) -> None:
        """The front ends have ended: nobody promises any more to clear standby."""
        self.luns.unbind()
        if self.fused:
            self.check.disable()
            self.fused = False

    def _unexecuted(self) -> list[PloopError]:
        """An error for each device that stops in standby with requests that wait for it."""
        return [
            PloopError(
                f"stopped in {device.gate.state.value} with requests that were not executed",
                path=device.image,
                field="requests",
                value=device.gate.parked_count,
                exit_code=ExitCode.STANDBY,
            )
            for device in self.devices
            if device.gate.state is not GateState.ACTIVE and device.gate.parked_count
        ]
