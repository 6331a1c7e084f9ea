"""StandbyShow, StandbyEnter, StandbyLeave, StandbyWait."""

from __future__ import annotations

import trio

from ploopd.control import messages
from ploopd.control.context import ControlContext
from ploopd.control.recovery import leave_standby
from ploopd.control.server import Operation, Send
from ploopd.devices import Device
from ploopd.errors import ExitCode, PloopError, UsageError
from scst_shim import StandbyState

REST_SECONDS = 5.0
"""For requests in execution to end when an operator enters standby."""

REST_LOOK = 0.005

LONGEST_WAIT = 7 * 24 * 3600.0
"""Seconds that one StandbyWait may take."""


def operations(context: ControlContext) -> list[Operation]:
    """What this module serves."""

    async def show(parameters: messages.DeviceName, _send: Send) -> messages.StandbyState:
        return _state(context.find(parameters.name))

    async def enter(parameters: messages.DeviceName, _send: Send) -> messages.StandbyState:
        device = context.find(parameters.name)
        device.gate.enter_standby("entered by ploopctl")
        context.automation.hold(device)
        await _come_to_rest(device)
        return _state(device)

    async def leave(parameters: messages.DeviceName, _send: Send) -> messages.StandbyState:
        device = context.find(parameters.name)
        leave_standby(device)
        return _state(device)

    async def wait(
        parameters: messages.StandbyWaitParameters, _send: Send
    ) -> messages.StandbyState:
        device = context.find(parameters.name)
        if parameters.standby not in (StandbyState.ON.value, StandbyState.OFF.value):
            raise UsageError(
                "is not a state to wait for", field="standby", value=parameters.standby
            )
        await _wait_for(device, parameters.standby, min(parameters.timeout, LONGEST_WAIT))
        return _state(device)

    return [
        Operation(method=messages.STANDBY_SHOW, handler=show),
        Operation(method=messages.STANDBY_ENTER, handler=enter),
        Operation(method=messages.STANDBY_LEAVE, handler=leave),
        Operation(method=messages.STANDBY_WAIT, handler=wait),
    ]


def _state(device: Device) -> messages.StandbyState:
    gate = device.gate
    return messages.StandbyState(standby=gate.standby_text, executing=gate.executing_count)


async def _come_to_rest(device: Device) -> None:
    """Let what is being executed end, so that the image may be copied; a storage that hangs is not
    waited for."""
    with trio.move_on_after(REST_SECONDS):
        while device.gate.executing_count:  # noqa: ASYNC110 (the gate's event is the replace's)
            await trio.sleep(REST_LOOK)


async def _wait_for(device: Device, wanted: str, timeout: float) -> None:
    """Return when the state string is `wanted`.  Raises `PloopError` (exit code TIMEOUT)."""
    reached = trio.Event()

    def changed(state: StandbyState) -> None:
        if state.value == wanted:
            reached.set()

    unsubscribe = device.flags.watcher.subscribe(changed)
    try:
        changed(device.flags.state)
        with trio.move_on_after(max(0.0, timeout)):
            await reached.wait()
    finally:
        unsubscribe()
    if not reached.is_set():
        raise PloopError(
            f"waited {timeout:g} s for standby of {device.name} to be {wanted}",
            field="standby",
            value=device.gate.standby_text,
            exit_code=ExitCode.TIMEOUT,
        )
