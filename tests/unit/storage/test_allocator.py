"""The allocator never hands out what is in use, what is dirty or what a crash could share."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from ploopd.storage.allocator import Allocator

FIRST = 2


class AllocatorMachine(RuleBasedStateMachine):
    """Against sets of cluster numbers."""

    used = Bundle("used")

    def __init__(self) -> None:
        super().__init__()
        self.zero: set[int] = set()
        self.unknown = {4, 5, 9}
        self.in_use = {2, 3, 6, 7, 8, 10}
        self.pending: dict[int, bool] = {}
        self.syncing: dict[int, bool] | None = None
        self.allocator = Allocator(first=FIRST, end=11, holes=[(4, 2), (9, 1)])
        self.end = 11

    @rule(target=used)
    def take(self) -> int:
        host = self.allocator.take()
        if not self.zero:
            assert host == 0
            return 0
        assert host in self.zero
        self.zero.remove(host)
        self.in_use.add(host)
        return host

    @rule(count=st.integers(1, 5))
    def extend(self, count: int) -> None:
        self.allocator.extended(count)
        self.zero.update(range(self.end, self.end + count))
        self.end += count

    @rule(limit=st.integers(1, 4), works=st.booleans())
    def clean(self, limit: int, works: bool) -> None:
        runs = self.allocator.claim_unknown(limit)
        claimed = {host for start, count in runs for host in range(start, start + count)}
        assert claimed == set(sorted(self.unknown)[:limit])
        for start, count in runs:
            if works:
                self.allocator.add_zero(start, count)
            else:
                self.allocator.add_unknown(start, count)
        if works:
            self.unknown -= claimed
            self.zero |= claimed

    @rule(host=consumes(used), zeroed=st.booleans())
    def free(self, host: int, zeroed: bool) -> None:
        if host:
            self.allocator.free(host, zeroed=zeroed)
            self.in_use.remove(host)
            self.pending[host] = zeroed

    @rule(host=consumes(used))
    def give_back(self, host: int) -> None:
        if host:
            self.allocator.add_unknown(host, 1)
            self.in_use.remove(host)
            self.unknown.add(host)

    @rule()
    def begin_sync(self) -> None:
        if self.syncing is None:
            self.allocator.sync_begins()
            self.syncing, self.pending = self.pending, {}

    @rule(success=st.booleans())
    def end_sync(self, success: bool) -> None:
        if self.syncing is None:
            return
        self.allocator.sync_ended(success=success)
        freed, self.syncing = self.syncing, None
        if not success:
            self.pending |= freed
            return
        self.zero |= {host for host, zeroed in freed.items() if zeroed}
        self.unknown |= {host for host, zeroed in freed.items() if not zeroed}

    @invariant()
    def counts_agree(self) -> None:
        assert self.allocator.free_zero == len(self.zero)
        assert self.allocator.used == len(self.in_use)
        assert self.allocator.has_unknown == bool(self.unknown)
        assert self.allocator.has_pending == bool(self.pending or self.syncing)
        assert self.allocator.used_end() == max(self.in_use, default=FIRST - 1) + 1


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_lowest_cluster_first() -> None:
    allocator = Allocator(first=1, end=1)
    allocator.extended(6)
    taken = [allocator.take() for _ in range(3)]
    allocator.free(1, zeroed=True)
    allocator.sync_begins()
    allocator.sync_ended(success=True)
    assert (taken, allocator.take(), allocator.take()) == ([1, 2, 3], 1, 4)


def test_two_syncs_at_once_are_a_mistake() -> None:
    allocator = Allocator(first=1, end=1)
    allocator.sync_begins()
    with pytest.raises(ValueError, match="one sync"):
        allocator.sync_begins()


def test_withdrawn_clusters_are_never_used() -> None:
    allocator = Allocator(first=1, end=10, holes=[(2, 5), (8, 2)])
    allocator.withdraw({3, 9})
    runs = allocator.claim_unknown(100)
    assert runs == [(2, 1), (4, 3), (8, 1)]
    assert allocator.used_end() == 10


def test_what_was_withdrawn_is_used_neither_as_a_hole_nor_when_the_file_grows_over_it() -> None:
    allocator = Allocator(first=1, end=4, holes=[(1, 2)])
    allocator.withdraw([2, 5])
    assert allocator.claim_unknown(8) == [(1, 1)]
    allocator.extended(3)
    assert [allocator.take() for _ in range(3)] == [4, 6, 0]
    assert allocator.used_end() == 7
