"""The attributes of one device: what each file of its directory reads, and what may be written.

The names and forms are those of sysfs for block devices (Documentation/ABI/stable/sysfs-block) and
of vz7's ploop (`pstate`, `pdelta`, `ptune`, `pstat`), where they mean the same here.  What is not
known is left out rather than invented.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ploopd.errors import UsageError
from ploopd.gate.filter import Gate
from ploopd.gate.limits import ParkLimits
from ploopd.scsi.cdb import BLOCK_SHIFT, BLOCK_SIZE
from ploopd.scsi.inquiry import (
    MAX_TRANSFER_BLOCKS,
    MAX_UNMAP_BLOCKS,
    MAX_WRITE_SAME_BLOCKS,
    OPTIMAL_GRANULARITY_BLOCKS,
    OPTIMAL_TRANSFER_BLOCKS,
)
from ploopd.scsi.logical_unit import LogicalUnit
from ploopd.storage.stack import LayerInfo

FOREVER = "forever"


class Layers(Protocol):
    """The files of a device (`storage.volume.Volume`)."""

    @property
    def layers(self) -> Sequence[LayerInfo]:
        """Top first."""
        ...

    def mapped_bytes(self) -> int:
        """Bytes of the clusters that some file of the chain has."""
        ...


class ServedDevice(Protocol):
    """A device, as this front end sees it (`ploopd.devices.Device`)."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        ...

    @property
    def gate(self) -> Gate: ...

    @property
    def unit(self) -> LogicalUnit: ...

    @property
    def volume(self) -> Layers: ...

    def bind(self) -> None:
        """The device is added to a front end."""
        ...

    def unbind(self) -> None:
        """The device is removed from a front end."""
        ...


class ServedDevices(Protocol):
    """The devices that there are (`ploopd.device_table.DeviceTable`)."""

    def __iter__(self) -> Iterator[ServedDevice]: ...

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call `changed()` when one has come or gone; returns the way to stop that."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribute:
    """One file: `show()` is its text with the newline, `store(text)` takes what is written to it
    and raises `ValueError` or `UsageError` for what it cannot use; None: read-only."""

    show: Callable[[], str]
    store: Callable[[str], None] | None = None


Group = Mapping[str, "Attribute | Group"]
"""A directory of attributes and further groups."""


def device_group(device: ServedDevice) -> Group:
    """Everything below `block/<device>`."""
    return {
        "pdelta": _pdelta(device),
        "pstat": _pstat(device),
        "pstate": _pstate(device),
        "ptune": _ptune(device),
        "queue": _queue(device),
        "removable": _number(lambda: 0),
        "ro": _number(lambda: device.unit.write_protection() is not None),
        "size": _number(lambda: device.size >> BLOCK_SHIFT),
    }


def _text(value: Callable[[], str]) -> Attribute:
    return Attribute(show=lambda: f"{value()}\n")


def _number(value: Callable[[], int]) -> Attribute:
    return Attribute(show=lambda: f"{int(value())}\n")


def _queue(device: ServedDevice) -> Group:
    """sysfs-block, /sys/block/<disk>/queue/: what initiators are told by VPD and mode pages."""
    unit, gate = device.unit, device.gate
    limits = unit.provisioning
    thin = limits.thin
    return {
        "discard_granularity": _number(lambda: gate.cluster_size if thin else 0),
        "discard_max_bytes": _number(lambda: MAX_UNMAP_BLOCKS << BLOCK_SHIFT if thin else 0),
        "fua": _number(lambda: 1),
        "hw_sector_size": _number(lambda: BLOCK_SIZE),
        "logical_block_size": _number(lambda: BLOCK_SIZE),
        "max_sectors_kb": _number(lambda: (MAX_TRANSFER_BLOCKS << BLOCK_SHIFT) >> 10),
        "minimum_io_size": _number(lambda: OPTIMAL_GRANULARITY_BLOCKS << BLOCK_SHIFT),
        "optimal_io_size": _number(lambda: OPTIMAL_TRANSFER_BLOCKS << BLOCK_SHIFT),
        "physical_block_size": _number(lambda: BLOCK_SIZE << limits.physical_exponent),
        "standby": _text(lambda: gate.standby_text),
        "write_cache": _text(lambda: "write back" if unit.modes.write_cache else "write through"),
        "write_zeroes_max_bytes": _number(lambda: MAX_WRITE_SAME_BLOCKS << BLOCK_SHIFT),
    }


def _pstate(device: ServedDevice) -> Group:
    """vz7's state of a device.  `running` is 0 while there is no storage under it; `aborted` is the
    latch that a failed write has set, and writing 0 clears it, as in vz7."""
    gate, volume = device.gate, device.volume

    def clear_latch(text: str) -> None:
        if text.strip() != "0":
            raise ValueError(f"aborted can only be cleared, with 0, not set to {text!r}")
        gate.clear_latch()

    return {
        "aborted": Attribute(show=lambda: f"{int(gate.latched is not None)}\n", store=clear_latch),
        "active_reqs": _number(lambda: gate.executing_count),
        "block_size": _number(lambda: gate.cluster_size >> BLOCK_SHIFT),
        "fmt_version": _number(lambda: volume.layers[0].version),
        "queued_bios": _number(lambda: gate.parked_count),
        "state": _text(lambda: gate.state.value),
        "top": _number(lambda: len(volume.layers) - 1),
        "total_bios": _number(lambda: gate.executing_count + gate.parked_count),
    }


def _pdelta(device: ServedDevice) -> Group:
    """The files of the chain under the numbers that vz7 gives them: 0 is the base."""
    layers = device.volume.layers
    return {
        str(len(layers) - 1 - layer.level): _delta(layer, device, len(layers) - 1 - layer.level)
        for layer in layers
    }


def _delta(layer: LayerInfo, device: ServedDevice, level: int) -> Group:
    read_only = layer.level > 0 or device.gate.read_only
    return {
        "format": _text(lambda: "raw" if layer.kind == "raw" else "ploop1"),
        "image": _text(lambda: _one_line(layer.path)),
        "io": _text(lambda: layer.io),
        "level": _number(lambda: level),
        "ro": _number(lambda: read_only),
    }


def _pstat(device: ServedDevice) -> Group:
    """Counters since the device was opened; commands and bytes of all front ends together."""
    stats, gate = device.unit.stats, device.gate
    return {
        "errors": _number(lambda: stats.errors),
        "parked_bytes": _number(lambda: gate.parked_bytes),
        "parked_reqs": _number(lambda: gate.parked_count),
        "read_bytes": _number(lambda: stats.read_bytes),
        "reads": _number(lambda: stats.reads),
        "unmapped_bytes": _number(lambda: stats.unmapped_bytes),
        "writes": _number(lambda: stats.writes),
        "written_bytes": _number(lambda: stats.written_bytes),
    }


def _ptune(device: ServedDevice) -> Group:
    """What an operator may change while the device is served; it is not remembered."""
    gate = device.gate

    def limit(show: Callable[[ParkLimits], str], change: Callable[[str], ParkLimits]) -> Attribute:
        return Attribute(
            show=lambda: f"{show(gate.limits)}\n",
            store=lambda text: gate.set_limits(change(text.strip())),
        )

    return {
        "park_max": limit(
            lambda now: FOREVER if now.park_max is None else f"{now.park_max:g}",
            lambda text: replace(gate.limits, park_max=_seconds(text)),
        ),
        "park_max_bytes": limit(
            lambda now: str(now.max_bytes),
            lambda text: replace(gate.limits, max_bytes=int(text)),
        ),
        "park_max_reqs": limit(
            lambda now: str(now.max_requests),
            lambda text: replace(gate.limits, max_requests=int(text)),
        ),
    }


def _seconds(text: str) -> float | None:
    if text == FOREVER:
        return None
    seconds = float(text)
    if not math.isfinite(seconds):
        raise UsageError("is not a number of seconds", field="park_max", value=text)
    return seconds


def _one_line(path: str) -> str:
    """A path as one line of an attribute, whatever bytes it has."""
    return path.replace("\\", "\\\\").replace("\n", "\\n")
