"""Calls back when a queue's standby state changes (what poll on the sysfs attribute does)."""

from __future__ import annotations

from collections.abc import Callable

from scst_shim.states import StandbyState

StateCallback = Callable[[StandbyState], None]


class Watcher:
    """Remembers the last state shown and tells subscribers about every other one.

    Callbacks run at once, in the order of subscription, in the caller's thread; they must not
    raise.  One that unsubscribes (itself or another) while being told is safe, and so is one that
    changes the state again: nobody hears of the older state after the newer one.
    """

    __slots__ = ("_callbacks", "_state")

    def __init__(self, state: StandbyState) -> None:
        self._state = state
        self._callbacks: list[StateCallback] = []

    @property
    def state(self) -> StandbyState:
        """The state subscribers were told last."""
        return self._state

    def subscribe(self, callback: StateCallback) -> Callable[[], None]:
        """Call `callback(state)` on every change from now on; returns the way to stop that."""
        self._callbacks.append(callback)

        def unsubscribe() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return unsubscribe

    def update(self, state: StandbyState) -> bool:
        """Tell everybody if `state` is new; returns whether it was."""
        if state is self._state:
            return False
        self._state = state
        for callback in tuple(self._callbacks):
            if self._state is not state:
                break  # a callback has changed it, and everybody has been told
            if callback in self._callbacks:
                callback(state)
        return True
