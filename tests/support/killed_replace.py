"""A daemon that is killed after any single step of a replace: what is opened next is a whole chain.

A verified load runs, the device is put into standby, its top is copied and replaced by the copy;
the daemon is killed after the first, the second, ... system call by which it changes a file.  After
each kill the daemon is started again on the same descriptor, with nobody's help: no flushed write
may be lost, whichever chain it finds.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from image_format import chain as chain_of
from image_format import parse_descriptor
from ploopd.control import messages
from ploopd.control.client import ControlClient
from tests.support import images, oracles
from tests.support.images import MIB
from tests.support.initiator import ConnectionLostError, Initiator
from tests.support.load import BLOCK, Journal, Load, Mix, initial_from
from tests.support.serve import ServeProcess
from tests.support.system_calls import Stepper

SIZE = 16 * MIB
CLUSTER = 64 << 10
MOST_CALLS = 60
PATIENCE = 150.0
"""Seconds for a replace, or its end: a sync of a disk that others use as well may take many."""

WAYS: dict[str, tuple[tuple[str, ...], str]] = {
    "new name": ((), "DiskDescriptor.xml"),
    "old name kept": (("--keep-name",), "top.hds"),
}
"""The options of a replace, and the name whose change makes the new chain the one that counts."""


def kill_after_each(directory: Path, way: str, numbers: Iterable[int], *, seed: int) -> int:
    """Replace again and again, kill after calls `numbers`, until there are no more calls.

    Returns how often it was killed.  AssertionError for a chain that is neither the old one nor,
    after the rename, the new one, and for a write that was flushed and is not there.
    """
    options, name = WAYS[way]
    found_new: dict[int, bool] = {}
    calls: list[str] = []
    for number in numbers:
        place = directory / str(number) / "disk"
        place.mkdir(parents=True)
        play = kill_one(place, make_chain(place), options, number, seed * MOST_CALLS + number)
        renamed = not (place / "new.hds").exists()
        found_new[number] = renamed or names(place)[1] == "new.hds"
        shutil.rmtree(place.parent)
        if play.finished:
            calls = play.calls
            break
    told = "\n".join(calls)
    assert len(calls) > 6, f"too few calls were seen, or more than {MOST_CALLS}:\n{told}"
    # Without its ")": where threads take turns, strace prints a call in two halves.
    there = re.compile(rf'rename.*, "[^"]*/{re.escape(name)}"')
    turns = [index for index, call in enumerate(calls, 1) if there.match(call)]
    assert len(turns) == 1, told
    assert found_new == {number: number >= turns[0] for number in found_new}, told
    return len(found_new) - 1


def make_chain(directory: Path) -> Path:
    """Two deltas, of which the lower one has every second cluster; returns its content."""
    content = bytearray(SIZE)
    clusters = {}
    for index in range(0, SIZE // CLUSTER, 2):
        clusters[index] = bytes([index % 251 + 1]) * CLUSTER
        content[index * CLUSTER : (index + 1) * CLUSTER] = clusters[index]
    images.write_delta(directory / "base.hds", SIZE, clusters, cluster_size=CLUSTER)
    images.write_delta(directory / "top.hds", SIZE, {}, cluster_size=CLUSTER)
    rows = [
        (images.guid(1), "Compressed", "base.hds"),
        (images.TOP_GUID, "Compressed", "top.hds"),
    ]
    images.write_descriptor(directory, SIZE, rows, cluster_size=CLUSTER)
    raw = directory.parent / "initial.raw"
    raw.write_bytes(content)
    return raw


def names(directory: Path) -> list[str]:
    """The chain that the descriptor names, base first; it must be a valid one."""
    descriptor = parse_descriptor((directory / "DiskDescriptor.xml").read_bytes())
    return [entry.file for entry in chain_of(descriptor)]


@dataclass
class Replacing(threading.Thread):
    """Puts the device into standby, replaces its top, and kills the daemon after call `number`.

    `finished`: the replace had ended before that.
    """

    server: ServeProcess
    directory: Path
    options: tuple[str, ...]
    number: int
    finished: bool = False
    calls: list[str] = field(default_factory=list)
    error: BaseException | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    def __hash__(self) -> int:
        return id(self)

    def run(self) -> None:
        try:
            self._play()
        except BaseException as error:
            self.error = error
        finally:
            self.ended.set()

    def _play(self) -> None:
        server, directory = self.server, self.directory
        with ControlClient(server.control) as client:
            client.call(
                messages.STANDBY_ENTER,
                messages.StandbyState,
                messages.DeviceName(name="disk"),
                waiting="standby",
            )
        new = directory / "new.hds"
        shutil.copyfile(directory / "top.hds", new)
        names = ("DiskDescriptor.xml", "DiskDescriptor.xml.tmp", "top.hds", "base.hds", "new.hds")
        paths = [directory, *(directory / name for name in names)]
        log = directory.parent / "strace.log"
        log.unlink(missing_ok=True)
        with Stepper(server.pid, paths, log) as stepper:
            command = [sys.executable, "-m", "ploopd.cli.ploopctl"]
            command += ["--control", str(server.control), "device", "replace", "disk"]
            command += ["--timeout", str(PATIENCE)]
            command += ["--image", str(new), "--force", *self.options]
            replace = subprocess.Popen(command, text=True, stderr=subprocess.PIPE)
            killed = stepper.kill_after(self.number, replace)
            try:
                _, said = replace.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired as error:
                # A killed process ends only when its last system call does.
                raise AssertionError(
                    f"killed={killed}, and {replace.args} has not ended:\n{error.stderr!r}\n"
                    f"{stepper.state()}"
                ) from error
            self.finished = "release" in said
            assert killed or self.finished, said
        self.calls = stepper.calls


def kill_one(
    directory: Path, raw: Path, options: tuple[str, ...], number: int, seed: int
) -> Replacing:
    """One episode; returns what happened."""
    journal = Journal(seed, initial_from(raw))
    descriptor = directory / "DiskDescriptor.xml"
    # With the ring the probe's write would be no system call.
    with ServeProcess(
        descriptor, directory=directory.parent, options=("--io", "threads")
    ) as server:
        with Initiator(server.url) as initiator:
            initiator.settle()
            mix = Mix(write=0.7, read=0.2, flush=0.08, largest=8)
            load = Load(initiator, journal, range(SIZE // BLOCK), seed=seed, mix=mix)
            load.run(requests=200)
            play = Replacing(server, directory, options, number)
            play.start()
            try:
                load.run(until=play.ended.is_set)
                load.run(requests=100)
            except ConnectionLostError:
                play.ended.wait(60)
            if play.error is not None:
                raise play.error
            server.kill()
        judge(directory)
        server.restart()
        with Initiator(server.url) as initiator:
            initiator.settle()
            checked = Load(initiator, journal, range(SIZE // BLOCK)).verify(after_crash=True)
            initiator.logout()
        assert server.stop() == 0, server.stderr[-3000:]
    assert checked
    layers = [("parallels", directory / name) for name in names(directory)]
    seen = oracles.read_through_qemu(layers, directory.parent / "final.raw")
    assert journal.verify_file(seen, size=SIZE) == checked
    assert oracles.in_use_word(layers[-1][1]) == 0
    oracles.qemu_check(layers[-1][1])
    return play


def judge(directory: Path) -> None:
    """What lies there after the kill, before anybody opens it."""
    chain = names(directory)
    assert chain[0] == "base.hds"
    for name in ("top.hds", "new.hds"):
        path = directory / name
        if not path.exists():
            continue
        assert oracles.bat_problems(path) == []
        copy = directory.parent / "dead.hds"
        shutil.copyfile(path, copy)
        with copy.open("r+b") as file:  # qemu-img calls the in-use word itself a corruption
            file.seek(44)
            file.write(bytes(4))
        oracles.qemu_check(copy)
    assert (directory / chain[1]).exists()
