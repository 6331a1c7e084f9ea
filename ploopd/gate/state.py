"""The gate's state machine: every transition there is, in one table, and diagrams made from it.

Pure: values in, values out.  `docs/standby.md` shows the diagram this module renders.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType

from ploopd.errors import BusyError


class GateState(Enum):
    """Where a device is with respect to its storage."""

    ACTIVE = "active"
    STANDBY = "standby"
    RECOVERING = "recovering"


class GateEvent(Enum):
    """What moves the machine."""

    FAULT = "standby errno judged"
    ENTER = "operator enters standby"
    LEAVE = "operator leaves standby"
    BEGIN = "replace begins"
    FAIL = "replace failed"
    RESUME = "replace given up before it touched anything"
    RECOVER = "replaced"


_S, _E = GateState, GateEvent

TRANSITIONS: Mapping[tuple[GateState, GateEvent], GateState] = MappingProxyType(
    {
        (_S.ACTIVE, _E.FAULT): _S.STANDBY,
        (_S.ACTIVE, _E.ENTER): _S.STANDBY,
        (_S.ACTIVE, _E.BEGIN): _S.RECOVERING,
        (_S.STANDBY, _E.FAULT): _S.STANDBY,
        (_S.STANDBY, _E.ENTER): _S.STANDBY,
        (_S.STANDBY, _E.LEAVE): _S.ACTIVE,
        (_S.STANDBY, _E.BEGIN): _S.RECOVERING,
        (_S.RECOVERING, _E.FAULT): _S.RECOVERING,
        (_S.RECOVERING, _E.FAIL): _S.STANDBY,
        (_S.RECOVERING, _E.RESUME): _S.ACTIVE,
        (_S.RECOVERING, _E.RECOVER): _S.ACTIVE,
    }
)

_REFUSALS: Mapping[GateState, str] = MappingProxyType(
    {
        GateState.ACTIVE: "the device is active, not in standby",
        GateState.STANDBY: "the device is in standby and nothing is recovering it",
        GateState.RECOVERING: "the device is being recovered already",
    }
)


def advance(state: GateState, event: GateEvent) -> GateState:
    """The state after `event`.  Raises `BusyError` where the table has no such transition."""
    following = TRANSITIONS.get((state, event))
    if following is None:
        raise BusyError(_REFUSALS[state], field="state", value=state.value)
    return following


def render_mermaid() -> str:
    """The diagram of TRANSITIONS as a mermaid state diagram, without a code fence."""
    lines = ["stateDiagram-v2", f"    [*] --> {GateState.ACTIVE.value}"]
    lines += [
        f"    {source.value} --> {target.value}: {event.value}"
        for (source, event), target in TRANSITIONS.items()
    ]
    return "\n".join(lines)


def render_dot() -> str:
    """The same diagram for graphviz."""
    lines = ["digraph gate {"]
    lines += [
        f'    "{source.value}" -> "{target.value}" [label="{event.value}"];'
        for (source, event), target in TRANSITIONS.items()
    ]
    return "\n".join([*lines, "}"])
