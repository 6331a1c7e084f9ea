"""The ledger of `make torture`: every batch that was run, by programme, version and seed.

It is JSON, one line for each programme under one commit on one machine, so that its totals survive
and merge.  Batches of one line add up; the seeds that were played are kept as ranges.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tests.torture.programme import Result

ROOT = Path(__file__).resolve().parents[2]
LEDGER = ROOT / "out" / "torture.json"
RECORDED = Path(__file__).with_name("recorded.json")
"""What earlier checkouts have run; a new ledger begins with it."""


class LedgerError(Exception):
    """The ledger cannot be read; the text says why."""


@dataclass(slots=True, kw_only=True)
class Entry:
    """What one programme has done under one commit on one kind of machine.

    `seeds` are the ranges [first, end) that were played, `worst` the largest of each measurement.
    """

    programme: str
    version: str
    commit: str
    machine: str
    first: str
    last: str = ""
    batches: int = 0
    episodes: int = 0
    errors: int = 0
    mismatches: int = 0
    seconds: float = 0.0
    seeds: list[list[int]] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.programme, self.commit, self.first

    @property
    def failed(self) -> bool:
        return bool(self.errors or self.mismatches)

    def add(self, seed: int, result: Result, seconds: float) -> None:
        self.batches += 1
        self.episodes += result.episodes
        self.errors += result.errors
        self.mismatches += result.mismatches
        self.seconds = round(self.seconds + seconds, 1)
        self.last = now()
        if self.seeds and self.seeds[-1][1] == seed:
            self.seeds[-1][1] = seed + 1
        else:
            self.seeds.append([seed, seed + 1])
        for name, value in result.worst.items():
            self.worst[name] = round(max(value, self.worst.get(name, value)), 3)
        if not result.good:
            self.notes.append(f"seed {seed}: {'; '.join(result.notes)}")


class Ledger:
    """The file and its entries.  Several runs may use it at once: each saves only its own."""

    def __init__(self, path: Path | None = None, recorded: Path | None = None) -> None:
        self.path = path or LEDGER
        self.recorded = recorded or RECORDED
        self.entries = {each.key: each for each in _load(self.recorded)}
        self.entries |= {each.key: each for each in _load(self.path)}
        self._mine: dict[tuple[str, str, str], Entry] = {}

    def of(self, programme: str) -> list[Entry]:
        return [each for each in self.entries.values() if each.programme == programme]

    def next_seed(self, programme: str) -> int:
        """A seed that has not been played."""
        played = (end for each in self.of(programme) for _, end in each.seeds)
        return max(played, default=1)

    def since_the_last_failure(self, programme: str) -> int:
        """Episodes of the entries that began after the last one that failed."""
        entries = self.of(programme)
        failed = max((each.last for each in entries if each.failed), default="")
        return sum(each.episodes for each in entries if each.first > failed)

    def begin(self, programme: str) -> Entry:
        """The entry of this run."""
        commit = current_commit()
        entry = Entry(
            programme=programme,
            version=version("ploopd"),
            commit=commit,
            machine=machine(),
            first=now(),
        )
        self.entries[entry.key] = self._mine[entry.key] = entry
        return entry

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.entries |= {each.key: each for each in _load(self.path)} | self._mine
            _write(self.path, [each for each in self.entries.values() if each.batches])

    def record(self) -> None:
        """Keep the totals with the sources."""
        _write(self.recorded, [each for each in self.entries.values() if each.batches])


def _load(path: Path) -> list[Entry]:
    try:
        return [Entry(**each) for each in json.loads(path.read_text())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise LedgerError(f"{path}: {error}; move it away to begin a new one") from error


def _write(path: Path, entries: list[Entry]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(each), sort_keys=True) for each in entries]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    temporary.replace(path)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")


def current_commit() -> str:
    """The commit that is being tested, with a + when the sources differ from it."""
    try:
        commit = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--", "ploopd", "image_format", "scst_shim")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


def _git(*arguments: str) -> str:
    ended = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return ended.stdout.strip()


def machine() -> str:
    """In general words: nothing that names it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    cpus = len(os.sched_getaffinity(0))
    kernel = ".".join(platform.release().split(".")[:2])
    return f"{cpus} {platform.machine()} CPUs, {memory:.0f} GiB, Linux {kernel}"
