"""ListDevices, ShowDevice, ReplaceDevice.

The first two answer from memory: they must work while the storage of a device hangs.
"""

from __future__ import annotations

import contextlib

import trio

from ploopd.control import messages
from ploopd.control.context import ControlContext
from ploopd.control.recovery import StepRecord, replace
from ploopd.control.server import Operation, Send
from ploopd.devices import Device
from ploopd.errors import PloopError

_STEPS = 256
"""Steps that are kept for a client that does not read them."""


def operations(context: ControlContext) -> list[Operation]:
    """What this module serves."""

    async def list_devices(_parameters: messages.Empty, _send: Send) -> messages.DeviceList:
        return messages.DeviceList(devices=[summary(context, one) for one in context.devices])

    async def show(parameters: messages.DeviceName, _send: Send) -> messages.ShowReply:
        return messages.ShowReply(device=details(context, context.find(parameters.name)))

    async def replace_device(
        parameters: messages.ReplaceParameters, send: Send
    ) -> messages.ReplaceStep:
        return await replace_with_steps(context, parameters, send)

    return [
        Operation(method=messages.LIST_DEVICES, handler=list_devices),
        Operation(method=messages.SHOW_DEVICE, handler=show),
        Operation(method=messages.REPLACE_DEVICE, handler=replace_device, outlives_client=True),
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
        journal=journal_details(device),
    )


def journal_details(device: Device) -> messages.JournalDetails | None:
    """What the journal holds, None if it is off."""
    status = device.journaling.status
    if status is None:
        return None
    return messages.JournalDetails(
        requests=status.requests, data=status.data, used=status.used, limit=status.limit
    )


async def replace_with_steps(
    context: ControlContext, parameters: messages.ReplaceParameters, send: Send
) -> messages.ReplaceStep:
    """Replace and send every step when it is done; the reply names the image now served."""
    device = context.find(parameters.name)
    sender, receiver = trio.open_memory_channel[messages.ReplaceStep](_STEPS)

    def on_step(record: StepRecord) -> None:
        text = f"{record.step.value}: {record.detail}" if record.detail else record.step.value
        with contextlib.suppress(trio.WouldBlock):
            sender.send_nowait(messages.ReplaceStep(step=text, elapsed=record.elapsed))

    async def forward() -> None:
        async for step in receiver:
            await send(step)

    began = trio.current_time()
    failure: PloopError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(forward)
        with sender:
            try:
                report = await replace(
                    device, parameters.image, force=parameters.force, on_step=on_step
                )
            except PloopError as error:
                failure = error
    if failure is not None:
        raise failure
    elapsed = trio.current_time() - began
    return messages.ReplaceStep(step="done", elapsed=elapsed, image=report.image)
