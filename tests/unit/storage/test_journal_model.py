"""A storage that loses what it was not told to keep, against a model of what was acknowledged.

The storage under the journal keeps for certain only what a flush that succeeded covers, and what
was written with FUA; of everything else, any part may be there after a failure.  Whatever happens,
after a replay the disk has every acknowledged change, in order.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from functools import partial

import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ploopd.errors import StorageError
from ploopd.storage.device import Done, Extent, Pending
from ploopd.storage.journal import Journal
from ploopd.storage.journaled import JournaledDevice
from ploopd.storage.replay import replay

BLOCK = 512
BLOCKS = 8
SIZE = BLOCK * BLOCKS
LIMIT = 4000
OPS = ("write", "fua", "zero", "discard")
PICK = st.integers(0, 63)


class Started:
    """An operation that the storage has not executed."""

    def __init__(self, storage: LossyStorage, act: Callable[[], None], done: Done) -> None:
        self.storage = storage
        self.act = act
        self.done = done

    def cancel(self) -> bool:
        if self not in self.storage.outstanding:
            return False
        self.storage.outstanding.remove(self)
        return True


class LossyStorage:
    """A BlockDevice with a volatile cache; slow operations are executed one by one, by `step`."""

    def __init__(self, content: bytes) -> None:
        self.size = SIZE
        self.cluster_size = SIZE
        self.read_only = False
        self.data = bytearray(content)
        self.stable = bytes(content)
        self.log: list[tuple[int, bytes, bool]] = []  # offset, data, durable by itself
        self.durable = 0
        self.failed_sync = False
        self.outstanding: list[Started] = []
        self.busy = False  # try_write says "not now"

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        buffer[:] = self.data[offset : offset + len(buffer)]
        return True

    def try_write(self, offset: int, buffer: memoryview) -> bool:
        if not self.busy:
            self._apply(offset, bytes(buffer), False)
        return not self.busy

    def read(self, offset: int, buffer: memoryview, done: Done) -> Pending:
        return self._start(lambda: None, done)

    def write(self, offset: int, buffer: memoryview, done: Done, *, fua: bool = False) -> Pending:
        return self._start(lambda: self._apply(offset, bytes(buffer), fua), done)

    def write_zeroes(
        self, offset: int, length: int, done: Done, *, unmap: bool = False, fua: bool = False
    ) -> Pending:
        return self._start(lambda: self._apply(offset, bytes(length), fua), done)

    def discard(self, offset: int, length: int, done: Done) -> Pending:
        return self._start(lambda: self._apply(offset, bytes(length), False), done)

    def flush(self, done: Done) -> Pending:
        covered = len(self.log)  # not a write that ends later

        def sync() -> None:
            if self.failed_sync:
                raise StorageError(errno.EIO, "fdatasync")
            self.durable = max(self.durable, covered)

        return self._start(sync, done)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return iter(())

    def kick(self) -> None:
        pass

    def _start(self, act: Callable[[], None], done: Done) -> Pending:
        started = Started(self, act, done)
        self.outstanding.append(started)
        return started

    def _apply(self, offset: int, data: bytes, durable: bool) -> None:
        self.data[offset : offset + len(data)] = data
        self.log.append((offset, data, durable))

    def step(self, index: int, error: int = 0, *, applied: bool = False) -> None:
        """Execute an operation, or fail it, with or without its effect."""
        started = self.outstanding.pop(index)
        answer = StorageError(error, "write") if error else None
        if not error or applied:
            try:
                started.act()
            except StorageError as failure:
                answer = failure
        started.done(answer)

    def after_loss(self, chance: random.Random) -> bytes:
        """What a failure leaves: everything durable, and any part of the rest."""
        left = bytearray(self.stable)
        for index, (offset, data, durable) in enumerate(self.log):
            if durable or index < self.durable or chance.random() < 0.5:
                keep = len(data)
                if index >= self.durable and not durable and chance.random() < 0.3:
                    keep = chance.randrange(0, keep + BLOCK, BLOCK)  # torn
                left[offset : offset + keep] = data[:keep]
        return bytes(left)


class JournalMachine(RuleBasedStateMachine):
    """The layer above never has overlapping changes in execution together, as the gate does not.

    `expected` is what the disk must read as; a change in execution may or may not have happened,
    and is executed again after a replay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.journal = Journal(LIMIT)
        self.storage = LossyStorage(bytes(SIZE))
        self.failures: list[StorageError] = []
        self.device = JournaledDevice(self.storage, self.journal, self.failures.append)
        self.expected = bytearray(SIZE)
        self.unknown: set[int] = set()  # blocks of a change that failed: old or new
        self.running: dict[int, tuple[int, bytes, Pending]] = {}
        self.serial = 0

    def free(self, offset: int, length: int) -> bool:
        return all(
            offset + length <= other or other + len(data) <= offset
            for other, data, _ in self.running.values()
        )

    def content(self, length: int) -> bytes:
        self.serial += 1
        return self.serial.to_bytes(4, "big") * (length // 4)

    def acknowledged(self, offset: int, data: bytes) -> None:
        self.expected[offset : offset + len(data)] = data
        first = offset // BLOCK
        self.unknown.difference_update(range(first, first + len(data) // BLOCK))

    def begin(self, offset: int, data: bytes, start: Callable[[Done], Pending]) -> None:
        key = self.serial = self.serial + 1
        ended: list[StorageError | None] = []

        def done(error: StorageError | None) -> None:
            assert not ended, "answered twice"
            ended.append(error)
            self.running.pop(key, None)
            if error is None:
                self.acknowledged(offset, data)
            else:
                first = offset // BLOCK
                self.unknown.update(range(first, first + len(data) // BLOCK))

        pending = start(done)
        if not ended:
            self.running[key] = (offset, data, pending)

    @rule(first=st.integers(0, BLOCKS - 1), count=st.integers(1, 6))
    def write_inline(self, first: int, count: int) -> None:
        offset, length = first * BLOCK, min(count, BLOCKS - first) * BLOCK
        data = self.content(length)
        if self.free(offset, length) and self.device.try_write(offset, memoryview(data)):
            self.acknowledged(offset, data)

    @rule(
        op=st.sampled_from(OPS),
        first=st.integers(0, BLOCKS - 1),
        count=st.integers(1, BLOCKS),
    )
    def change_slowly(self, op: str, first: int, count: int) -> None:
        offset, length = first * BLOCK, min(count, BLOCKS - first) * BLOCK
        if not self.free(offset, length):
            return
        data = self.content(length) if op in ("write", "fua") else bytes(length)

        def start(done: Done) -> Pending:
            if op == "zero":
                return self.device.write_zeroes(offset, length, done, unmap=False)
            if op == "discard":
                return self.device.discard(offset, length, done)
            return self.device.write(offset, memoryview(data), done, fua=op == "fua")

        self.begin(offset, data, start)

    @rule()
    def flush(self) -> None:
        self.device.flush(lambda _: None)

    @precondition(lambda self: self.running)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        if self.running:
            key = sorted(self.running)[pick % len(self.running)]
            if self.running[key][2].cancel():
                self.running.pop(key, None)

    @precondition(lambda self: self.storage.outstanding)
    @rule(pick=PICK)
    def execute(self, pick: int) -> None:
        if self.storage.outstanding:
            self.storage.step(pick % len(self.storage.outstanding))

    @precondition(lambda self: self.storage.outstanding)
    @rule(pick=PICK, applied=st.booleans())
    def fail(self, pick: int, applied: bool) -> None:
        if self.storage.outstanding:
            index = pick % len(self.storage.outstanding)
            self.storage.step(index, errno.EIO, applied=applied)

    @rule()
    def busy(self) -> None:
        self.storage.busy = not self.storage.busy

    @rule()
    def syncs_fail(self) -> None:
        self.storage.failed_sync = True

    @rule(seed=st.integers(0, 1 << 16))
    def lose(self, seed: int) -> None:
        """The storage has lost what is not stable, and has not said so yet; its next sync will."""
        self.storage.data[:] = self.storage.after_loss(random.Random(seed))
        self.storage.failed_sync = True

    @rule(seed=st.integers(0, 1 << 16), dies=st.booleans())
    def replace(self, seed: int, dies: bool) -> None:
        """The storage is lost, and what is left of it is served; perhaps not at the first try."""
        left = self.storage.after_loss(random.Random(seed))
        again = [(offset, data) for offset, data, _ in self.running.values()]
        self.running.clear()
        if dies:
            self.replay_fails(LossyStorage(left))
        self.device.retire()
        new = LossyStorage(left)
        trio.run(self.replay_into, new)
        assert new.durable == len(new.log)
        self.storage = new
        self.journal.clear()
        self.device = JournaledDevice(new, self.journal, self.failures.append)
        for offset, data in again:  # in part or wholly there
            first = offset // BLOCK
            self.unknown.update(range(first, first + len(data) // BLOCK))
        self.check(new.data)
        for offset, data in again:
            self.begin(offset, data, partial(self.device.write, offset, memoryview(data)))

    def replay_fails(self, storage: LossyStorage) -> None:
        storage.failed_sync = True
        records = list(self.journal.records())
        if records:
            try:
                trio.run(self.replay_into, storage)
            except StorageError:
                pass
            else:
                raise AssertionError("a replay without a sync has succeeded")
        assert list(self.journal.records()) == records

    async def replay_into(self, storage: LossyStorage) -> None:
        chance = random.Random(self.serial)
        async with trio.open_nursery() as nursery:

            async def pump() -> None:
                while True:
                    while storage.outstanding:  # in any order
                        storage.step(chance.randrange(len(storage.outstanding)))
                    await trio.lowlevel.checkpoint()

            nursery.start_soon(pump)
            try:
                await replay(self.journal, storage)
            except StorageError as error:
                failure: StorageError | None = error
            else:
                failure = None
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    def check(self, data: bytearray) -> None:
        for block in range(BLOCKS):
            if block not in self.unknown:
                at = slice(block * BLOCK, (block + 1) * BLOCK)
                assert data[at] == self.expected[at], f"block {block} differs"

    @invariant()
    def reads_see_what_was_acknowledged(self) -> None:
        """Blocks that are being changed may read as either; they are left out."""
        left = set(range(BLOCKS)) - self.unknown
        for offset, data, _ in self.running.values():
            left -= set(range(offset // BLOCK, (offset + len(data)) // BLOCK))
        found = bytearray(SIZE)
        assert self.device.try_read(0, memoryview(found))
        for block in left:
            at = slice(block * BLOCK, (block + 1) * BLOCK)
            assert found[at] == self.expected[at], f"block {block} differs"

    @invariant()
    def the_bound_is_kept(self) -> None:
        assert 0 <= self.journal.held <= self.journal.used <= LIMIT


JournalMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestJournal = JournalMachine.TestCase


def test_many_random_losses() -> None:
    """The same machine, driven more densely than hypothesis does."""
    for seed in range(400):
        chance = random.Random(seed)
        machine = JournalMachine()
        for _ in range(chance.randrange(10, 80)):
            first, count = chance.randrange(BLOCKS), chance.choice((1, 1, 2, 2, 3, BLOCKS))
            steps: list[tuple[int, Callable[[], None]]] = [
                (30, partial(machine.write_inline, first, count)),
                (25, partial(machine.change_slowly, chance.choice(OPS), first, count)),
                (35, partial(machine.execute, chance.randrange(64))),
                (10, machine.flush),
                (2, partial(machine.fail, chance.randrange(64), chance.random() < 0.5)),
                (2, partial(machine.cancel, chance.randrange(64))),
                (3, machine.busy),
                (1, machine.syncs_fail),
                (1, partial(machine.lose, chance.randrange(1 << 16))),
                (4, partial(machine.replace, chance.randrange(1 << 16), chance.random() < 0.2)),
            ]
            chance.choices([step for _, step in steps], [weight for weight, _ in steps])[0]()
            machine.the_bound_is_kept()
            machine.reads_see_what_was_acknowledged()
        machine.replace(seed, dies=False)
