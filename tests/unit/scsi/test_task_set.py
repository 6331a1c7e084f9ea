"""Task attributes: what waits for what."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ploopd.scsi.task import Attribute, Task
from tests.support.memory_device import Completion
from tests.unit.scsi.harness import BLOCK, INITIATOR, caw, cdb10, make_bench


def offsets(bench: object) -> list[int]:
    return [o.offset // BLOCK for o in bench.device.outstanding]  # type: ignore[attr-defined]


def test_simple_tasks_run_at_once() -> None:
    bench = make_bench(completion=Completion.MANUAL)
    host = bench.login()
    for lba in range(3):
        host.start(cdb10(0x28, lba, 1))
    assert offsets(bench) == [0, 1, 2]


def test_ordered_waits_for_earlier_and_holds_later_ones() -> None:
    bench = make_bench(completion=Completion.MANUAL)
    host, other = bench.login(), bench.login(INITIATOR + "2")
    host.start(cdb10(0x28, 0, 1))
    other.start(cdb10(0x28, 1, 1))
    host.start(cdb10(0x28, 2, 1), attribute=Attribute.ORDERED)
    host.start(cdb10(0x28, 3, 1))
    other.start(cdb10(0x28, 4, 1))
    host.start(cdb10(0x28, 5, 1), attribute=Attribute.HEAD_OF_QUEUE)
    assert offsets(bench) == [0, 1, 5]
    bench.device.complete(1)
    assert offsets(bench) == [1, 5]
    bench.device.complete(1)
    assert offsets(bench) == [5, 2], "an ORDERED task waits for what came before it only"
    bench.device.complete(1)
    assert offsets(bench) == [2]
    bench.device.complete(1)
    assert offsets(bench) == [3, 4]


def test_ordered_tasks_among_themselves() -> None:
    bench = make_bench(completion=Completion.MANUAL)
    host = bench.login()
    for lba in range(4):
        host.start(cdb10(0x28, lba, 1), attribute=Attribute.ORDERED)
    seen = []
    while bench.device.outstanding:
        assert len(bench.device.outstanding) == 1
        seen += offsets(bench)
        bench.device.complete(1)
    assert seen == [0, 1, 2, 3]


def test_many_waiting_tasks_do_not_nest() -> None:
    bench = make_bench(completion=Completion.AT_ONCE)
    host = bench.login()
    bench.device.completion = Completion.MANUAL
    host.start(cdb10(0x28, 0, 1))
    for lba in range(3000):
        host.start(cdb10(0x28, lba, 1), attribute=Attribute.ORDERED)
    bench.device.completion = Completion.AT_ONCE
    bench.device.complete(1)
    assert len(bench.unit.tasks) == 0
    assert [task.tag for task in host.finished] == sorted(task.tag for task in host.finished)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 1, 1, 2, 3]), st.booleans(), st.integers(0, 3)),
        max_size=30,
    ),
    st.randoms(use_true_random=False),
)
def test_every_task_ends_and_order_holds(
    commands: list[tuple[int, bool, int]], random: object
) -> None:
    """No mixture of attributes and exclusive ranges deadlocks or breaks the rules of SAM-5."""
    bench = make_bench(1 << 20, completion=Completion.MANUAL)
    host = bench.login()
    started: list[Task] = []
    for attribute, exclusive, lba in commands:
        command = caw(lba, 2) if exclusive else cdb10(0x2A, lba, 2)
        started.append(host.start(command, bytes(2048), attribute=attribute))
        if bench.device.outstanding and random.random() < 0.3:  # type: ignore[attr-defined]
            bench.device.complete(1, index=random.randrange(len(bench.device.outstanding)))  # type: ignore[attr-defined]
    while bench.device.outstanding:
        bench.device.complete(1, index=random.randrange(len(bench.device.outstanding)))  # type: ignore[attr-defined]
    ends = {task.tag: index for index, task in enumerate(host.finished)}
    for early in started:
        assert early.status == 0
        for late in started:
            if late.tag <= early.tag or late.attribute == Attribute.HEAD_OF_QUEUE:
                continue
            if Attribute.ORDERED in (late.attribute, early.attribute):
                assert ends[early.tag] < ends[late.tag]
    assert bench.unit.tasks.quiet
