"""What is opened in a recovery, how it is looked at before, and what changes when it has succeeded.

A replace exchanges one delta and opens the others again; a reload opens everything again from where
the device was opened.  The steps are the same: `ploopd.control.recovery`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ploopd.control.candidate import (
    Candidate,
    Inode,
    Requirements,
    examine,
    require_geometry,
    require_quiet,
)
from ploopd.control.membership import Place, require_same_place
from ploopd.control.record import KeepIdentity, NameInDescriptor, NoRecord, Record, TakeName
from ploopd.devices import Device
from ploopd.errors import NotFoundError, UsageError
from ploopd.fileio.locks import lock_image
from ploopd.storage.chain_files import descriptor_path
from ploopd.storage.delta import require_sound
from ploopd.storage.descriptor_update import DescriptorUpdate, descriptor_name
from ploopd.storage.opener import open_stack, verify_descriptor
from ploopd.storage.probe import ImageFormat
from ploopd.storage.stack import Layer, LayerInfo, Stack
from ploopd.storage.volume import Volume

Hung = Sequence[tuple[Inode, int]]


class Plan(Protocol):
    """`subject`: the path that errors and reports name; `opens` and `substitutes`: what
    `Device.open_volume` gets; `record`: how it is made permanent, known after a thorough look.
    """

    subject: str
    previous: str
    level: int | None
    guid: str | None
    opens: str
    substitutes: Mapping[str, str]
    record: Record

    def look(self, hung: Hung, *, thorough: bool) -> None:
        """Raise the PloopError that says why it cannot be done.  Blocking; changes nothing.

        `hung`: see `Device.hung_operations`.
        """
        ...

    def adopted(self, device: Device) -> None:
        """It has been recorded, and is served from now on."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaceOptions:
    """Which delta is replaced, by `level` (0 is the top) or `guid`, and how.

    `force` accepts an image that is marked as in use.  `keep_name`: the new file gets the old one's
    name.  `keep_descriptor`: DiskDescriptor.xml goes on naming the old file.
    """

    force: bool = False
    level: int | None = None
    guid: str | None = None
    keep_name: bool = False
    keep_descriptor: bool = False


class ReplacePlan:
    """One delta is exchanged for the file `image`."""

    def __init__(self, device: Device, image: str, options: ReplaceOptions) -> None:
        target = choose(device, options)
        self.subject = os.path.abspath(image)
        self.previous = target.path
        self.level: int | None = target.level
        self.guid = target.guid
        self.record: Record = NoRecord("")
        self._device = device
        self._target = target
        self._options = options
        self._descriptor = device.image if device.has_descriptor else None
        self._substituted = target.guid in device.substitutes
        if target.guid is None:
            self.opens, self.substitutes = self.subject, device.substitutes
        else:
            self.opens = device.image
            self.substitutes = {**device.substitutes, target.guid: self.subject}
        volume = device.volume
        self._wanted = requirements(device, target, options)
        guids = [each.guid for each in reversed(volume.layers) if each.guid is not None]
        self._place = Place(
            guids=guids[: len(volume.layers) - target.level], is_top=target.level == 0
        )

    def look(self, hung: Hung, *, thorough: bool) -> None:
        """See `Plan.look`."""
        layer = self._device.env.layer
        candidate = examine(self.subject, self._wanted, thorough=thorough, layer=layer)
        top = candidate.inode if self.level == 0 else self._device.top_inode
        require_quiet(self.subject, top, hung)
        if thorough:
            require_same_place(self.subject, candidate.inode, self._place)
            self.record = self._choose_record(candidate)

    def adopted(self, device: Device) -> None:
        """See `Plan.adopted`."""
        if self._options.keep_name:
            device.volume.renamed(self._target.level, self.previous)
            self.subject = self.previous
        if self.guid is None:
            device.image = device.image if self._options.keep_name else self.subject
            return
        substitutes = dict(self.substitutes)
        if self._options.keep_name and self._substituted:
            substitutes[self.guid] = self.previous
        elif not self._kept_descriptor:
            del substitutes[self.guid]
        device.substitutes = substitutes

    @property
    def _kept_descriptor(self) -> bool:
        """Whether the descriptor does not name the new file."""
        return self._options.keep_descriptor or (
            self._device.volume.read_only and not self._options.keep_name
        )

    def _choose_record(self, candidate: Candidate) -> Record:
        """How the new file becomes the one that is opened next time."""
        device, layer = self._device, self._device.env.layer
        if self._options.keep_name:
            return TakeName(self.subject, candidate.inode, os.path.abspath(self.previous), layer)
        if self._descriptor is None:
            if device.volume.read_only:
                return NoRecord("")
            moved = self.subject != os.path.abspath(device.image)
            return KeepIdentity(self.subject, device.identity, moved=moved)
        if self._kept_descriptor:
            return NoRecord(f"the descriptor goes on naming {os.path.basename(self.previous)}")
        assert self.guid is not None
        path = descriptor_path(self._descriptor)
        name = descriptor_name(path, self.subject, device.options.open.image_root)
        return NameInDescriptor(DescriptorUpdate(path, self.guid, name, layer=layer))


class ReloadPlan:
    """Everything is opened again; a descriptor that was changed meanwhile is taken up."""

    def __init__(self, device: Device) -> None:
        self.subject = self.previous = self.opens = device.image
        self.level: int | None = None
        self.guid: str | None = None
        self.substitutes = device.substitutes
        self.record: Record = NoRecord("")
        self._device = device
        self._held = device.volume.inode_numbers()

    def look(self, hung: Hung, *, thorough: bool) -> None:
        """See `Plan.look`."""
        device = self._device
        files, stack = open_stack(
            self.opens,
            locking=False,
            options=device.options.open,
            substitutes=self.substitutes,
            layer=device.env.layer,
        )
        try:
            stack.verify()
            verify_descriptor(files, stack)
            wanted = (device.expected_size(stack.size), device.gate.cluster_size)
            require_geometry(self.subject, (stack.size, stack.cluster_size), wanted)
            require_quiet(stack.top.file.path, stack.top.inode, hung)
            if thorough:
                self._look_closely(stack)
        finally:
            stack.close()

    def adopted(self, device: Device) -> None:
        """See `Plan.adopted`; substitutes of deltas that the chain has no more are forgotten."""
        guids = {each.guid for each in device.volume.layers}
        device.substitutes = {k: v for k, v in self.substitutes.items() if k in guids}

    def _look_closely(self, stack: Stack) -> None:
        writable = not self._device.volume.read_only
        for level, layer in enumerate(stack.layers):
            if layer.inode not in self._held:
                base = writable and level == len(stack.layers) - 1
                lock_image(
                    layer.file.fd,
                    path=layer.file.path,
                    writer=writable and level == 0,
                    base=base,
                )
            _require_sound(layer)


def _require_sound(layer: Layer) -> None:
    if layer.delta is not None:
        require_sound(layer.delta, *layer.delta.load_bat())


def choose(device: Device, options: ReplaceOptions) -> LayerInfo:
    """The delta that `options` mean; the top one if they mean none.

    Raises UsageError for two of them, NotFoundError when the chain has none.
    """
    layers = device.volume.layers
    if options.level is not None and options.guid is not None:
        raise UsageError("give a level or a GUID, not both", field="level", value=options.level)
    if options.keep_name and options.keep_descriptor:
        raise UsageError(
            "with --keep-name the descriptor needs no change: --keep-descriptor makes no sense"
        )
    if options.keep_name and device.volume.read_only:
        raise UsageError("a read-only device renames nothing", field="device", value=device.name)
    if options.guid is not None:
        wanted = "{" + options.guid.strip("{}").lower() + "}"
        found = next((each for each in layers if each.guid == wanted), None)
        if found is None:
            known = ", ".join(each.guid for each in layers if each.guid) or "none: no descriptor"
            raise NotFoundError(
                "the chain has no delta with this GUID",
                field="guid",
                value=options.guid,
                hint=f"it has {known}",
            )
        return found
    level = options.level or 0
    if not 0 <= level < len(layers):
        raise NotFoundError(
            "the chain has no delta of this level",
            field="level",
            value=level,
            hint=f"it has levels 0 (the top) to {len(layers) - 1}: see `ploopctl device show`",
        )
    return layers[level]


def requirements(device: Device, target: LayerInfo, options: ReplaceOptions) -> Requirements:
    """What a file must be to take the place of `target`."""
    volume = device.volume
    by_descriptor = target.guid is not None
    return Requirements(
        format_version=target.version,
        size=device.gate.size if target.level == 0 else target.size,
        growing_to=device.growing_to if target.level == 0 else None,
        cluster_size=volume.cluster_size,
        raw_format=ImageFormat.RAW if by_descriptor else device.options.open.format,
        writable=target.level == 0 and not volume.read_only,
        base=target.level == len(volume.layers) - 1 and not volume.read_only,
        current=target.inode,
        others={each.inode: each.level for each in volume.layers if each is not target},
        held=frozenset(volume.inode_numbers()),
        force=options.force,
    )


def intentions(plan: Plan, device: Device) -> dict[str, str]:
    """What each step after the check would do, by the step's name."""
    volume: Volume = device.volume
    files = ", ".join(each.path for each in volume.layers)
    parked = device.gate.parked_count
    return {
        "drain": f"would wait for {device.gate.executing_count} requests in execution",
        "close old": f"would close {files}" if device.volume_open else "is closed already",
        "open new": f"would open {plan.subject}",
        "record": f"would do: {plan.record.intention}" if plan.record.intention else "",
        "release": f"would execute {parked} parked requests",
    }
