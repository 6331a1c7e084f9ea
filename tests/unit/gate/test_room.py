"""A storage without room: said once, and once when there is room again."""

from __future__ import annotations

import errno

import pytest

from ploopd.errors import StorageError
from ploopd.gate.events import Event
from ploopd.gate.filter import Gate
from scst_shim import QueueFlags, StandbyCheck
from tests.support.memory_device import MemoryDevice

CLUSTER = 1 << 20
SIZE = 8 * CLUSTER


class FullBench:
    """A gate over a thin device of eight clusters, of which the first is allocated."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.answers: list[StorageError | None] = []
        self.device = MemoryDevice(SIZE, cluster_size=CLUSTER)
        self.device.allocated.add(0)
        check = StandbyCheck()
        check.enable()
        self.gate = Gate(
            self.device,
            name="disk",
            fuses=QueueFlags("disk", check),
            clock=lambda: 0.0,
            on_event=self.events.append,
        )
        self.gate.bind()

    def kinds(self) -> list[str]:
        return [event.kind.value for event in self.events]

    def write(self, offset: int, *, fua: bool = False) -> None:
        self.gate.write(offset, memoryview(bytes(512)), self.answers.append, fua=fua)

    def fill(self, number: int = errno.ENOSPC) -> None:
        """Every allocation fails from now on; one has."""
        self.device.fail("write", number, start=CLUSTER, times=None)
        self.write(CLUSTER)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_many_failures_are_one_event_and_so_is_their_end(number: int) -> None:
    bench = FullBench()
    bench.fill(number)
    for cluster in range(2, 6):
        bench.write(cluster * CLUSTER)
    assert [error and error.errno for error in bench.answers] == [number] * 5
    assert bench.kinds() == ["space-exhausted"]
    assert bench.gate.full is bench.answers[-1]
    assert bench.gate.standby_text == "off"
    assert not bench.gate.read_only
    bench.device.heal()
    for cluster in range(6, 8):
        bench.write(cluster * CLUSTER)
    assert bench.kinds() == ["space-exhausted", "space-returned"]
    assert bench.gate.full is None
    assert bench.answers[-2:] == [None, None]


@pytest.mark.parametrize("inline", [True, False])
def test_what_needs_no_room_proves_nothing(inline: bool) -> None:
    bench = FullBench()
    bench.fill()
    gate, data = bench.gate, memoryview(bytes(512))
    if inline:
        assert gate.try_write(0, data) is True
        assert gate.try_read(CLUSTER, memoryview(bytearray(512))) is True
    else:
        bench.write(0)
    gate.flush(bench.answers.append)
    gate.discard(CLUSTER, CLUSTER, bench.answers.append)
    assert bench.kinds() == ["space-exhausted"]
    bench.device.heal()
    if inline:
        assert gate.try_write(3 * CLUSTER, data) is True
    else:
        bench.write(3 * CLUSTER)
    assert bench.kinds() == ["space-exhausted", "space-returned"]


def test_the_same_write_again_proves_it_also_where_the_map_shows_no_hole() -> None:
    bench = FullBench()
    bench.device.thin = False
    bench.fill()
    bench.write(0)
    assert bench.gate.full is not None
    bench.device.heal()
    bench.write(CLUSTER)
    assert bench.gate.full is None


@pytest.mark.parametrize("proof", ["flush", "fua"])
def test_a_flush_without_room_is_over_with_a_flush(proof: str) -> None:
    """Quota on network storage is often found out only when the data is written back."""
    bench = FullBench()
    bench.device.fail("flush", errno.EDQUOT, times=2)
    for _ in range(2):
        bench.gate.flush(bench.answers.append)
        bench.write(CLUSTER)
    assert bench.kinds() == ["space-exhausted"]
    if proof == "flush":
        bench.gate.flush(bench.answers.append)
    else:
        bench.write(0, fua=True)
    assert bench.kinds() == ["space-exhausted", "space-returned"]


def test_another_storage_has_room() -> None:
    bench = FullBench()
    bench.fill()
    bench.gate.begin_recovery()
    bench.gate.swap(MemoryDevice(SIZE, cluster_size=CLUSTER))
    bench.gate.leave_standby()
    assert bench.kinds() == ["space-exhausted", "space-returned", "recovered"]
