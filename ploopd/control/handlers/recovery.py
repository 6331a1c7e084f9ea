"""ReplaceDevice, ReloadDevice, ResizeDevice, ClearLatch."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

import trio

from ploopd.control import messages, recovery
from ploopd.control.context import ControlContext
from ploopd.control.resize import ResizeReport, resize
from ploopd.control.server import Operation, Send
from ploopd.control.steps import OnStep, ReplaceReport, StepRecord
from ploopd.devices import Device
from ploopd.errors import PloopError

_STEPS = 256
"""Steps that are kept for a client that does not read them."""

Recover = Callable[[OnStep], Awaitable[ReplaceReport]]

Report = TypeVar("Report")


def operations(context: ControlContext) -> list[Operation]:
    """What this module serves."""

    async def replace_device(
        parameters: messages.ReplaceParameters, send: Send
    ) -> messages.ReplaceStep:
        device = context.find(parameters.name)

        async def recover(on_step: OnStep) -> ReplaceReport:
            return await recovery.replace(
                device,
                parameters.image,
                force=parameters.force,
                level=parameters.level,
                guid=parameters.guid,
                keep_name=parameters.keep_name,
                keep_descriptor=parameters.keep_descriptor,
                dry_run=parameters.dry_run,
                on_step=on_step,
            )

        async with _stand_aside(context, device, dry_run=parameters.dry_run):
            return await _with_steps(device, recover, send)

    async def reload_device(
        parameters: messages.ReloadParameters, send: Send
    ) -> messages.ReplaceStep:
        device = context.find(parameters.name)

        async def recover(on_step: OnStep) -> ReplaceReport:
            return await recovery.reload(device, dry_run=parameters.dry_run, on_step=on_step)

        async with _stand_aside(context, device, dry_run=parameters.dry_run):
            return await _with_steps(device, recover, send)

    async def resize_device(
        parameters: messages.ResizeParameters, send: Send
    ) -> messages.ResizeStep:
        device = context.find(parameters.name)

        async def grow(on_step: OnStep) -> ResizeReport:
            return await resize(device, parameters.size, on_step=on_step)

        began = trio.current_time()
        async with context.automation.operator(device):
            report = await _sending_steps(grow, _resize_step, send)
        elapsed = trio.current_time() - began
        return messages.ResizeStep(
            step="done", elapsed=elapsed, size=report.size, previous=report.previous
        )

    async def clear_latch(parameters: messages.DeviceName, _send: Send) -> messages.ClearLatchReply:
        failure = recovery.clear_latch(context.find(parameters.name))
        return messages.ClearLatchReply(failure=failure)

    return [
        Operation(method=messages.REPLACE_DEVICE, handler=replace_device, outlives_client=True),
        Operation(method=messages.RELOAD_DEVICE, handler=reload_device, outlives_client=True),
        Operation(method=messages.RESIZE_DEVICE, handler=resize_device, outlives_client=True),
        Operation(method=messages.CLEAR_LATCH, handler=clear_latch),
    ]


def _stand_aside(
    context: ControlContext, device: Device, *, dry_run: bool
) -> AbstractAsyncContextManager[None]:
    """The device's automation does nothing meanwhile; it may while nothing is changed."""
    return contextlib.nullcontext() if dry_run else context.automation.operator(device)


async def _with_steps(device: Device, recover: Recover, send: Send) -> messages.ReplaceStep:
    """Recover and send every step when it is done; the reply has the report."""
    began = trio.current_time()
    report = await _sending_steps(recover, _step, send)
    elapsed = trio.current_time() - began
    return messages.ReplaceStep(
        step="done",
        elapsed=elapsed,
        image=report.image,
        planned=report.dry_run,
        report=_report(device, report, elapsed),
    )


async def _sending_steps(
    work: Callable[[OnStep], Awaitable[Report]],
    message: Callable[[StepRecord], messages.Message],
    send: Send,
) -> Report:
    """Do `work` and send a message for every step when it is done."""
    sender, receiver = trio.open_memory_channel[messages.Message](_STEPS)

    def on_step(record: StepRecord) -> None:
        with contextlib.suppress(trio.WouldBlock):
            sender.send_nowait(message(record))

    async def forward() -> None:
        async for step in receiver:
            await send(step)

    report: Report | None = None
    failure: PloopError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(forward)
        with sender:
            try:
                report = await work(on_step)
            except PloopError as error:
                failure = error
    if failure is not None:
        raise failure
    assert report is not None
    return report


def _resize_step(record: StepRecord) -> messages.ResizeStep:
    return messages.ResizeStep(step=record.step.value, elapsed=record.elapsed, detail=record.detail)


def _step(record: StepRecord) -> messages.ReplaceStep:
    return messages.ReplaceStep(
        step=record.step.value,
        elapsed=record.elapsed,
        detail=record.detail,
        planned=record.planned,
    )


def _report(device: Device, report: ReplaceReport, elapsed: float) -> messages.RecoveryReport:
    return messages.RecoveryReport(
        device=report.device,
        image=report.image,
        previous=report.previous,
        identity=str(device.identity),
        level=report.level,
        guid=report.guid,
        dry_run=report.dry_run,
        elapsed=elapsed,
        steps=[
            messages.RecoveryStep(step=each.step.value, elapsed=each.elapsed, detail=each.detail)
            for each in report.steps
        ],
    )
