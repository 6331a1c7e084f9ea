"""`make torture`: play programmes until their goals are reached; what was done is remembered.

python -m tests.torture [--programme NAME]… [--minutes N] [--episodes N]
python -m tests.torture --programme NAME --seed SEED     one batch again
python -m tests.torture --report                         write RELIABILITY.md's table
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.torture import report
from tests.torture.ledger import Ledger, LedgerError
from tests.torture.programme import Programme, Result, find

PROGRESS = 30.0
"""Seconds between two lines of progress."""


def main(arguments: list[str] | None = None) -> int:
    programmes = find()
    options = _parser(programmes).parse_args(arguments)
    try:
        ledger = Ledger(options.ledger)
        if options.report:
            report.write(ledger, programmes)
            print(report.render(ledger, programmes))
            return 0
    except (LedgerError, report.ReportError) as error:
        print(f"torture: {error}", file=sys.stderr)
        return 2
    chosen = [programmes[name] for name in options.programme or programmes]
    if options.seed is not None:
        if len(chosen) != 1:
            print("torture: --seed needs one --programme", file=sys.stderr)
            return 2
        return 0 if play(chosen[0], options.seed).good else 1
    runs = [Run(each, ledger, options.minutes, options.episodes) for each in chosen]
    try:
        return 0 if all(run.go() for run in runs) else 1
    except KeyboardInterrupt:
        print("torture: interrupted; the batches that had ended are in the ledger")
        return 130


def _parser(programmes: dict[str, Programme]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--programme",
        action="append",
        choices=sorted(programmes),
        help="one of them; may be given more than once (all)",
    )
    parser.add_argument("--minutes", type=float, help="for each programme, at most")
    parser.add_argument("--episodes", type=int, help="for each programme, and not up to its goal")
    parser.add_argument("--seed", type=int, help="play one batch again, outside the ledger")
    parser.add_argument("--ledger", type=Path, help="another one than out/torture.json")
    parser.add_argument("--report", action="store_true", help="write RELIABILITY.md's table")
    return parser


class Run:
    """One programme, batch after batch, until its goal, its time or a failure ends it."""

    def __init__(
        self, programme: Programme, ledger: Ledger, minutes: float | None, episodes: int | None
    ) -> None:
        self.programme = programme
        self.ledger = ledger
        self.deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
        self.wanted = episodes
        self.played = 0

    def go(self) -> bool:
        """True when nothing failed."""
        name = self.programme.name
        lacking = self.programme.missing()
        if lacking is not None:
            print(f"{name}: not played: {lacking}")
            return True
        entry = self.ledger.begin(name)
        told = time.monotonic()
        while not self._finished():
            seed = self.ledger.next_seed(name)
            began = time.monotonic()
            result = play(self.programme, seed)
            entry.add(seed, result, time.monotonic() - began)
            self.ledger.save()
            self.played += result.episodes
            if not result.good:
                return False
            if time.monotonic() - told >= PROGRESS:
                told = time.monotonic()
                print(self._progress(), flush=True)
        print(self._progress(), flush=True)
        return True

    def _finished(self) -> bool:
        if time.monotonic() >= self.deadline:
            return True
        if self.wanted is not None:
            return self.played >= self.wanted
        return self.ledger.since_the_last_failure(self.programme.name) >= self.programme.goal

    def _progress(self) -> str:
        name, goal = self.programme.name, self.programme.goal
        done = self.ledger.since_the_last_failure(name)
        return f"{name}: {self.played:,} episodes now, {done:,} of {goal:,} in all"


def play(programme: Programme, seed: int) -> Result:
    """One batch; a defect is told with what plays it again."""
    with tempfile.TemporaryDirectory(prefix="torture.") as directory:
        try:
            result = programme.run(seed, Path(directory))
        except Exception as error:
            traceback.print_exc()
            kind = "mismatches" if isinstance(error, AssertionError) else "errors"
            note = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            result = Result(episodes=0, notes=(note,), **{kind: 1})  # type: ignore[arg-type]
    if not result.good:
        print(f"{programme.name}: seed {seed} FAILED: {'; '.join(result.notes)}", file=sys.stderr)
        again = f"--programme {programme.name} --seed {seed}"
        print(f"again: make torture TORTURE_ARGS='{again}'", file=sys.stderr)
    return result


if __name__ == "__main__":
    sys.exit(main())
