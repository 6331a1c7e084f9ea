"""ListDevices, ShowDevice.

They answer from memory: they must work while the storage of a device hangs.
"""

from __future__ import annotations

from ploopd.control import messages
from ploopd.control.context import ControlContext
from ploopd.control.server import Operation, Send
from ploopd.devices import Device
from ploopd.gate import errnos


def operations(context: ControlContext) -> list[Operation]:
    """What this module serves."""

    async def list_devices(_parameters: messages.Empty, _send: Send) -> messages.DeviceList:
        return messages.DeviceList(devices=[summary(context, one) for one in context.devices])

    async def show(parameters: messages.DeviceName, _send: Send) -> messages.ShowReply:
        return messages.ShowReply(device=details(context, context.find(parameters.name)))

    return [
        Operation(method=messages.LIST_DEVICES, handler=list_devices),
        Operation(method=messages.SHOW_DEVICE, handler=show),
    ]


def summary(context: ControlContext, device: Device) -> messages.DeviceSummary:
    """One line of the list, from memory."""
    return messages.DeviceSummary(
        name=device.name,
        image=device.image,
        size=device.size,
        standby=device.gate.standby_text,
        urls=context.urls(device.name),
        read_only=device.gate.read_only,
    )


def details(context: ControlContext, device: Device) -> messages.DeviceDetails:
    """Everything about a device, from memory."""
    gate, volume = device.gate, device.volume
    return messages.DeviceDetails(
        name=device.name,
        image=device.image,
        size=device.size,
        standby=gate.standby_text,
        urls=context.urls(device.name),
        read_only=gate.read_only,
        state=gate.state.value,
        reason=gate.cause or None,
        parked_requests=gate.parked_count,
        parked_bytes=gate.parked_bytes,
        identity=str(device.identity),
        format_version=volume.format_version,
        cluster_size=volume.cluster_size,
        allocated=volume.allocated_bytes(),
        layers=[
            messages.Layer(
                path=layer.path,
                kind=layer.kind,
                level=layer.level,
                guid=layer.guid,
                version=layer.version,
            )
            for layer in volume.layers
        ],
        notes=list(volume.notes),
        latched=None if gate.latched is None else str(gate.latched),
        full=full_text(device),
        journal=journal_details(device),
        recovery=context.automation.describe(device),
        standby_errnos=errnos.names(gate.standby_errnos),
    )


def full_text(device: Device) -> str | None:
    """The failure of a storage without room, and whether it ends by itself; None if it has some."""
    failure = device.gate.full
    if failure is None:
        return None
    failed = device.volume.sync_failed
    if failed is None or device.journaling.status is not None:
        return str(failure)
    return (
        f"{failure}; what was written since the last flush may be lost, and no flush succeeds "
        f"before `ploopctl device replace {device.name} --image FILE`"
    )


def journal_details(device: Device) -> messages.JournalDetails | None:
    """What the journal holds, None if it is off."""
    status = device.journaling.status
    if status is None:
        return None
    return messages.JournalDetails(
        requests=status.requests, data=status.data, used=status.used, limit=status.limit
    )
