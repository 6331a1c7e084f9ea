"""The table of a daemon's devices, and how they get their names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator

import trio

from ploopd.devices import Device, DeviceOptions, Environment, Opener
from ploopd.errors import NotFoundError, PloopError, UsageError


class DeviceTable:
    """The devices of a daemon by name, in the order in which they were added.

    `run` must be running before `add`.
    """

    def __init__(self, env: Environment) -> None:
        self.env = env
        self._devices: dict[str, Device] = {}
        self._scopes: dict[str, trio.CancelScope] = {}
        self._nursery: trio.Nursery | None = None
        self._watchers: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._devices)

    def __iter__(self) -> Iterator[Device]:
        return iter(tuple(self._devices.values()))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the devices' tasks until cancelled (after `close`)."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    async def add(
        self,
        image: str,
        options: DeviceOptions | None = None,
        *,
        name: str | None = None,
        opener: Opener | None = None,
    ) -> Device:
        """Open `image` and serve it as `name`, or else under a name made from its file name.

        Raises `UsageError` when another device has that `name`.
        """
        if self._nursery is None:
            raise RuntimeError("the device table is not running")
        if name in self._devices:
            raise UsageError("another device has that name", field="name", value=name)
        name = name or unique_name(device_name(image), self._devices)
        device = await Device.open(image, name=name, env=self.env, options=options, opener=opener)
        with trio.CancelScope(shield=True):  # nobody else would close it
            self._scopes[name] = await self._nursery.start(self._run_device, device)
        self._devices[name] = device
        self._changed()
        return device

    async def remove(self, device: Device) -> None:
        """Close a device that no front end uses any more, and forget it.

        Raises what `Device.close` raises; the device is gone all the same.
        """
        del self._devices[device.name]
        scope = self._scopes.pop(device.name)
        self._changed()
        try:
            await device.close()
        finally:
            scope.cancel()

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call `changed()` after a device has come, and when one has gone, before it is closed;
        returns the way to stop that."""
        self._watchers.append(changed)
        return lambda: self._watchers.remove(changed)

    def _changed(self) -> None:
        for changed in tuple(self._watchers):
            changed()

    @staticmethod
    async def _run_device(
        device: Device, *, task_status: trio.TaskStatus[trio.CancelScope]
    ) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(device.run)
                task_status.started(scope)

    def get(self, name: str) -> Device:
        """The device called `name`, or else the only one that serves that image.

        Raises `NotFoundError`.
        """
        device = self._devices.get(name)
        if device is not None:
            return device
        path = os.path.abspath(name)
        found = [each for each in self if os.path.abspath(each.image) == path]
        if len(found) == 1:
            return found[0]
        names = ", ".join(self._devices) or "none"
        raise NotFoundError(
            "no such device", field="device", value=name, hint=f"there are: {names}"
        )

    async def close(self) -> list[PloopError]:
        """Close all devices at the same time; returns what went wrong with which."""
        problems: list[PloopError] = []

        async def close(device: Device) -> None:
            try:
                await device.close()
            except PloopError as error:
                problems.append(error)

        async with trio.open_nursery() as nursery:
            for device in self:
                nursery.start_soon(close, device)
        return problems


def device_name(image: str) -> str:
    """A name for the device that serves `image`: its file name without the extension, or that of
    the directory for a descriptor; only letters, digits, dot, dash and underscore."""
    path = os.path.abspath(image)
    base = os.path.basename(path)
    if base == "DiskDescriptor.xml":
        base = os.path.basename(os.path.dirname(path))
    stem = os.path.splitext(base)[0] or base
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "disk"


def unique_name(name: str, taken: Collection[str]) -> str:
    """`name`, or the first of name-2, name-3, … that is not taken."""
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name}-{number}"
    return candidate
