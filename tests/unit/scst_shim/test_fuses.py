"""The seed's semantics, literally: two fuses, three strings, warnings once."""

from __future__ import annotations

import logging

import pytest

from scst_shim import QueueFlags, StandbyCheck, StandbyState, Watcher, standby_state


def flags(*, key: bool = True, en: bool = True) -> tuple[QueueFlags, list[str]]:
    check = StandbyCheck()
    if key:
        check.enable()
    warnings: list[str] = []
    queue = QueueFlags("ploop0", check, warn=warnings.append)
    if en:
        queue.set_standby_en()
    return queue, warnings


@pytest.mark.parametrize("key", [False, True])
@pytest.mark.parametrize("en", [False, True])
@pytest.mark.parametrize("standby", [False, True])
def test_the_three_strings(key: bool, en: bool, standby: bool) -> None:
    text = str(standby_state(check=key, standby_en=en, standby=standby))
    wanted = ("on" if standby else "off") if key and en else "not supported"
    assert text == wanted


@pytest.mark.parametrize(("key", "en"), [(False, False), (False, True), (True, False)])
def test_with_a_fuse_off_nothing_is_touched(key: bool, en: bool) -> None:
    queue, _ = flags(key=key, en=en)
    assert not queue.supported
    assert queue.set_standby() is False
    assert queue.standby is False
    assert queue.state.value == "not supported"


def test_standby_is_set_and_cleared_on_the_edge_only() -> None:
    queue, warnings = flags()
    assert queue.state.value == "off"
    assert [queue.set_standby(), queue.set_standby()] == [True, False]
    assert queue.state.value == "on"
    assert [queue.clear_standby(), queue.clear_standby()] == [True, False]
    assert queue.state.value == "off"
    assert warnings == []


def test_en_without_the_key_is_warned_about_once() -> None:
    queue, warnings = flags(key=False, en=False)
    for _ in range(3):
        queue.set_standby_en()
        queue.clear_standby_en()
    assert len(warnings) == 1
    assert "device=ploop0" in warnings[0]
    assert "ploop_standby_check" in warnings[0]


def test_standby_left_behind_without_en_is_warned_about_once_and_may_be_cleared() -> None:
    queue, warnings = flags()
    queue.set_standby()
    for _ in range(2):
        queue.clear_standby_en()
        assert queue.state.value == "not supported"
        queue.set_standby_en()
        assert queue.state.value == "on"
    assert len(warnings) == 1
    assert "QUEUE_FLAG_STANDBY is set" in warnings[0]
    queue.clear_standby_en()
    assert queue.clear_standby() is True


def test_the_default_warning_goes_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        QueueFlags("ploop1", StandbyCheck()).set_standby_en()
    assert "ploop1" in caplog.text


def test_the_key_counts_its_users_and_reaches_every_queue() -> None:
    check = StandbyCheck()
    queues = [QueueFlags(f"ploop{n}", check, warn=lambda _: None) for n in range(2)]
    queues[0].set_standby_en()
    seen: list[StandbyState] = []
    queues[0].watcher.subscribe(seen.append)
    check.enable()
    check.enable()
    check.disable()
    assert [queue.state.value for queue in queues] == ["off", "not supported"]  # mixed mode
    check.disable()
    assert seen == [StandbyState.OFF, StandbyState.NOT_SUPPORTED]
    with pytest.raises(ValueError, match="not enabled"):
        check.disable()


def test_watchers_hear_of_changes_only_and_may_leave_while_being_told() -> None:
    watcher = Watcher(StandbyState.OFF)
    first: list[StandbyState] = []
    second: list[StandbyState] = []

    def leave(state: StandbyState) -> None:
        first.append(state)
        unsubscribe_first()
        unsubscribe_second()

    unsubscribe_first = watcher.subscribe(leave)
    unsubscribe_second = watcher.subscribe(second.append)
    assert watcher.update(StandbyState.OFF) is False
    assert watcher.update(StandbyState.ON) is True
    assert watcher.update(StandbyState.OFF) is True
    assert first == [StandbyState.ON]
    assert second == []
    assert watcher.state is StandbyState.OFF
    unsubscribe_first()


def test_nobody_hears_of_an_older_state_after_a_newer_one() -> None:
    """A callback may change the state again: the gate does when a fuse is put back in standby."""
    watcher = Watcher(StandbyState.NOT_SUPPORTED)
    seen: list[StandbyState] = []

    def answer(state: StandbyState) -> None:
        if state is StandbyState.OFF:
            watcher.update(StandbyState.ON)

    watcher.subscribe(answer)
    watcher.subscribe(seen.append)
    watcher.update(StandbyState.OFF)
    assert seen == [StandbyState.ON]
    assert watcher.state is StandbyState.ON
