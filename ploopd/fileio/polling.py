"""Whether to look for input a little longer before sleeping.

To sleep and to be woken costs more than a command: a system call to wait, an interrupt to another
processor, a turn of the scheduler.  An initiator that answers at once has its next command there
before that is over.  So a reader that has run out of input tries again for a moment, as hypervisors
do with processors that halt, and stops doing so where it does not pay.
"""

from __future__ import annotations

from typing import Final

WINDOW: Final = 100e-6
"""Seconds to try: about what sleeping and being woken costs on a quiet virtual machine."""

MOST_SKIPPED: Final = 1024
"""How many waits in a row go without trying, at most, where trying is in vain."""


class AdaptivePoll:
    """The decision for one connection; it knows no clock and no socket.

    `wanted()` is asked once for every wait.  After a try, `ended(found)` tells whether input came.
    Each try in vain doubles the number of waits before the next one.
    """

    __slots__ = ("_penalty", "_skip")

    def __init__(self) -> None:
        self._skip = 0
        self._penalty = 1

    def wanted(self) -> bool:
        if self._skip:
            self._skip -= 1
            return False
        return True

    def ended(self, found: bool) -> None:
        if found:
            self._penalty = 1
            return
        self._skip = self._penalty
        self._penalty = min(2 * self._penalty, MOST_SKIPPED)
