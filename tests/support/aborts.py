"""Parked writes that are aborted, in every way an initiator has, and must never land anywhere.

A round puts the device into standby, parks writes of two sessions, aborts those of one of them
(or some of them), brings the device back, and looks: every aborted block has its old content, what
was not aborted has been done.  In the end QEMU reads the chain.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.faultfs import FaultFs
from tests.support.initiator import GOOD, Answer, Initiator, Kind
from tests.support.load import BLOCK, SECTORS, BlockCodec
from tests.support.serve import ServeProcess
from tests.support.stage import BLOCKS_PER_CLUSTER, PATIENCE, SIZE, Chain, Operator, until

WRITES = 25
"""Of one round."""

ABORT_TASK, ABORT_TASK_SET, CLEAR_TASK_SET, LUN_RESET, WARM_RESET = 1, 2, 4, 5, 6
FUNCTIONS = {
    "ABORT TASK SET": ABORT_TASK_SET,
    "CLEAR TASK SET": CLEAR_TASK_SET,
    "LUN RESET": LUN_RESET,
    "TARGET WARM RESET": WARM_RESET,
}
WAYS = ("ABORT TASK", "LUN RESET", "logout", "connection drop", *FUNCTIONS)
FOR_ALL_SESSIONS = ("CLEAR TASK SET", "LUN RESET", "TARGET WARM RESET")
CAUSES = ("error", "operator", "hang")
"""The writes are parked because the storage fails, because an operator wants it so, or they hang
in the storage when they are aborted and fail afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """How the writes of one round are parked and aborted, and how the device comes back."""

    number: int
    way: str
    cause: str
    errno: int
    copy: bool


def rounds(seed: int, numbers: Sequence[int], ways: Sequence[str] = WAYS) -> list[Round]:
    """Every way in turn."""
    chosen = random.Random(seed)
    return [
        Round(
            number=number,
            way=ways[number % len(ways)],
            cause=chosen.choice(CAUSES),
            errno=chosen.choice([errno.EBUSY, errno.ENOTCONN, errno.EIO]),
            copy=chosen.random() < 0.5,
        )
        for number in numbers
    ]


@dataclass(frozen=True, slots=True)
class _Write:
    """One that was sent: its tag, first block and versions."""

    tag: int
    block: int
    versions: tuple[int, ...]


class Chapter:
    """One daemon and its rounds; `play` raises AssertionError for whatever is not right."""

    def __init__(
        self, storage: FaultFs, directory: Path, *, seed: int, journal: str = "auto"
    ) -> None:
        self.storage = storage
        self.directory = directory
        self.random = random.Random(seed)
        self.codec = BlockCodec(seed)
        self.chain = Chain(storage, f"aborts-{seed}", seed=seed)
        self.options = ("--park-max", "forever", "--journal", journal)
        self.expected: dict[int, int] = {}
        self.aborted = 0
        self.version = 0
        self.raw = directory / f"aborts-{seed}.raw"
        self.server: ServeProcess
        self.operator: Operator

    def play(self, rounds: Sequence[Round]) -> int:
        """The rounds, then the verdict of QEMU; returns how many writes were aborted."""
        with ServeProcess(
            self.chain.descriptor, directory=self.directory, options=self.options
        ) as self.server:
            name = self.server.device_names()[0]
            with Operator(self.server.control, name) as self.operator:
                for plan in rounds:
                    try:
                        self._round(plan)
                    except Exception as error:
                        error.add_note(f"in {plan}")
                        raise
            assert self.server.stop() == 0, self.server.stderr[-3000:]
            assert "Traceback" not in self.server.stderr, self.server.stderr[-3000:]
        self._judge()
        self.chain.remove()
        return self.aborted

    # -- a round ---------------------------------------------------------------------------

    def _round(self, plan: Round) -> None:
        aborting = Initiator(self.server.url)
        with Initiator(self.server.url, name="iqn.2026-01.org.ploopd:other") as other:
            for session in (aborting, other):
                session.settle()
            mine = self._fresh_writes(aborting, 3)
            self._answered(aborting, mine)  # some blocks have been written to before
            self._stop_the_storage(plan, aborting)
            doomed = self._writes(aborting, plan)
            spared: list[_Write] = []
            if plan.way == "ABORT TASK":
                self.random.shuffle(doomed)
                spared, doomed = doomed[:5], doomed[5:]
            self._arrived(aborting)
            kept = [] if plan.way in FOR_ALL_SESSIONS else self._behind(other, doomed)
            self._arrived(other)
            self._parked(plan, len(doomed) + len(spared) + len(kept), aborting, other)
            self._abort(plan, aborting, doomed, len(spared) + len(kept))
            self._bring_back(plan)
            self._answered(other, kept)
            if spared:
                self._answered(aborting, spared)
            self.aborted += len(doomed)
            self._look(plan, doomed)
            if plan.way not in ("logout", "connection drop"):
                self._silent(aborting)
                aborting.close()

    def _stop_the_storage(self, plan: Round, session: Initiator) -> None:
        path = self.chain.glob(self.chain.top)
        match plan.cause:
            case "operator":
                self.operator.enter_standby()
            case "error":
                self.storage.fail(path, "write", "fsync", errno=plan.errno)
            case "hang":
                self.storage.hang(path, "write", "fsync", errno=plan.errno)

    def _writes(self, session: Initiator, plan: Round) -> list[_Write]:
        """What will be aborted: to one to three blocks each, new clusters and old, overlapping."""
        base = self._place()
        blocks = [base + self.random.randrange(4 * BLOCKS_PER_CLUSTER) for _ in range(WRITES)]
        return [self._write(session, block, self.random.randint(1, 3)) for block in blocks]

    def _behind(self, session: Initiator, doomed: Sequence[_Write]) -> list[_Write]:
        """Another session's: to blocks of those that will be aborted, and to others."""
        blocks = [self.random.choice(doomed).block for _ in range(3)]
        blocks += [each + 8 * BLOCKS_PER_CLUSTER for each in blocks[:2]]
        return [self._write(session, block, 1) for block in dict.fromkeys(blocks)]

    def _fresh_writes(self, session: Initiator, count: int) -> list[_Write]:
        base = self._place()
        places = self.random.sample(range(4 * BLOCKS_PER_CLUSTER), count)
        return [self._write(session, base + place, 1) for place in places]

    def _place(self) -> int:
        """Somewhere on the disk."""
        return self.random.randrange(SIZE // BLOCK - 16 * BLOCKS_PER_CLUSTER)

    def _write(self, session: Initiator, block: int, count: int) -> _Write:
        versions = tuple(range(self.version + 1, self.version + 1 + count))
        self.version += count
        made = (self.codec.make(block + n, version) for n, version in enumerate(versions))
        tag = session.write(block * SECTORS, b"".join(made))
        return _Write(tag, block, versions)

    def _arrived(self, session: Initiator) -> None:
        """What was sent has been received: a ping behind it is answered, and nothing else is."""
        ping = session.nop()
        answers: list[Answer] = []
        until(lambda: bool(answers), lambda seconds: answers.extend(session.poll(seconds)))
        assert [answer.tag for answer in answers] == [ping]

    def _parked(self, plan: Round, count: int, *sessions: Initiator) -> None:
        """Until all of them are parked; those that hang are in execution, or wait behind one."""

        def poll(seconds: float) -> None:
            for session in sessions:
                assert session.poll(seconds) == [], "an answer although the storage is away"

        if plan.cause == "hang":
            until(lambda: self.storage.status()["hanging"] > 0, poll)
            for _ in range(3):
                poll(0.01)
            return
        until(lambda: self.operator.details().parked_requests == count, poll)
        assert self.operator.details().standby == "on"

    def _abort(
        self, plan: Round, session: Initiator, doomed: Sequence[_Write], others: int
    ) -> None:
        match plan.way:
            case "ABORT TASK":
                tags = [session.task_management(ABORT_TASK, each.tag) for each in doomed]
            case "logout":
                tags = [session.request_logout()]
            case "connection drop":
                session.poll(0.0)
                session.close()
                tags = []
            case _:
                tags = [session.task_management(FUNCTIONS[plan.way])]
        answers: list[Answer] = []

        def receive(seconds: float) -> None:
            answers.extend(_of(session, tags, seconds))

        if plan.cause == "hang":
            if plan.way in FUNCTIONS:
                receive(0.05)
                assert not answers, "answered before what hangs has ended"
            name = errno.errorcode[plan.errno]
            path = self.chain.glob(self.chain.top)
            # What hangs fails, and so does what comes later.
            self.storage.script("clear", f"fail {path} write,fsync errno={name}")
        until(lambda: len(answers) >= len(tags), receive)
        for answer in answers:
            assert answer.kind in (Kind.TASK_MANAGEMENT, Kind.LOGOUT), f"{plan}: {answer}"
            assert answer.status == 0, f"{plan}: {answer}"
        if plan.way == "logout":
            session.close()
        if plan.cause == "hang":
            self.operator.wait_for("on")
        until(lambda: self.operator.details().parked_requests == others, lambda _: None)

    def _bring_back(self, plan: Round) -> None:
        self.storage.clear()
        copy = f"top-{plan.number}.hds" if plan.copy else None
        self.operator.recover(self.chain, copy=copy)

    def _answered(self, session: Initiator, writes: Sequence[_Write]) -> None:
        """All with GOOD and nothing else; what they wrote is expected from now on."""
        waiting = {each.tag for each in writes}
        while waiting:
            answers = session.poll(PATIENCE)
            assert answers, "no answer"
            for answer in answers:
                assert answer.status == GOOD, answer.sense_text
                waiting.remove(answer.tag)
        for each in writes:
            for place, version in enumerate(each.versions):
                block = each.block + place
                self.expected[block] = max(version, self.expected.get(block, 0))

    def _look(self, plan: Round, doomed: Sequence[_Write]) -> None:
        """Through a new session: nothing that was aborted is there."""
        with Initiator(self.server.url) as session:
            session.settle()
            for each in doomed:
                data = session.good(
                    session.read(each.block * SECTORS, len(each.versions) * SECTORS)
                )
                for place in range(len(each.versions)):
                    found = data[place * BLOCK : (place + 1) * BLOCK]
                    self._compare(each.block + place, found, str(plan))
            session.logout()

    def _silent(self, session: Initiator) -> None:
        """What was aborted is never answered."""
        assert session.poll(0.02) == []

    def _compare(self, block: int, found: bytes, context: str) -> None:
        version = self.expected.get(block)
        wanted = self.chain.initial(block) if version is None else self.codec.make(block, version)
        if found != wanted:
            text = self.codec.identify(found)
            raise AssertionError(f"{context}: block {block} has {text}, expected version {version}")

    def _judge(self) -> None:
        """The whole disk, as QEMU reads it: expected or initial content, no aborted version."""
        with self.chain.read_through_qemu(self.raw).open("rb") as raw:
            for block in range(SIZE // BLOCK):
                self._compare(block, raw.read(BLOCK), "QEMU")
        self.raw.unlink()


def _of(session: Initiator, tags: Sequence[int], seconds: float) -> list[Answer]:
    """Answers; one to anything but `tags` is a failure."""
    answers = session.poll(seconds)
    for answer in answers:
        assert answer.tag in tags, f"an aborted command was answered: {answer}"
    return answers
