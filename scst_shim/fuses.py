"""The two fuses of the standby contract: a global key and a bit per queue.

`StandbyCheck` is the static key `ploop_standby_check`: a front end's start enables it.
`QueueFlags` are a queue's QUEUE_FLAG_STANDBY_EN, set when the device is added to a front end and
cleared when it is removed, and QUEUE_FLAG_STANDBY.  Setting EN is the promise to clear STANDBY when
the device recovers.  With one fuse off nothing is touched; a contradiction is warned about once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import Enum
from weakref import WeakSet

from scst_shim.states import StandbyState, standby_state
from scst_shim.watcher import Watcher

_log = logging.getLogger(__name__)

Warn = Callable[[str], None]


class StandbyCheck:
    """The global key.  Counts its users, as a static key does: on while there is one."""

    def __init__(self) -> None:
        self._users = 0
        self._queues: WeakSet[QueueFlags] = WeakSet()

    @property
    def enabled(self) -> bool:
        """Whether the STANDBY flag is looked at at all."""
        return self._users > 0

    def enable(self) -> None:
        """A front end that handles standby has started."""
        self._users += 1
        if self._users == 1:
            self._changed()

    def disable(self) -> None:
        """That front end has stopped.  Raises `ValueError` if none was running."""
        if self._users == 0:
            raise ValueError("the standby check is not enabled")
        self._users -= 1
        if self._users == 0:
            self._changed()

    def _attach(self, queue: QueueFlags) -> None:
        self._queues.add(queue)

    def _changed(self) -> None:
        for queue in tuple(self._queues):
            queue.refresh()


class Mismatch(Enum):
    """The contradictions that are warned about."""

    EN_WITHOUT_KEY = "QUEUE_FLAG_STANDBY_EN is set while the key ploop_standby_check is off"
    STANDBY_WITHOUT_EN = "QUEUE_FLAG_STANDBY is set while QUEUE_FLAG_STANDBY_EN is off"


class QueueFlags:
    """The standby flags of one device's queue.

    `warn(text)` is called once per kind of contradiction; it logs by default.
    """

    def __init__(self, name: str, check: StandbyCheck, *, warn: Warn | None = None) -> None:
        self.name = name
        self._check = check
        self._standby_en = False
        self._standby = False
        self._warned: set[Mismatch] = set()
        self._warn = warn or (lambda text: _log.warning("%s", text))
        self.watcher = Watcher(self.state)
        check._attach(self)

    @property
    def supported(self) -> bool:
        """Whether both fuses are on."""
        return self._standby_en and self._check.enabled

    @property
    def standby_en(self) -> bool:
        """QUEUE_FLAG_STANDBY_EN."""
        return self._standby_en

    @property
    def standby(self) -> bool:
        """QUEUE_FLAG_STANDBY, whatever the fuses say."""
        return self._standby

    @property
    def state(self) -> StandbyState:
        """What the `standby` attribute reads."""
        return standby_state(
            check=self._check.enabled, standby_en=self._standby_en, standby=self._standby
        )

    def set_standby_en(self) -> None:
        """The device was added to a front end, which promises to clear STANDBY on recovery."""
        self._standby_en = True
        self.refresh()

    def clear_standby_en(self) -> None:
        """The device was removed from the last front end."""
        self._standby_en = False
        self.refresh()

    def set_standby(self) -> bool:
        """Switch the queue to standby; True on the change from off to on.

        Does nothing, and says False, while a fuse is off.
        """
        if not self.supported or self._standby:
            return False
        self._standby = True
        self.refresh()
        return True

    def clear_standby(self) -> bool:
        """The device has recovered; True on the change from on to off.

        Clears the flag with a fuse off as well: a flag left behind by a front end that went away
        would be a contradiction for ever.
        """
        if not self._standby:
            return False
        self._standby = False
        self.refresh()
        return True

    def refresh(self) -> None:
        """Look at the flags: warn about a contradiction, tell the watchers about a new state."""
        if self._standby_en and not self._check.enabled:
            self._mismatch(Mismatch.EN_WITHOUT_KEY)
        if self._standby and not self._standby_en:
            self._mismatch(Mismatch.STANDBY_WITHOUT_EN)
        self.watcher.update(self.state)

    def _mismatch(self, kind: Mismatch) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self._warn(f"device={self.name} standby flags contradict each other: {kind.value}")
