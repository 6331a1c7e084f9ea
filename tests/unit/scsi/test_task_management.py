"""Task management: an answer means that every affected task has ended."""

from __future__ import annotations

import pytest

from ploopd.scsi.task import Task, TaskState
from ploopd.scsi.task_management import TaskFunction, TmfResult
from tests.support.memory_device import Completion, pattern
from tests.unit.scsi.harness import (
    BLOCK,
    INITIATOR,
    Bench,
    Initiator,
    ManualClock,
    caw,
    cdb,
    cdb10,
    cdb16,
    make_bench,
)

WRITE = cdb10(0x2A, 0, 1)
DATA = pattern(BLOCK, 1)
DONE = [TmfResult.COMPLETE]


def manual() -> tuple[Bench, Initiator, Initiator]:
    bench = make_bench(completion=Completion.MANUAL)
    return bench, bench.login(), bench.login(INITIATOR + "2")


def assert_aborted(host: Initiator, task: Task) -> None:
    assert task not in host.finished
    assert host.aborted.count(task) == 1
    assert task.state is TaskState.ABORTED
    assert task.tag not in host.nexus.tasks


def test_a_parked_write_is_dropped() -> None:
    bench, host, _ = manual()
    task = host.start(WRITE, DATA)
    assert host.manage(TaskFunction.ABORT_TASK, task.tag) == DONE
    assert_aborted(host, task)
    bench.device.complete()
    assert not any(bench.device.data[:BLOCK])
    assert len(bench.unit.tasks) == 0


def test_an_executing_write_is_awaited() -> None:
    bench, host, _ = manual()
    bench.device.cancellable = False
    task = host.start(WRITE, DATA)
    answers = host.manage(TaskFunction.ABORT_TASK, task.tag)
    again = host.manage(TaskFunction.LOGICAL_UNIT_RESET)
    assert answers == again == host.aborted == []
    bench.device.complete()
    assert answers == again == DONE
    assert_aborted(host, task)
    assert bytes(bench.device.data[:BLOCK]) == DATA


def test_a_read_gives_its_buffer_back() -> None:
    bench, host, _ = manual()
    task = host.start(cdb10(0x28, 0, 8))
    assert len(bench.buffers.out) == 1
    host.manage(TaskFunction.ABORT_TASK, task.tag)
    assert_aborted(host, task)
    assert bench.buffers.out == []


def test_a_task_that_still_gathers_its_data() -> None:
    bench, host, _ = manual()
    task = Task(
        tag=77,
        lun=0,
        cdb=WRITE,
        on_complete=host.finished.append,
        on_aborted=host.aborted.append,
        expected_out=BLOCK,
    )
    assert host.nexus.prepare(task)
    assert task.data_out_length == BLOCK
    assert host.manage(TaskFunction.QUERY_TASK, 77) == [TmfResult.SUCCEEDED]
    assert host.manage(TaskFunction.ABORT_TASK, 77) == DONE
    assert_aborted(host, task)
    task.data_out = memoryview(DATA)
    host.nexus.execute(task)
    assert bench.device.outstanding == []


def test_no_such_task() -> None:
    _, host, other = manual()
    task = host.start(WRITE, DATA)
    assert host.manage(TaskFunction.ABORT_TASK, 4711) == [TmfResult.NO_TASK]
    assert host.manage(TaskFunction.ABORT_TASK) == [TmfResult.NO_TASK]
    other.tag = 0
    assert other.manage(TaskFunction.ABORT_TASK, task.tag) == [TmfResult.NO_TASK]
    assert host.aborted == []


def test_no_such_lun() -> None:
    _, host, _ = manual()
    for function in (
        TaskFunction.ABORT_TASK_SET,
        TaskFunction.CLEAR_TASK_SET,
        TaskFunction.LOGICAL_UNIT_RESET,
        TaskFunction.QUERY_TASK_SET,
    ):
        assert host.manage(function, lun=9) == [TmfResult.NO_LUN]


def test_functions_that_do_not_exist_here() -> None:
    _, host, _ = manual()
    assert host.manage(TaskFunction.CLEAR_ACA) == [TmfResult.NOT_SUPPORTED]
    assert host.manage(TaskFunction.QUERY_ASYNCHRONOUS_EVENT) == [TmfResult.NOT_SUPPORTED]
    assert host.manage(TaskFunction.TASK_REASSIGN) == [TmfResult.REASSIGNMENT_NOT_SUPPORTED]


def test_abort_task_set_is_for_ones_own() -> None:
    bench, host, other = manual()
    mine, theirs = host.start(WRITE, DATA), other.start(WRITE, DATA)
    assert host.manage(TaskFunction.ABORT_TASK_SET) == DONE
    assert_aborted(host, mine)
    bench.device.complete()
    assert other.finished[-1] is theirs
    assert other.send(cdb("00")).status == 0


def test_clear_task_set_is_for_all() -> None:
    _, host, other = manual()
    third = _.login(INITIATOR + "3")
    mine, theirs = host.start(WRITE, DATA), other.start(WRITE, DATA)
    assert host.manage(TaskFunction.CLEAR_TASK_SET) == DONE
    assert_aborted(host, mine)
    assert_aborted(other, theirs)
    assert host.send(cdb("00")).status == 0
    assert other.send(cdb("00")).sense == (6, 0x2F00)
    assert third.send(cdb("00")).status == 0


@pytest.mark.parametrize(
    "function",
    [
        TaskFunction.LOGICAL_UNIT_RESET,
        TaskFunction.TARGET_WARM_RESET,
        TaskFunction.TARGET_COLD_RESET,
    ],
)
def test_resets(function: TaskFunction) -> None:
    bench, host, other = manual()
    bench.device.cancellable = False
    mine, theirs = host.start(WRITE, DATA), other.start(cdb10(0x28, 0, 1))
    answers = host.manage(function)
    bench.device.complete(1)
    assert answers == []
    bench.device.complete(1)
    assert answers == DONE
    assert_aborted(host, mine)
    assert_aborted(other, theirs)
    assert bench.buffers.out == []
    assert host.send(cdb("00")).sense == (6, 0x2903)
    assert other.send(cdb("00")).sense == (6, 0x2903)


def test_i_t_nexus_reset() -> None:
    _, host, other = manual()
    mine, theirs = host.start(WRITE, DATA), other.start(WRITE, DATA)
    assert host.manage(TaskFunction.I_T_NEXUS_RESET) == DONE
    assert_aborted(host, mine)
    assert host.send(cdb("00")).sense == (6, 0x2907)
    assert theirs.state is TaskState.RUNNING


def test_queries() -> None:
    bench, host, other = manual()
    task = host.start(WRITE, DATA)
    assert host.manage(TaskFunction.QUERY_TASK, task.tag) == [TmfResult.SUCCEEDED]
    assert host.manage(TaskFunction.QUERY_TASK_SET) == [TmfResult.SUCCEEDED]
    assert other.manage(TaskFunction.QUERY_TASK_SET) == DONE
    bench.device.complete()
    assert host.manage(TaskFunction.QUERY_TASK, task.tag) == DONE
    assert host.manage(TaskFunction.QUERY_TASK_SET) == DONE


def test_a_long_command_stops_between_two_steps() -> None:
    bench, host, _ = manual()
    bench.device.cancellable = False
    task = host.start(cdb16(0x93, 0, 8192), DATA)
    bench.device.complete(1)
    answers = host.manage(TaskFunction.ABORT_TASK, task.tag)
    assert answers == []
    bench.device.complete()
    assert answers == DONE
    assert_aborted(host, task)
    assert bytes(bench.device.data[: 2 << 20]) == DATA * 4096
    assert not any(bench.device.data[2 << 20 :])
    assert bench.buffers.out == []


def test_a_command_that_gave_way_stops_at_once() -> None:
    later: list[object] = []
    bench = make_bench(clock=ManualClock(step=0.01), defer=later.append)
    host = bench.login()
    task = host.start(cdb16(0x93, 0, 8192), DATA)
    assert len(later) == 1
    assert host.manage(TaskFunction.ABORT_TASK, task.tag) == DONE
    assert_aborted(host, task)
    written = len(bench.device.log)
    later.pop()()  # type: ignore[operator]
    assert len(bench.device.log) == written
    assert later == bench.buffers.out == []


def test_compare_and_write_aborted_before_its_write() -> None:
    bench, host, _ = manual()
    task = host.start(caw(0, 1), bytes(BLOCK) + DATA)
    bench.device.complete(1)
    assert [o.op for o in bench.device.outstanding] == ["write"]
    assert host.manage(TaskFunction.ABORT_TASK, task.tag) == DONE
    assert_aborted(host, task)
    bench.device.complete()
    assert not any(bench.device.data[:BLOCK])
    assert bench.buffers.out == []
    itl = host.nexus.itl(0)
    assert itl is not None
    assert itl.read_range(cdb10(0x28, 0, 1)) is not None


def test_an_abort_lets_waiting_tasks_start() -> None:
    bench, host, _ = manual()
    swap = host.start(caw(0, 1), bytes(BLOCK) + DATA)
    read = host.start(cdb10(0x28, 0, 1))
    host.manage(TaskFunction.ABORT_TASK, swap.tag)
    bench.device.complete()
    assert host.finished[-1] is read


def test_waiting_tasks_of_a_set_are_aborted_unstarted() -> None:
    bench, host, _ = manual()
    tasks = [host.start(caw(0, 1), bytes(BLOCK) + DATA) for _ in range(3)]
    assert host.manage(TaskFunction.ABORT_TASK_SET) == DONE
    assert bench.device.log == bench.device.outstanding == []
    for task in tasks:
        assert_aborted(host, task)


def test_closing_a_nexus_aborts_its_tasks() -> None:
    bench, host, other = manual()
    bench.device.cancellable = False
    mine, theirs = host.start(WRITE, DATA), other.start(WRITE, DATA)
    closed: list[bool] = []
    host.nexus.close(lambda: closed.append(True))
    assert bench.target.nexuses == [other.nexus]
    assert [itl.nexus for itl in bench.unit.itls] == [other.nexus]
    assert closed == []
    bench.device.complete()
    assert closed == [True]
    assert_aborted(host, mine)
    assert other.finished[-1] is theirs
    assert host.nexus.itl(0) is None
    host.nexus.close()


def test_task_set_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ploopd.scsi.nexus.QUEUE_LIMIT", 2)
    bench, host, _ = manual()
    host.start(WRITE, DATA)
    host.start(WRITE, DATA)
    task = host.start(WRITE, DATA)
    assert host.finished[-1] is task
    assert task.status == 0x28
    bench.device.complete()
    host.start(WRITE, DATA)
    assert len(bench.device.outstanding) == 1
