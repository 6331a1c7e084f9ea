"""Standby episodes on the wire: the storage of a chain fails under a load that verifies everything.

A chapter is one daemon with a chain (a full base, an empty top) on the fault file system, one
initiator that keeps 32 requests in flight, and some episodes.  In each one an operation of the
storage fails, the device goes into standby, the storage heals or a copy is made, the top is
replaced, and the load, which has only waited, goes on.  Every chapter ends with QEMU reading the
chain.  All is decided by the seed.
"""

from __future__ import annotations

import errno
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.faultfs import FaultFs
from tests.support.initiator import Answer, Initiator, Kind
from tests.support.load import Journal, LoadError, Mix
from tests.support.measured import MeasuredLoad, logged_events
from tests.support.serve import ServeProcess
from tests.support.stage import BLOCKS_PER_CLUSTER, CLUSTER, PATIENCE, SIZE, Chain, Operator, until

WINDOW = 48
"""Clusters that an episode is the first to write to: they are copied on write."""

EPISODES = SIZE // CLUSTER // WINDOW - 1
"""That a chapter can have, before there is nothing left to copy."""

ERRNOS = (errno.EBUSY, errno.ENOTCONN, errno.EIO)
FAILING = ("data-write", "data-read", "bat-write", "cow-read", "cow-write", "fsync")
WAYS = ("same path", "other file")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One episode: which operation fails how, and how the device is brought back.

    `when` are options of the rule: until cleared, once, every other time, or sticking to the inode.
    """

    number: int
    errno: int
    failing: str
    way: str
    when: dict[str, Any]
    pause: float

    def __str__(self) -> str:
        when = " ".join(f"{name}={value}" for name, value in self.when.items()) or "until cleared"
        return f"{errno.errorcode[self.errno]} from {self.failing} ({when}), {self.way}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was measured: requests parked before the replace, milliseconds from the release of
    parked requests to the first answer at the initiator, seconds that the load stood still."""

    plan: Plan
    parked: int
    first_completion_ms: float
    longest: float


@dataclass(slots=True, kw_only=True)
class Summary:
    """All episodes of a run."""

    seen: list[Seen] = field(default_factory=list)
    requests: int = 0
    verified: int = 0

    def first_completions(self) -> list[float]:
        return sorted(each.first_completion_ms for each in self.seen)

    def __str__(self) -> str:
        first = self.first_completions()
        parked = [each.parked for each in self.seen]
        return (
            f"{len(first)} episodes, {self.requests:,} requests, {self.verified:,} blocks "
            "verified; "
            f"parked {min(parked)}–{max(parked)}; first completion after the release: median "
            f" {statistics.median(first):.1f} ms, "
            f"90 % within {first[int(0.9 * (len(first) - 1))]:.1f} ms, worst {first[-1]:.1f} ms"
        )


def plans(seed: int, numbers: Sequence[int], errnos: Sequence[int] = ERRNOS) -> list[Plan]:
    """Every errno with every failing operation, replaced in both ways in turn."""
    chosen = random.Random(seed)
    whens: list[dict[str, Any]] = [{}, {}, {"count": 1}, {"every": 2}, {"stick": True, "count": 1}]
    return [
        Plan(
            number=number,
            errno=errnos[number // len(FAILING) % len(errnos)],
            failing=FAILING[number % len(FAILING)],
            way=WAYS[(number + number // len(FAILING)) % 2],
            when=chosen.choice(whens),
            pause=chosen.choice([0.0, 0.02, 0.1]),
        )
        for number in numbers
    ]


class WireLoad(MeasuredLoad):
    """Four of ten requests go to a few blocks of the area, so that writes race there."""

    HOT = 24

    def _choose_blocks(self) -> range:
        blocks = super()._choose_blocks()
        if self.random.random() < 0.4:
            first = self.area.start + self.random.randrange(self.HOT)
            blocks = range(first, min(first + len(blocks), self.area.stop))
        return blocks

    def _take(self, answer: Answer) -> None:
        if answer.kind is Kind.COMMAND and answer.tag not in self._requests:
            raise LoadError(f"tag {answer.tag} was answered twice: {answer}")
        super()._take(answer)


class Chapter:
    """One daemon and its episodes; `play` raises AssertionError for whatever is not right."""

    def __init__(
        self,
        storage: FaultFs,
        directory: Path,
        *,
        seed: int,
        journal: str = "auto",
        lossy: bool = False,
        options: tuple[str, ...] = (),
    ) -> None:
        """`lossy`: the storage keeps writes in a cache until they are synced, and loses them when
        it fails; only a journal can make up for that."""
        self.storage = storage
        self.lossy = lossy
        self.directory = directory
        self.seed = seed
        self.chain = Chain(storage, f"chapter-{seed}", seed=seed)
        # Nobody may be told BUSY: the load takes that for an error.
        self.options = ("--park-max", "forever", "--journal", journal, *options)
        self.server: ServeProcess
        self.operator: Operator
        self.load: WireLoad
        self._read = 0

    def play(self, plans: Sequence[Plan]) -> Summary:
        """The episodes in turn, then the verdict of QEMU."""
        assert len(plans) <= EPISODES
        summary = Summary()
        journal = Journal(self.seed, self.chain.initial)
        with ServeProcess(
            self.chain.descriptor, directory=self.directory, options=self.options
        ) as self.server:
            with (
                Operator(self.server.control, self.server.device_names()[0]) as self.operator,
                Initiator(self.server.url) as initiator,
            ):
                initiator.settle()
                self.load = WireLoad(initiator, journal, range(1), seed=self.seed, overlap=True)
                self._warm_up()
                for place, plan in enumerate(plans):
                    summary.seen.append(self._episode(place, plan))
                self.load.flush()
                self.load.verify()
                initiator.logout()
            assert self.server.stop() == 0, self.server.stderr[-3000:]
            assert "Traceback" not in self.server.stderr, self.server.stderr[-3000:]
        raw = self.chain.read_through_qemu(self.directory / f"final-{self.seed}.raw")
        assert journal.verify_file(raw, size=SIZE) > 0
        raw.unlink()
        summary.requests, summary.verified = self.load.completed, self.load.verified
        self.chain.remove()
        return summary

    def _window(self, place: int) -> range:
        """Clusters of the episodes at `place`; −1 is the warm-up before the first."""
        return range((place + 1) * WINDOW, (place + 2) * WINDOW)

    def _aim(self, *windows: range) -> None:
        first, last = windows[0].start, windows[-1].stop
        self.load.area = range(first * BLOCKS_PER_CLUSTER, last * BLOCKS_PER_CLUSTER)

    def _warm_up(self) -> None:
        self._aim(self._window(-1))
        self.load.mix = Mix(write=0.7, read=0.25, flush=0.05, largest=4)
        self.load.run(requests=200)

    def _episode(self, place: int, plan: Plan) -> Seen:
        load = self.load
        load.longest = 0.0
        reads = 0.0 if plan.failing == "cow-read" else 0.3
        flushes = 0.1 if plan.failing == "fsync" else 0.02
        load.mix = Mix(write=0.95 - reads - flushes, read=reads, flush=flushes, largest=4)
        load.run(requests=40)
        with ThreadPoolExecutor(1) as pool:
            playing = pool.submit(self._direct, place, plan)

            def watch() -> None:
                """What fails beside the load must not wait for a load that waits for it."""
                if playing.done():
                    playing.result()

            load.run(until=playing.done, tick=watch, stall=PATIENCE)
            parked = playing.result()
        load.run(requests=60)
        self._verify(place)
        return Seen(
            plan=plan,
            parked=parked,
            first_completion_ms=self._first_completion(),
            longest=load.longest,
        )

    def _verify(self, place: int) -> None:
        """Everything known of the windows that were written to."""
        first = self._window(place - 1).start * BLOCKS_PER_CLUSTER
        last = self._window(place).stop * BLOCKS_PER_CLUSTER
        self.load.finish()
        known = self.load.journal.candidates
        self.load.verify([block for block in known if first <= block < last])

    def _direct(self, place: int, plan: Plan) -> int:
        """What happens beside the load; returns how many requests were parked."""
        target, operations, where = self._aimed_at(plan.failing)
        path = self.chain.glob(target)
        if self.lossy:
            self.storage.cache(self.chain.glob("*"))
        # A cache is lost in the moment of the failure, and nothing of the file works afterwards:
        # a storage that acknowledged an fsync for what it has lost could not be made up for.
        when = {"stick": True, "lose": True} if self.lossy else plan.when
        self.storage.fail(path, *operations, errno=plan.errno, range=where, **when)
        # Only now may the load go where clusters are still to be copied.
        self._aim(self._window(place - 1), self._window(place))
        operator = self.operator
        operator.wait_for("on")
        time.sleep(plan.pause)
        if plan.way == "other file":
            # A copy made while the old storage still takes writes and flushes would be too old.
            until(lambda: operator.details().parked_requests == self.load.depth, time.sleep)
        before = operator.details()
        assert before.standby == "on", "only a replace leaves standby"
        if plan.way == "same path" or target != self.chain.top:
            self.storage.clear()
        copy = None if plan.way == "same path" else f"top-{plan.number}.hds"
        operator.recover(self.chain, copy=copy)
        assert operator.details().standby == "off"
        self.storage.clear()
        if self.lossy:
            self.storage.cache(self.chain.glob("*"))
        return before.parked_requests

    def _aimed_at(self, failing: str) -> tuple[str, tuple[str, ...], Any]:
        """File, operations and range of the rule."""
        top = self.chain.top
        match failing:
            case "data-write":
                return top, ("write",), "data"
            case "data-read":
                return top, ("read",), "data"
            case "bat-write":
                return top, ("write",), "bat"
            case "cow-read":
                return "base.hds", ("read",), "data"
            case "cow-write":  # of clusters that the top does not have yet
                return top, ("write",), (self.chain.end_of_clusters(), None)
        return top, ("fsync",), None

    def _first_completion(self) -> float:
        """Milliseconds from the last step before the release to the first answer after it."""
        with self.server.log.open("rb") as log:
            log.seek(self._read)
            text = log.read().decode(errors="replace")
            self._read = log.tell()
        (swap,) = (
            each for each in logged_events(text, "replace-step") if each.details["step"] == "swap"
        )
        first = self.load.first_after(swap.time)
        assert first is not None
        return 1000 * first
