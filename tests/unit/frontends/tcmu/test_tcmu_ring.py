"""The shared memory: taking entries, answering in any order, and what must be refused."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ploopd.frontends.tcmu.ring import Command, Ring, RingError, TaskManagement
from tests.support.fake_tcmu import MAILBOX, FakeKernel

READ = bytes.fromhex("28000000000000000800")
INQUIRY = bytes.fromhex("120000002400")


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    fake = FakeKernel()
    yield fake
    fake.close()


@pytest.fixture
def ring(kernel: FakeKernel) -> Iterator[Ring]:
    ring = Ring(memoryview(kernel.memory))
    yield ring
    ring.close()


def test_a_command_is_copied_out_of_the_ring(kernel: FakeKernel, ring: Ring) -> None:
    kernel.piece = 1024
    command_id = kernel.command(READ, expect=4096)
    (command,) = ring.take()
    assert isinstance(command, Command)
    assert command.command_id == command_id
    assert command.cdb == READ.ljust(16, b"\0"), "padded with zeros, not with what follows"
    assert command.length == 4096
    assert len(command.iovs) == 4


def test_a_six_byte_cdb_has_no_rubbish_behind_it(kernel: FakeKernel, ring: Ring) -> None:
    kernel.command(INQUIRY, expect=36)
    (command,) = ring.take()
    assert isinstance(command, Command)
    assert command.cdb == INQUIRY.ljust(16, b"\0")


def test_of_a_variable_length_cdb_the_first_bytes_are_taken(kernel: FakeKernel, ring: Ring) -> None:
    cdb = bytes([0x7F, 0, 0, 0, 0, 0, 0, 0x18, 0, 9]).ljust(32, b"\1")
    kernel.command(cdb, expect=512)
    (command,) = ring.take()
    assert isinstance(command, Command)
    assert command.cdb == cdb[:16]


def test_answers_in_another_order_name_their_commands(kernel: FakeKernel, ring: Ring) -> None:
    ids = [kernel.command(READ, expect=512) for _ in range(3)]
    first, second, third = (c for c in ring.take() if isinstance(c, Command))
    for command, fill in ((third, b"c"), (first, b"a"), (second, b"b")):
        ring.scatter(command, fill * 512)
        ring.answer(command.command_id, 0)
    answers = kernel.harvest()
    assert [a.command_id for a in answers] == [ids[2], ids[0], ids[1]]
    assert [a.data for a in answers] == [b"c" * 512, b"a" * 512, b"b" * 512]
    assert ring.drained


def test_short_data_leaves_nothing_of_others(kernel: FakeKernel, ring: Ring) -> None:
    kernel.piece = 24
    kernel.command(INQUIRY, expect=100)
    (command,) = ring.take()
    assert isinstance(command, Command)
    assert ring.scatter(command, b"x" * 30) == 30
    ring.answer(command.command_id, 0, read_length=30)
    (answer,) = kernel.harvest()
    assert answer.data == b"x" * 30
    assert answer.read_length == 30


def test_without_read_length_the_rest_is_zeros() -> None:
    kernel = FakeKernel(flags=1)
    ring = Ring(memoryview(kernel.memory))
    kernel.command(INQUIRY, expect=100)
    (command,) = ring.take()
    assert isinstance(command, Command)
    ring.scatter(command, b"x" * 30)
    ring.answer(command.command_id, 0)
    assert kernel.harvest()[0].data == b"x" * 30 + bytes(70)
    ring.close()
    kernel.close()


def test_sense_is_padded(kernel: FakeKernel, ring: Ring) -> None:
    kernel.command(READ, expect=512)
    (command,) = ring.take()
    assert isinstance(command, Command)
    ring.answer(command.command_id, 2, b"\x70\0\5")
    (answer,) = kernel.harvest()
    assert answer.status == 2
    assert answer.sense == b"\x70\0\5".ljust(96, b"\0")


def test_task_management_names_ids_and_needs_no_answer(kernel: FakeKernel, ring: Ring) -> None:
    first = kernel.command(READ, expect=512)
    assert first is not None
    kernel.task_management(1, [first, 77])
    command, request = ring.take()
    assert request == TaskManagement(1, (first, 77))
    assert isinstance(command, Command)
    ring.answer(command.command_id, 0x40)
    assert not ring.drained, "the task management entry is still behind"
    ring.settle()
    assert ring.drained
    assert [a.status for a in kernel.harvest()] == [0x40]


def test_an_unknown_opcode_is_marked_and_passed(kernel: FakeKernel, ring: Ring) -> None:
    at = kernel.raw(struct.pack("=IHBB", 16 | 5, 0, 0, 0) + bytes(8))
    kernel.command(READ, expect=512)
    (command,) = ring.take()
    assert isinstance(command, Command)
    assert kernel.view[at + 7] == 1
    ring.answer(command.command_id, 0)
    assert len(kernel.harvest()) == 1


def test_a_new_ring_goes_on_at_the_tail(kernel: FakeKernel) -> None:
    first = Ring(memoryview(kernel.memory))
    kernel.command(READ, expect=512)
    (command,) = first.take()
    assert isinstance(command, Command)
    first.answer(command.command_id, 0)
    first.close()
    second_id = kernel.command(READ, expect=512)
    second = Ring(memoryview(kernel.memory))
    (command,) = second.take()
    assert isinstance(command, Command)
    assert command.command_id == second_id
    second.close()


def test_one_answer_too_many_is_refused(ring: Ring) -> None:
    with pytest.raises(RingError, match="none is outstanding"):
        ring.answer(1, 0)


@pytest.mark.parametrize(
    ("version", "start", "size"),
    [(1, 128, 3968), (2, 64, 3968), (2, 128, 1 << 30), (2, 128, 0), (2, 132, 4000)],
)
def test_an_impossible_mailbox_is_refused(version: int, start: int, size: int) -> None:
    memory = bytearray(1 << 16)
    struct.pack_into("=HHII", memory, 0, version, 15, start, size)
    with pytest.raises(RingError):
        Ring(memoryview(memory))


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(struct.pack("=IHBB", 0, 0, 0, 0), id="no length"),
        pytest.param(struct.pack("=IHBB", 8000, 0, 0, 0), id="past the end"),
        pytest.param(struct.pack("=IHBBI", 120 | 1, 1, 0, 0, 99).ljust(120, b"\0"), id="iovs"),
        pytest.param(
            struct.pack("=IHBBIIIIQ", 120 | 1, 1, 0, 0, 0, 0, 0, 0, 9999).ljust(120, b"\0"),
            id="CDB elsewhere",
        ),
        pytest.param(
            struct.pack("=IHBBIIII", 40 | 2, 0, 0, 0, 1, 500, 0, 0).ljust(40, b"\0"), id="ids"
        ),
    ],
)
def test_an_impossible_entry_is_refused(kernel: FakeKernel, ring: Ring, entry: bytes) -> None:
    at = MAILBOX + kernel.head
    kernel.view[at : at + len(entry)] = entry
    kernel.head = max(8, len(entry))
    with pytest.raises(RingError):
        list(ring.take())


def test_data_outside_of_the_data_area_is_not_touched(kernel: FakeKernel, ring: Ring) -> None:
    with pytest.raises(RingError):
        ring.piece(MAILBOX, 512)
    with pytest.raises(RingError):
        ring.piece(len(kernel.memory) - 100, 512)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_order_any_size_round_and_round(data: st.DataObject) -> None:
    """Entries of all kinds wrap around a small ring while answers come in any order."""
    size = data.draw(st.sampled_from([1024, 1272, 2048]))
    kernel = FakeKernel(ring_size=size, data_size=1 << 16)
    ring = Ring(memoryview(kernel.memory))
    waiting: dict[int, Command] = {}
    content: dict[int, bytes] = {}
    for step in range(data.draw(st.integers(10, 60))):
        action = data.draw(st.sampled_from(["read", "write", "tmr", "take", "answer", "answer"]))
        if action == "read":
            kernel.piece = data.draw(st.sampled_from([300, 4096]))
            kernel.command(READ, expect=data.draw(st.integers(1, 2000)))
        elif action == "write":
            payload = bytes([step]) * data.draw(st.integers(1, 900))
            command_id = kernel.command(READ, out=payload)
            if command_id is not None:
                content[command_id] = payload
        elif action == "tmr":
            kernel.task_management(1, data.draw(st.lists(st.integers(1, 9), max_size=5)))
        elif action == "take":
            for entry in ring.take():
                if isinstance(entry, Command):
                    waiting[entry.command_id] = entry
                    if entry.command_id in content:
                        assert ring.gather(entry) == content.pop(entry.command_id)
            ring.settle()
        elif waiting:
            command = waiting.pop(data.draw(st.sampled_from(sorted(waiting))))
            fill = bytes([command.command_id]) * command.length
            ring.scatter(command, fill)
            ring.answer(command.command_id, 0)
            ring.settle()
            (answer,) = kernel.harvest()
            assert answer.command_id == command.command_id
            assert answer.data in (fill, b"")
        assert ring.outstanding == len(waiting)
    if not waiting:
        list(ring.take())
    ring.close()
    kernel.close()
