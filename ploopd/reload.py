"""Reading the configuration again while the daemon runs.

First everything that can be wrong: the files, then the images that are new; a mistake changes
nothing.  Then what has changed: settings of devices, devices that are gone, devices that are new.
What cannot change while it is in use stays as it is until the next start, and is named.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Final, TypeVar

import trio

from ploopd.config import DeviceConfig, ServeConfig
from ploopd.config_file import RunConfig
from ploopd.control.automation import Automation
from ploopd.device_settings import (
    device_luns,
    device_names,
    device_options,
    recovery_policy,
)
from ploopd.device_table import DeviceTable
from ploopd.devices import Device
from ploopd.errors import ExitCode, PloopError, UnsupportedError, UsageError
from ploopd.frontends.iscsi.server import IscsiServer
from ploopd.kernel_devices import KernelDevices
from ploopd.logs import set_level
from ploopd.luns import Lun, Luns

_RECOVERY: Final = frozenset(
    field.name
    for field in fields(DeviceConfig)
    if field.name.startswith("recovery") or field.name == "candidates"
)
_AT_RUN_TIME: Final = _RECOVERY | {"park_max", "extra_standby_errnos"}
_ACCESS: Final = {"acl": "iscsi.acl", "chap": "iscsi.chap_files", "insecure": "iscsi.insecure"}
_PLACES: Final = {"control": "daemon.control", "sysfs": "daemon.sysfs", "lio": "lio.serve"}

LOAD_SECONDS = 30.0
"""For the files to be read, and the directories that they name to be looked at."""

OPEN_SECONDS = 300.0
"""For one image to be opened, which may begin with a check."""

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigSource:
    """Where the configuration comes from; `load` raises `PloopError` and runs in a thread.

    `log_level` is what it was at the start.
    """

    load: Callable[[], RunConfig]
    log_level: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Something that was not done for a device, and why."""

    device: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReloadReport:
    """What a reload has done.

    `added`, `removed`: names of devices.  `changed`: keys whose values hold now, and
    `needs_restart` those whose values do not: `daemon.sysfs`, or `NAME.cache` for a device's.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    refused: tuple[Refusal, ...]
    needs_restart: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDevice:
    """A device that is to be added."""

    name: str
    number: int
    config: DeviceConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What becomes of the devices.  `kept`: each with its new configuration; `restart`: keys of
    devices that cannot change while they are served."""

    added: tuple[NewDevice, ...]
    removed: tuple[Lun, ...]
    kept: tuple[tuple[Lun, DeviceConfig], ...]
    restart: tuple[str, ...]


def make_plan(
    luns: Sequence[Lun],
    configs: Sequence[DeviceConfig],
    *,
    names: Collection[str],
    retired: Collection[int] = (),
) -> Plan:
    """Compare the devices that there are with those that are wanted.

    A device is known by its name, or else by its image.  `names` are taken by whatever else is
    served.  Raises `UsageError` for a new device that wants the LUN of one that stays.
    """
    found = _match(luns, configs)
    kept = [(lun, config) for lun, config in zip(found, configs, strict=True) if lun is not None]
    staying = {lun.number: lun for lun, _ in kept}
    new = [config for lun, config in zip(found, configs, strict=True) if lun is None]
    for config in new:
        if config.lun in staying:
            raise UsageError(
                f"{staying[config.lun].device.name} has that LUN until the next start",
                path=config.image,
                field="lun",
                value=config.lun,
            )
    wanted = {config.lun for config in configs if config.lun is not None}
    numbers = device_luns(new, {lun.number for lun in luns} | set(retired) | wanted)
    added = [
        NewDevice(name=name, number=number, config=config)
        for name, number, config in zip(device_names(new, names), numbers, new, strict=True)
    ]
    coming = iter(added)
    restart = []
    for lun, config, name, number in zip(
        found, configs, device_names(configs), device_luns(configs), strict=True
    ):
        one = next(coming) if lun is None else None
        now = (one.name, one.number) if one is not None else _name_and_number(lun)
        keys = [] if lun is None else _fixed(lun, config)
        keys += [
            key for key, a, b in zip(("name", "lun"), now, (name, number), strict=True) if a != b
        ]
        restart += [f"{now[0]}.{key}" for key in keys]
    return Plan(
        added=tuple(added),
        removed=tuple(lun for lun in luns if lun not in found),
        kept=tuple(kept),
        restart=tuple(restart),
    )


def _name_and_number(lun: Lun | None) -> tuple[str, int]:
    assert lun is not None
    return lun.device.name, lun.number


def _match(luns: Sequence[Lun], configs: Sequence[DeviceConfig]) -> list[Lun | None]:
    """For each configuration the device that it is about, if there is one."""
    left = list(luns)
    found: list[Lun | None] = [None] * len(configs)

    def take(fits: Callable[[Lun, DeviceConfig], bool]) -> None:
        for index, config in enumerate(configs):
            if found[index] is None:
                lun = next((each for each in left if fits(each, config)), None)
                if lun is not None:
                    found[index] = lun
                    left.remove(lun)

    take(lambda lun, config: lun.device.name == config.name)
    take(lambda lun, config: config.image in (lun.config.image, lun.device.image))
    return found


def _fixed(lun: Lun, config: DeviceConfig) -> list[str]:
    """The keys of a device, besides name and LUN, that would have to change and cannot."""
    keys = [
        key
        for key in _changed(lun.config, config)
        if key not in _AT_RUN_TIME and key not in ("name", "lun", "image")
    ]
    if config.image not in (lun.config.image, lun.device.image):
        keys.insert(0, "image")
    return keys


def _changed(one: object, other: object) -> list[str]:
    """The fields in which two values of a dataclass differ."""
    names = [field.name for field in fields(one)]  # type: ignore[arg-type]
    return [name for name in names if getattr(one, name) != getattr(other, name)]


class Reloader:
    """Reloads the configuration of a daemon; `config` is the one that is in force."""

    def __init__(
        self,
        config: ServeConfig,
        source: ConfigSource | None,
        *,
        luns: Luns,
        table: DeviceTable,
        automation: Automation,
        iscsi: IscsiServer,
        kernel: KernelDevices | None,
    ) -> None:
        self._config = config
        self._source = source
        self._level = "" if source is None else source.log_level
        self._luns = luns
        self._table = table
        self._automation = automation
        self._iscsi = iscsi
        self._kernel = kernel
        self._lock = trio.Lock()

    @property
    def config(self) -> ServeConfig:
        """The configuration that is in force, the devices in the order of the table."""
        by_device = {lun.device: lun for lun in self._luns}
        devices = [(each, by_device.get(each)) for each in self._table]
        configs = [self._config.backstores if lun is None else lun.config for _, lun in devices]
        numbers = [None if lun is None else lun.number for _, lun in devices]
        if device_luns(configs) != numbers:  # the next start must be told which is which
            configs = [replace(c, lun=n) for c, n in zip(configs, numbers, strict=True)]
        return replace(self._config, devices=tuple(configs))

    async def idle(self) -> None:
        """Wait until no reload is under way."""
        async with self._lock:
            pass

    async def reload(self, *, force: bool = False) -> ReloadReport:
        """Read the configuration and do what it says.

        `force`: devices in standby that are not wanted any more are removed, too.  Raises
        `PloopError` for a mistake; then nothing has changed, and the log says why.
        """
        async with self._lock:
            try:
                report = await self._reload(force=force)
            except PloopError as error:
                log.error("event=reload-failed error=%r", str(error))  # noqa: TRY400
                raise
        _log(report)
        return report

    async def _reload(self, *, force: bool) -> ReloadReport:
        if self._source is None:
            raise UnsupportedError(
                "the daemon was started without configuration files",
                hint="only `ploopd run` has something to read again",
            )
        loaded = await _within(
            LOAD_SECONDS,
            "reading the configuration",
            partial(trio.to_thread.run_sync, self._source.load, abandon_on_cancel=True),
        )
        names = [device.name for device in self._table]
        plan = make_plan(
            tuple(self._luns), loaded.serve.devices, names=names, retired=self._luns.retired
        )
        opened = await self._open(plan.added)
        changed, restart = self._settle(loaded)
        for lun, config in plan.kept:
            changed += self._change(lun, config)
        removed, refused = [], []
        for lun in plan.removed:
            reason = await self._luns.remove(lun, force=force)
            if reason is None:
                removed.append(lun.device.name)
            else:
                refused.append(Refusal(device=lun.device.name, reason=reason))
        added = []
        for new, device in opened:
            holder = next((lun for lun in self._luns if lun.number == new.number), None)
            if holder is None:
                self._luns.offer(new.number, device, new.config)
                added.append(new.name)
                continue
            await self._luns.close(device)
            reason = f"{holder.device.name} still is LUN {new.number}"
            refused.append(Refusal(device=new.name, reason=reason))
        return ReloadReport(
            added=tuple(added),
            removed=tuple(removed),
            changed=tuple(changed),
            refused=tuple(refused),
            needs_restart=(*restart, *plan.restart),
        )

    async def _open(self, added: Iterable[NewDevice]) -> list[tuple[NewDevice, Device]]:
        """Open all or none."""
        opened: list[tuple[NewDevice, Device]] = []
        try:
            for new in added:
                self._check_unserved(new.config)
                device = await _within(
                    OPEN_SECONDS,
                    f"opening {new.config.image}",
                    partial(self._luns.open, new.name, new.config),
                )
                opened.append((new, device))
        except PloopError:
            for _, device in opened:
                await self._luns.close(device)
            raise
        return opened

    def _check_unserved(self, config: DeviceConfig) -> None:
        """Raise `UsageError` if a device has the image already, and one of the two is to write."""
        image = os.path.abspath(config.image)
        for device in self._table:
            if os.path.abspath(device.image) == image and not (
                config.read_only and device.options.open.read_only
            ):
                raise UsageError(f"is served already, as {device.name}", path=config.image)

    # -- settings --------------------------------------------------------------------------

    def _settle(self, loaded: RunConfig) -> tuple[list[str], list[str]]:
        """The settings of the daemon: those that hold from now on, and those that do not."""
        changed: list[str] = []
        if loaded.log_level != self._level:
            self._level = loaded.log_level
            set_level(loaded.log_level)
            changed.append("daemon.log_level")
        new, old = loaded.serve, self._config
        if new.backstores != old.backstores and self._kernel is not None:
            self._kernel.options = device_options(new.backstores)
            self._kernel.policy = recovery_policy(new.backstores)
            self._config = replace(self._config, backstores=new.backstores)
            changed.append("defaults")
        restart = [
            _PLACES.get(key, key)
            for key in _changed(old, new)
            if key not in ("devices", "iscsi", "backstores")
        ]
        fixed = [key for key in _changed(old.iscsi, new.iscsi) if key not in _ACCESS]
        restart += [f"iscsi.{key}" for key in fixed]
        access = [key for key in _changed(old.iscsi, new.iscsi) if key in _ACCESS]
        if access:
            names = [_ACCESS[key] for key in access]
            values: dict[str, Any] = {key: getattr(new.iscsi, key) for key in access}
            rules = replace(old.iscsi, **values)
            try:
                self._iscsi.set_access(rules)
            except PloopError as error:  # at the portals of now they would protect nothing
                log.warning("event=access-unchanged error=%r", str(error))
                restart += names
            else:
                self._config = replace(self._config, iscsi=rules)
                changed += names
        return changed, restart

    def _change(self, lun: Lun, config: DeviceConfig) -> list[str]:
        """The settings of a device; returns those that have changed."""
        gate = lun.device.gate
        keys = [key for key in _changed(lun.config, config) if key in _AT_RUN_TIME]
        values: dict[str, Any] = {key: getattr(config, key) for key in keys}
        if config.image == lun.device.image:
            values["image"] = config.image
        lun.config = replace(lun.config, **values)
        if "park_max" in keys:
            gate.set_limits(replace(gate.limits, park_max=config.park_max))
        if "extra_standby_errnos" in keys:
            lun.device.set_extra_standby_errnos(config.extra_standby_errnos)
        if _RECOVERY.intersection(keys):
            self._automation.change(lun.device, recovery_policy(config))
        return [f"{lun.device.name}.{key}" for key in keys]


async def _within(seconds: float, what: str, work: Callable[[], Awaitable[T]]) -> T:
    """Raises `PloopError` (exit code TIMEOUT) when the time is up."""
    with trio.move_on_after(seconds):
        return await work()
    raise PloopError(f"{what} took more than {seconds:g} s", exit_code=ExitCode.TIMEOUT)


def _log(report: ReloadReport) -> None:
    """One line of what was done, one of what was not."""
    log.info(
        "event=reloaded added=%s removed=%s changed=%s",
        *(",".join(each) or "none" for each in (report.added, report.removed, report.changed)),
    )
    for refusal in report.refused:
        log.warning("event=reload-refused device=%s reason=%r", refusal.device, refusal.reason)
    if report.needs_restart:
        log.warning("event=reload-needs-restart keys=%s", ",".join(report.needs_restart))
