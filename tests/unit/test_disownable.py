"""Blocking calls that are let go: deadlines, cancellation, late results."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import trio
import trio.testing

from ploopd.disownable import disownable
from ploopd.errors import ExitCode, PloopError


@pytest.mark.trio
async def test_the_result_and_the_error_of_a_call_that_returns() -> None:
    limiter = trio.CapacityLimiter(1)
    undone: list[int] = []

    def fail() -> int:
        raise PloopError("no")

    options = {"deadline": 5.0, "what": "it", "undo": undone.append, "limiter": limiter}
    assert await disownable(lambda: 7, **options) == 7  # type: ignore[arg-type]
    with pytest.raises(PloopError, match="no"):
        await disownable(fail, **options)  # type: ignore[arg-type]
    assert undone == []


@pytest.mark.trio
@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_call_that_hangs_is_let_go_and_its_late_result_undone_in_the_loop(
    cancelled: bool,
) -> None:
    release = threading.Event()
    undone = trio.Event()
    loop = threading.get_ident()
    seen: list[tuple[int, int]] = []

    def undo(value: int) -> None:
        seen.append((value, threading.get_ident()))
        undone.set()

    def hang() -> int:
        release.wait(30)
        return 7

    limiter = trio.CapacityLimiter(1)
    if cancelled:
        with trio.move_on_after(0.02) as scope:
            await disownable(hang, deadline=30.0, what="it", undo=undo, limiter=limiter)
        assert scope.cancelled_caught
    else:
        with pytest.raises(PloopError, match=r"it took longer than 0.02 s") as caught:
            await disownable(hang, deadline=0.02, what="it", undo=undo, limiter=limiter)
        assert caught.value.exit_code is ExitCode.TIMEOUT
    assert seen == []
    release.set()
    with trio.fail_after(5):
        await undone.wait()
    assert seen == [(7, loop)]


def test_a_result_that_comes_after_the_loop_has_ended_harms_nobody() -> None:
    release, returned = threading.Event(), threading.Event()
    undone: list[int] = []

    def hang() -> int:
        release.wait(30)
        returned.set()
        return 7

    async def main() -> None:
        limiter = trio.CapacityLimiter(1)
        with trio.move_on_after(0.02):
            await disownable(hang, deadline=9.0, what="it", undo=undone.append, limiter=limiter)

    trio.run(main)
    release.set()
    assert returned.wait(5)
    assert undone == []


@pytest.mark.trio
async def test_calls_that_hang_do_not_keep_others_from_their_turn() -> None:
    limiter = trio.CapacityLimiter(1)
    release = threading.Event()
    ended = [trio.Event() for _ in range(3)]

    async def call(blocking: Callable[[], object], deadline: float, number: int = 0) -> object:
        return await disownable(
            blocking,
            deadline=deadline,
            what="it",
            undo=lambda _: ended[number].set(),
            limiter=limiter,
        )

    for number in range(3):
        with pytest.raises(PloopError, match="longer"):
            await call(lambda: release.wait(30), 0.02, number)
    assert await call(lambda: "healthy", 5.0) == "healthy"
    release.set()
    with trio.fail_after(5):
        for each in ended:
            await each.wait()
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert (limiter.total_tokens, limiter.borrowed_tokens) == (1, 0)


@pytest.mark.trio
async def test_a_late_error_gives_the_turn_back() -> None:
    limiter = trio.CapacityLimiter(1)
    release = threading.Event()

    def hang() -> int:
        release.wait(30)
        raise PloopError("late")

    with pytest.raises(PloopError, match="longer"):
        await disownable(hang, deadline=0.02, what="it", undo=lambda _: None, limiter=limiter)
    assert limiter.total_tokens == 2
    release.set()
    with trio.fail_after(5):
        while limiter.borrowed_tokens or limiter.total_tokens > 1:  # noqa: ASYNC110
            await trio.sleep(0.01)
