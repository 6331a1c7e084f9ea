"""Release order: the fast map of ranges against the definition, pair by pair."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ploopd.gate.parking import CHANGING, Op, Request
from ploopd.gate.release import ReleaseOrder
from tests.support.memory_device import MemoryDevice


class Owner:
    """Requests need one; ordering does not."""

    def cancel(self, request: Request) -> bool:
        return False

    def finished(self, attempt: object, error: object) -> None: ...


def request(number: int, op: Op, offset: int, length: int) -> Request:
    return Request(Owner(), number, op, offset, length, None, lambda _: None, False, False, 0.0)


def conflict(one: Request, other: Request) -> bool:
    changing = one.op in CHANGING or other.op in CHANGING
    if Op.FLUSH in (one.op, other.op):
        return changing or one.op is other.op
    apart = one.offset + one.length <= other.offset or other.offset + other.length <= one.offset
    return changing and not apart


rows = st.tuples(st.sampled_from(list(Op)), st.integers(0, 14), st.integers(1, 6))


@settings(max_examples=300, deadline=None)
@given(st.lists(rows, max_size=16), st.data())
def test_a_request_is_ready_when_no_earlier_one_conflicts(
    script: list[tuple[Op, int, int]], data: st.DataObject
) -> None:
    order = ReleaseOrder()
    requests = [request(n, *row) for n, row in enumerate(script)]
    unfinished: list[Request] = []
    withdrawn: set[Request] = set()
    running: list[Request] = []
    for each in requests:
        order.add(each)
        unfinished.append(each)
    while unfinished:
        while order.ready:
            started = order.ready.popleft()
            if started not in withdrawn:
                running.append(started)
        expected = [
            each
            for each in unfinished
            if each not in withdrawn
            and not any(
                conflict(each, earlier)
                for earlier in unfinished
                if earlier.sequence < each.sequence and earlier not in withdrawn
            )
        ]
        missing = set(expected) - set(running)
        assert set(running) <= set(expected)  # never too early
        # A withdrawn request may hold back those behind it until those before it have ended.
        assert not missing or withdrawn
        waiting = [e for e in unfinished if e not in running and e not in withdrawn]
        if waiting and data.draw(st.booleans()):
            gone = data.draw(st.sampled_from(waiting))
            withdrawn.add(gone)
            order.withdraw(gone)
            continue
        if not running:
            assert all(each in withdrawn for each in unfinished)
            break
        finished = data.draw(st.sampled_from(running))
        running.remove(finished)
        unfinished.remove(finished)
        order.ended(finished)


def test_withdrawing_the_middle_one_does_not_let_the_last_overtake_the_first() -> None:
    order = ReleaseOrder()
    first, middle, last = (request(n, Op.WRITE, 0, 512) for n in range(3))
    for each in (first, middle, last):
        order.add(each)
    assert list(order.ready) == [first]
    order.ready.clear()
    order.withdraw(middle)
    assert not order.ready
    order.ended(first)
    assert list(order.ready) == [last]


def test_ten_thousand_requests_to_one_block_and_to_many_are_cheap() -> None:
    for span in (1, 5000):
        order = ReleaseOrder()
        requests = [request(n, Op.WRITE, n % span * 512, 512) for n in range(10_000)]
        for each in requests:
            order.add(each)
        ended = 0
        while order.ready:
            order.ended(order.ready.popleft())
            ended += 1
        assert ended == 10_000


def test_the_memory_device_is_what_the_other_tests_think() -> None:
    """The fake answers like a device: pending until told, faults by range."""
    device = MemoryDevice(1 << 20)
    errors: list[object] = []
    device.fail("write", 5, start=512, end=1024)
    device.write(0, memoryview(b"a" * 512), errors.append)
    device.write(512, memoryview(b"b" * 512), errors.append)
    assert [error is None for error in errors] == [True, False]
    assert bytes(device.data[:1024]) == b"a" * 512 + bytes(512)
