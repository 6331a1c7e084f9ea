"""The transition table: complete, refusing the rest, and what the documentation shows."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from ploopd.errors import BusyError
from ploopd.gate.state import (
    TRANSITIONS,
    GateEvent,
    GateState,
    advance,
    render_dot,
    render_mermaid,
)

DOCUMENT = Path(__file__).parents[3] / "docs" / "standby.md"


@pytest.mark.parametrize(("state", "event"), list(product(GateState, GateEvent)))
def test_every_pair_is_in_the_table_or_refused(state: GateState, event: GateEvent) -> None:
    if (state, event) in TRANSITIONS:
        assert advance(state, event) is TRANSITIONS[state, event]
    else:
        with pytest.raises(BusyError, match=state.value):
            advance(state, event)


def test_only_a_recovery_or_an_operator_leaves_standby() -> None:
    leaving = {
        event
        for (source, event), target in TRANSITIONS.items()
        if source is not GateState.ACTIVE and target is GateState.ACTIVE
    }
    assert leaving == {GateEvent.LEAVE, GateEvent.RESUME, GateEvent.RECOVER}


def test_a_second_recovery_is_refused() -> None:
    with pytest.raises(BusyError, match="recovered already"):
        advance(GateState.RECOVERING, GateEvent.BEGIN)


def test_the_document_shows_the_diagram_of_the_table() -> None:
    assert f"```mermaid\n{render_mermaid()}\n```" in DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.parametrize("render", [render_mermaid, render_dot])
def test_diagrams_have_every_transition(render: object) -> None:
    text = render()  # type: ignore[operator]
    for source, event in TRANSITIONS:
        line = next(line for line in text.splitlines() if event.value in line)
        assert source.value in text
        assert line.count(GateState.ACTIVE.value) + line.count(GateState.STANDBY.value) >= 1
    assert text.count("->") + text.count("-->") >= len(TRANSITIONS)
