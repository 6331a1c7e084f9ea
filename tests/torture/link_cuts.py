"""Episodes of standby on a real distributed file system whose link is cut under a verified load.

    python -m tests.torture.link_cuts moosefs --episodes 20 --seed 1

runs itself again in namespaces of its own and prints one JSON object for each episode.  An episode
is right when no request of the initiator ended with an error, every block has the content that was
promised, through iSCSI and then through QEMU, and `qemu-img check` finds nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ploopd.errors import ExitCode
from tests.support import images, oracles
from tests.support.images import MIB
from tests.support.initiator import Initiator
from tests.support.load import BLOCK, Journal, Mix
from tests.support.measured import LoggedEvent, MeasuredLoad, logged_events, run_during
from tests.support.serve import ServeProcess
from tests.torture.namespaces import Cut, Link, command_inside, missing_for_namespaces
from tests.torture.programme import Result
from tests.torture.storages import STORAGES, Storage, missing_programs, until

SIZE = 64 * MIB
CLUSTER = 65536
REPLACEMENTS = ("same path", "same path", "reopen", "copy")
"""What ends a standby in turn: an operator with the same path, ploopd by itself, a copy."""

BATCH = len(REPLACEMENTS)
"""Episodes that share a set-up."""

PATIENCE = 60.0
"""Seconds for the device to go into standby: more than any client here takes to give up."""

RECOVERY = 200.0
"""Seconds for a replace to succeed: MooseFS keeps a chunk locked for 120 s when its client has
vanished in the middle of a write."""

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(slots=True, kw_only=True)
class Episode:
    """What was done and seen.  Times in seconds unless the name says otherwise.

    `to_standby`: from the cut to the flag.  `down`: how long the link was cut.  `to_recovery`: from
    the link's return to the end of the replace that succeeded, `refused` what earlier ones said.
    `first_completion_ms`: from the release of the parked requests to the first answer.  `log`: what
    ploopd wrote, when there was a `failure`.
    """

    number: int
    seed: int
    cut: str
    image: str
    replacement: str
    journal: str
    errno: str = ""
    op: str = ""
    to_standby: float = 0.0
    down: float = 0.0
    to_recovery: float = 0.0
    first_completion_ms: float = 0.0
    longest: float = 0.0
    requests: int = 0
    refused: list[str] = field(default_factory=list)
    failure: str | None = None
    log: list[str] = field(default_factory=list)


class ConfiguredProcess(ServeProcess):
    """`ploopd run` with one device; `device` has the keys of ploopd.toml(5)."""

    def __init__(self, device: dict[str, object], directory: Path) -> None:
        super().__init__(str(device["image"]), directory=directory)
        self.device = device

    def command(self) -> list[str]:
        config = self.directory / "ploopd.toml"
        tables: dict[str, dict[str, object]] = {
            "[daemon]": {"control": str(self.control)},
            "[iscsi]": {"portals": [self.portal]},
            "[[device]]": self.device,
        }
        # What JSON writes for strings, numbers, booleans and lists is TOML, too.
        config.write_text(
            "".join(
                f"{name}\n"
                + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
                for name, keys in tables.items()
            )
        )
        return [sys.executable, "-m", "ploopd.cli.ploopd", "run", "--config", str(config)]


class Theatre:
    """One episode: an image on the storage, a server, a load, and what happens to the link."""

    def __init__(self, storage: Storage, link: Link, directory: Path, episode: Episode) -> None:
        self.storage = storage
        self.link = link
        self.directory = directory
        self.episode = episode
        self.random = random.Random(episode.seed)
        self.place = storage.mountpoint / f"episode-{episode.number}"
        self.server: ServeProcess
        self.layers: list[oracles.Layer] = []
        self.served: Path

    def make_image(self) -> None:
        """A thin image, or an empty top on a base with content."""
        self.place.mkdir()
        if self.episode.image == "delta":
            self.served = images.write_delta(
                self.place / "disk.hds", SIZE, {}, cluster_size=CLUSTER
            )
            self.layers = [("parallels", self.served)]
            return
        generator = random.Random(self.episode.seed)
        clusters = {index: generator.randbytes(CLUSTER) for index in range(0, 1024, 16)}
        base = images.write_delta(self.place / "base.hds", SIZE, clusters, cluster_size=CLUSTER)
        top = images.write_delta(self.place / "top.hds", SIZE, {}, cluster_size=CLUSTER)
        rows = [
            (images.guid(1), "Compressed", base.name),
            (images.TOP_GUID, "Compressed", top.name),
        ]
        self.served = images.write_descriptor(self.place, SIZE, rows, cluster_size=CLUSTER)
        self.layers = [("parallels", base), ("parallels", top)]

    def initial(self) -> Path:
        """The content of the disk before anything is written."""
        return oracles.read_through_qemu(self.layers, self.directory / "initial.raw")

    def config(self) -> dict[str, object]:
        """The keys of the device in ploopd.toml(5)."""
        config: dict[str, object] = {
            "image": str(self.served),
            "name": "disk",
            # Nobody may be told BUSY: the load takes that for an error.
            "park_max": "forever",
        }
        if self.episode.replacement == "reopen":
            config |= {"recovery": "reopen", "recovery_delay": 0.5, "recovery_delay_max": 5.0}
        if self.episode.journal == "off":
            return config | {"journal": "off", "write_cache": False}
        return config | {"journal": self.episode.journal}

    def play(self) -> None:
        """Cut the link, wait for standby, restore it, replace."""
        episode = self.episode
        time.sleep(self.random.uniform(0.1, 1.0))
        cut_at = time.time()
        self.link.cut(Cut(episode.cut))
        try:
            self.wait_for("on", PATIENCE)
            time.sleep(self.random.uniform(0.2, 3.0))
        finally:
            self.link.restore()
        restored_at = time.time()
        episode.down = restored_at - cut_at
        if episode.replacement == "reopen":
            self.wait_for("off", RECOVERY)
        else:
            self.replace()
        entered = self.event("standby-entered")
        episode.to_standby = entered.time - cut_at
        episode.errno, episode.op = entered.details["errno"], entered.details["op"]
        episode.to_recovery = self.event("recovered").time - restored_at

    def wait_for(self, state: str, seconds: float) -> None:
        command = ("device", "standby", "disk", "wait", "--state", state)
        self.server.ctl(*command, "--timeout", f"{seconds:g}", timeout=seconds + 10)

    def replace(self) -> None:
        """As an operator does: again until it succeeds."""
        image = top = self.layers[-1][1]
        force: list[str] = []
        if self.episode.replacement == "copy":
            image = self.directory / "copy.hds"
            force = ["--force"]
            if self.episode.image == "chain":
                force.append("--keep-descriptor")  # the copy is not beside the other deltas
            until(lambda: self.copied(top, image), "a copy of the image", RECOVERY)
        deadline = time.monotonic() + RECOVERY
        while True:
            command = ("device", "replace", "disk", "--image", str(image), *force)
            result = self.server.ctl(*command, timeout=RECOVERY, check=False)
            if result.returncode == 0:
                break
            assert result.returncode != ExitCode.USAGE, result.stderr
            self.episode.refused.append(result.stderr.strip().splitlines()[-1])
            assert time.monotonic() < deadline, f"replace: {self.episode.refused}"
            time.sleep(0.5)
        self.layers[-1] = ("parallels", image)

    def copied(self, source: Path, target: Path) -> bool:
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            self.episode.refused.append(f"copy: {error}")
            return False
        return True

    def event(self, kind: str) -> LoggedEvent:
        """The only event of that kind in the log."""
        (found,) = logged_events(self.server.stderr, kind)
        return found

    def log_tail(self) -> list[str]:
        """The last lines of ploopd's log."""
        return [line for path in self.directory.glob("*.log") for line in _last_lines(path)]

    def run(self) -> None:
        """The whole episode; raises AssertionError for what is wrong."""
        self.make_image()
        raw = self.initial()
        content = raw.read_bytes()
        journal = Journal(
            self.episode.seed, lambda block: content[block * BLOCK : (block + 1) * BLOCK]
        )
        with ConfiguredProcess(self.config(), self.directory) as self.server:
            with Initiator(self.server.url) as initiator:
                initiator.settle()
                mix = Mix(write=0.6, read=0.3, flush=0.02, largest=8)
                area = range(SIZE // BLOCK)
                load = MeasuredLoad(initiator, journal, area, mix=mix, seed=self.episode.seed)
                self.perform(load)
                initiator.logout()
            code = self.server.stop()
            assert code == 0, f"ploopd ended with exit code {code}"
            assert "Traceback" not in self.server.stderr
        top = self.layers[-1][1]
        seen = oracles.read_through_qemu(self.layers, self.directory / "final.raw")
        journal.verify_file(seen, size=SIZE)
        report = oracles.qemu_check(top)
        assert not report.get("leaks"), f"qemu-img check: {report}"
        assert oracles.bat_problems(top) == []
        assert oracles.in_use_word(top) == 0, "the image is not closed"

    def perform(self, load: MeasuredLoad) -> None:
        load.run(requests=300)
        run_during(load, self.play, stall=PATIENCE + 2 * RECOVERY)
        load.run(requests=500)
        load.flush()
        load.verify()
        self.episode.requests = load.completed
        self.episode.longest = load.longest
        first = load.first_after(self.event("recovered").time)
        assert first is not None
        self.episode.first_completion_ms = 1000 * first


def _last_lines(path: Path, count: int = 60) -> list[str]:
    lines = path.read_text(errors="replace").splitlines()
    return [line for line in lines if "event=replace-step" not in line][-count:]


def episodes(
    storage: str, directory: Path, *, count: int, seed: int, journal: str
) -> Iterator[Episode]:
    """Play episodes on a new storage in `directory`; inside the namespaces only."""
    with Link() as link:
        rig = STORAGES[storage](directory, link)
        rig.start()
        for number in range(count):
            chosen = random.Random(seed * 1_000_003 + number)
            episode = Episode(
                number=number,
                seed=chosen.randrange(1 << 32),
                cut=chosen.choice([cut.value for cut in Cut]),
                image=chosen.choice(["delta", "chain"]),
                replacement=REPLACEMENTS[number % BATCH],
                journal=journal,
            )
            work = directory / f"work-{number}"
            work.mkdir()
            theatre = Theatre(rig, link, work, episode)
            try:
                theatre.run()
            except Exception as error:  # told, with the seed, and the next one is played
                episode.failure = f"{type(error).__name__}: {error}"
                episode.log = theatre.log_tail()
                link.restore()
            shutil.rmtree(work)
            shutil.rmtree(theatre.place, ignore_errors=True)
            yield episode


def play_apart(
    storage: str, directory: Path, *, count: int, seed: int, journal: str
) -> Iterator[Episode]:
    """The same from outside, in namespaces that are gone afterwards.

    RuntimeError when the storage cannot be set up.
    """
    command = [sys.executable, "-m", "tests.torture.link_cuts", storage]
    command += ["--inside", str(directory), "--episodes", str(count)]
    command += ["--seed", str(seed), "--journal", journal]
    process = subprocess.Popen(
        command_inside(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=_ROOT
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            yield Episode(**json.loads(line))
    except BaseException:
        process.kill()
        raise
    finally:
        process.stdout.close()
        code = process.wait()
    if code:
        raise RuntimeError(f"the episodes on {storage} ended with {code}")


def play_batch(storage: str, seed: int, directory: Path) -> Result:
    """What the programmes of `make torture` run: one set-up, one copy among the replacements."""
    played = list(play_apart(storage, directory, count=BATCH, seed=seed, journal="auto"))
    failed = [each for each in played if each.failure is not None]
    wrong = [each for each in failed if "expected version" in str(each.failure)]
    good = [each for each in played if each.failure is None]
    measures = {
        "standby after the cut, s": "to_standby",
        "recovery after the link's return, s": "to_recovery",
        "first answer after the replace, ms": "first_completion_ms",
    }
    return Result(
        episodes=len(played),
        errors=len(failed) - len(wrong),
        mismatches=len(wrong),
        notes=tuple(
            f"episode {each.number}: {each.failure}; ploopd wrote: {' | '.join(each.log[-8:])}"
            for each in failed
        ),
        worst={
            name: max(getattr(each, measure) for each in good)
            for name, measure in measures.items()
            if good
        },
    )


def missing_for(storage: str) -> str | None:
    """Why link cuts on that storage cannot be played here."""
    return (
        oracles.missing_for_fuse()
        or missing_for_namespaces()
        or missing_programs(STORAGES[storage])
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.torture.link_cuts")
    parser.add_argument("storage", choices=sorted(STORAGES))
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 16))
    parser.add_argument("--journal", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    storage, inside = arguments.storage, arguments.inside
    if inside is not None:
        tell(episodes, arguments, inside)
        return
    if (missing := missing_for(storage)) is not None:
        raise SystemExit(missing)
    with tempfile.TemporaryDirectory(prefix=f"{storage}.") as directory:
        failures = tell(play_apart, arguments, Path(directory))
    if failures:
        raise SystemExit(f"{failures} of {arguments.episodes} episodes failed")


def tell(
    play: Callable[..., Iterator[Episode]], arguments: argparse.Namespace, directory: Path
) -> int:
    """Print the episodes as they are played; returns how many failed."""
    failures = 0
    for episode in play(
        arguments.storage,
        directory,
        count=arguments.episodes,
        seed=arguments.seed,
        journal=arguments.journal,
    ):
        print(json.dumps(asdict(episode)), flush=True)
        failures += episode.failure is not None
    return failures


if __name__ == "__main__":
    main()
