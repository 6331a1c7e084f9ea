"""Who may touch which cluster: shared while I/O is under way, exclusive while its mapping changes.

Requests that complete inline need no lock, for nothing can run between their beginning and their
end; they only look whether the cluster is in `exclusive`.  Everything else enters as shared, or
takes the cluster exclusively for an allocation, a copy-on-write, a discard or a zeroing.  Waiters
are callbacks and are called in the order they came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import trio

Callback = Callable[[], None]


class ClusterLocks:
    """The locks of one volume; used from the event loop's thread only.

    `exclusive`: the clusters that are held exclusively (or wait to be, for their I/O to end), with
    what waits for each.  Look into it freely, change it only through the methods.
    """

    __slots__ = ("_draining", "_shared", "exclusive")

    def __init__(self) -> None:
        self.exclusive: dict[int, list[Callback]] = {}
        self._shared: dict[int, int] = {}
        self._draining: dict[int, Callback] = {}

    @property
    def idle(self) -> bool:
        """True if nothing is under way on any cluster."""
        return not self.exclusive and not self._shared

    def first_exclusive(self, first: int, stop: int) -> int | None:
        """The lowest cluster in [first, stop) that is held exclusively."""
        exclusive = self.exclusive
        if not exclusive:
            return None
        if stop - first <= len(exclusive):
            return next((cluster for cluster in range(first, stop) if cluster in exclusive), None)
        return min((cluster for cluster in exclusive if first <= cluster < stop), default=None)

    def enter(self, clusters: Iterable[int]) -> None:
        """Begin I/O on clusters of which none is exclusive."""
        shared = self._shared
        for cluster in clusters:
            shared[cluster] = shared.get(cluster, 0) + 1

    def leave(self, clusters: Iterable[int]) -> None:
        """End the I/O announced by `enter`."""
        for cluster in clusters:
            self.leave_one(cluster)

    def enter_one(self, cluster: int) -> None:
        """`enter` for a single cluster."""
        self._shared[cluster] = self._shared.get(cluster, 0) + 1

    def leave_one(self, cluster: int) -> None:
        """`leave` for a single cluster."""
        shared = self._shared
        count = shared[cluster] - 1
        if count:
            shared[cluster] = count
            return
        del shared[cluster]
        if self._draining:
            start = self._draining.pop(cluster, None)
            if start is not None:
                start()

    def wait(self, cluster: int, retry: Callback) -> None:
        """Call `retry` when `cluster`, which is exclusive, has been released."""
        self.exclusive[cluster].append(retry)

    def lock(self, cluster: int, start: Callback) -> None:
        """Take `cluster`, which is not exclusive; `start` is called when its I/O has ended."""
        self.exclusive[cluster] = []
        if cluster in self._shared:
            self._draining[cluster] = start
        else:
            start()

    def unlock(self, cluster: int) -> None:
        """Release `cluster`; what waited for it is tried again, in order."""
        for retry in self.exclusive.pop(cluster):
            retry()

    async def acquire(self, cluster: int) -> None:
        """Take `cluster` exclusively, after whoever has it now.

        Several clusters are to be taken in ascending order.
        """
        while cluster in self.exclusive:
            released = trio.Event()
            self.wait(cluster, released.set)
            await released.wait()
        if cluster in self._shared:
            drained = trio.Event()
            self.lock(cluster, drained.set)
            await drained.wait()
        else:
            self.exclusive[cluster] = []
