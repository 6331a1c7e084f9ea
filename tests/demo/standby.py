"""`make demo-standby`: a disk outlives its storage, in a minute that anyone can watch.

    python -m tests.demo.standby [--seconds 60] [--journal off] [--chart out/demo-standby.png]

An image lies on a file system that fails on command; an initiator writes, reads and compares with
32 requests at once.  The storage dies and loses what it had not synced; the disk pauses; an
operator replaces the image by a copy on other storage; the disk goes on.  The exit code is 0 only
if the initiator saw no error and found every byte that was acknowledged; `--journal off` shows that
the storage really loses some.
"""

from __future__ import annotations

import argparse
import errno
import random
import re
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from ploopd.errors import PloopError
from tests.demo.chart import write_chart
from tests.demo.screen import Screen, Watcher
from tests.demo.summary import Episode, Outcome, summarise
from tests.support import images, oracles
from tests.support.faultfs import FaultFs
from tests.support.images import MIB
from tests.support.initiator import ConnectionLostError, Initiator
from tests.support.load import BLOCK, Journal, LoadError, Mix
from tests.support.measured import MeasuredLoad, logged_events, run_during
from tests.support.serve import ServeProcess

SIZE = 128 * MIB
CLUSTER = 65536
DEPTH = 32
LONGEST_PAUSE = 15.0
"""Seconds; ploopd answers BUSY after 20 (`--park-max`), for the initiator to repeat."""

MIX = Mix(write=0.6, read=0.398, flush=0.002, largest=4)


class Demo:
    """The play.  `storage` is where the image lies, `spare` the other storage."""

    def __init__(
        self, directory: Path, screen: Screen, *, seconds: float, seed: int, journal: str
    ) -> None:
        self.directory = directory
        self.options = ("--journal", journal)
        self.seconds = seconds
        self.seed = seed
        self.screen = screen
        self.source = directory / "source"
        self.storage = directory / "storage"
        self.spare = directory / "other-storage"
        self.began = 0.0
        self.unsynced = 0

    def run(self) -> Outcome:
        for place in (self.source, self.spare):
            place.mkdir()
        images.write_delta(self.source / "disk.hds", SIZE, {}, cluster_size=CLUSTER)
        served = self.storage / "disk.hds"
        with (
            FaultFs(self.source, self.storage) as faults,
            ServeProcess(served, directory=self.directory, options=self.options) as server,
        ):
            # As a client with a cache of its own: written data is safe after a sync, not before.
            faults.script("cache disk.hds")
            return self.play(faults, server)

    def play(self, faults: FaultFs, server: ServeProcess) -> Outcome:
        self.screen.introduce(server, DEPTH, SIZE)
        journal = Journal(self.seed)
        failure = None
        with Initiator(server.url) as initiator:
            initiator.settle()
            area = range(SIZE // BLOCK)
            load = MeasuredLoad(initiator, journal, area, depth=DEPTH, mix=MIX, seed=self.seed)
            self.began = time.time()
            with Watcher(load, server, self.screen, self.began) as watcher:
                try:
                    run_during(load, partial(self.story, faults, server))
                    load.flush()
                    watcher.stop()
                    self.screen.say("reading everything back …")
                    load.verify()
                    initiator.logout()
                except (LoadError, ConnectionLostError) as error:
                    failure = str(error)
        code = server.stop()
        if failure is None:
            failure = self.problem_of(self.spare / "disk.hds", journal, code)
        return self.outcome(load, server, watcher.most_parked, failure)

    def story(self, faults: FaultFs, server: ServeProcess) -> None:
        """What happens to the storage, while the load runs."""
        pause = min(0.25 * self.seconds, LONGEST_PAUSE)
        calm = (self.seconds - pause) / 2
        time.sleep(calm)
        # Right after a sync it would have nothing to lose.
        faults.dead(errno.EIO, unsynced=MIB // 4)
        deadline = time.monotonic() + LONGEST_PAUSE
        while not (report := faults.report())["dead"]:
            assert time.monotonic() < deadline, "nothing is written"
            time.sleep(0.01)
        self.unsynced = sum(report["unsynced"].values())
        faults.script("lose disk.hds")
        self.screen.say(
            "the storage dies: every operation answers EIO, and what it had not synced is lost"
        )
        time.sleep(pause)
        replacement = self.spare / "disk.hds"
        shutil.copyfile(self.source / "disk.hds", replacement)
        self.screen.say("the operator has a copy on other storage:")
        words = ("device", "replace", "disk", "--image", str(replacement), "--force")
        self.screen.show(f"$ ploopctl {' '.join(words)}")
        for line in server.ctl(*words).stderr.splitlines():
            self.screen.show(line)
        time.sleep(calm)

    def problem_of(self, image: Path, journal: Journal, code: int) -> str | None:
        """What is wrong with the image that was served last, if anything is."""
        if code:
            return f"ploopd ended with exit code {code}"
        if oracles.have("qemu-img"):
            return None
        try:
            oracles.qemu_check(image)
            raw = oracles.read_through_qemu([("parallels", image)], self.directory / "final.raw")
            journal.verify_file(raw, size=SIZE)
        except AssertionError as error:
            return f"QEMU: {error}"
        return None

    def outcome(
        self, load: MeasuredLoad, server: ServeProcess, parked: int, failure: str | None
    ) -> Outcome:
        log = server.stderr
        entered = next(logged_events(log, "standby-entered"), None)
        recovered = next(logged_events(log, "recovered"), None)
        episode = None
        if entered is not None and recovered is not None:
            replayed = re.search(r"step=replay .*?detail='(\d+) bytes", log)
            episode = Episode(
                cause=f"{entered.details['errno']} of {entered.details['op']}",
                entered=entered.time,
                recovered=recovered.time,
                most_parked=parked,
                unsynced=self.unsynced,
                replayed=0 if replayed is None else int(replayed[1]),
            )
        elif failure is None:
            failure = "there was no standby episode"
        return Outcome(load=load, began=self.began, episode=episode, failure=failure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.demo.standby", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the load runs")
    parser.add_argument("--chart", type=Path, default=Path("out/demo-standby.png"))
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 16))
    parser.add_argument("--journal", choices=["auto", "on", "off"], default="auto")
    arguments = parser.parse_args()
    if arguments.seconds < 4:
        parser.error("--seconds must be 4 or more")
    missing = oracles.missing_for_fuse()
    if missing is not None:
        raise SystemExit(f"The demonstration needs a file system that can fail. {missing}")
    screen = Screen(sys.stdout)
    with tempfile.TemporaryDirectory(prefix="demo-standby.") as directory:
        try:
            outcome = Demo(
                Path(directory),
                screen,
                seconds=arguments.seconds,
                seed=arguments.seed,
                journal=arguments.journal,
            ).run()
        except (AssertionError, OSError, PloopError) as error:
            raise SystemExit(f"The demonstration did not get to its end: {error}") from error
    screen.table(summarise(outcome))
    if outcome.failure is not None:
        raise SystemExit(f"FAILED (seed {arguments.seed}): {outcome.failure}")
    arguments.chart.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_chart(arguments.chart, outcome)
    except ImportError:
        screen.show("No chart: matplotlib is not installed (pip install '.[bench]').")
    else:
        screen.show(f"The chart: {arguments.chart}")


if __name__ == "__main__":
    main()
