"""What the standby gate costs in the data path: `python -m bench.gate`.

Nanoseconds per call, without a gate, and with one whose fuses are off or on.  The device below
answers at once and does nothing, so that the differences are the gate's; two rows are a real image
on tmpfs, for scale.  The columns of a row are measured in turns, and the quietest turn counts.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from ploopd.errors import StorageError
from ploopd.fileio.engine import make_engine
from ploopd.gate.filter import Gate
from ploopd.storage.device import BlockDevice, Done, Extent
from ploopd.storage.opener import OpenOptions, open_volume
from ploopd.storage.volume import Volume
from scst_shim import QueueFlags, StandbyCheck

SIZE = 64 << 20
LENGTH = 4096
COLUMNS = ("no gate", "key off", "EN off", "both on")
TARGET = 0.05
"""How much slower the two fuses may make a call, as a share of it."""


class NothingPending:
    """An operation that is over."""

    def cancel(self) -> bool:
        return False


class Nothing:
    """A block device that says yes to everything."""

    size = SIZE
    cluster_size = 1 << 20
    read_only = False

    def __init__(self) -> None:
        self._pending = NothingPending()

    def try_read(self, offset: int, buffer: memoryview) -> bool:
        return True

    def try_write(self, offset: int, buffer: memoryview) -> bool:
        return True

    def read(self, offset: int, buffer: memoryview, done: Done) -> NothingPending:
        done(None)
        return self._pending

    def write(
        self, offset: int, buffer: memoryview, done: Done, *, fua: bool = False
    ) -> NothingPending:
        done(None)
        return self._pending

    def write_zeroes(
        self, offset: int, length: int, done: Done, *, unmap: bool = False, fua: bool = False
    ) -> NothingPending:
        done(None)
        return self._pending

    def discard(self, offset: int, length: int, done: Done) -> NothingPending:
        done(None)
        return self._pending

    def flush(self, done: Done) -> NothingPending:
        done(None)
        return self._pending

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return iter(())

    def kick(self) -> None:
        """There is nothing to begin."""


def devices(below: BlockDevice) -> list[BlockDevice]:
    """`below`, and gates over it, one for each column."""
    found: list[BlockDevice] = [below]
    for key, en in ((False, True), (True, False), (True, True)):
        check = StandbyCheck()
        if key:
            check.enable()
        gate = Gate(
            below,
            name="bench",
            fuses=QueueFlags("bench", check, warn=lambda _: None),
            clock=time.monotonic,
            on_event=lambda _: None,
        )
        if en:
            gate.bind()
        found.append(gate)
    return found


def nobody(error: StorageError | None) -> None:
    """A completion that does nothing."""


Call = Callable[[BlockDevice, memoryview], Callable[[], object]]


def slow_read(device: BlockDevice, buffer: memoryview) -> Callable[[], object]:
    return partial(device.read, 0, buffer, nobody)


def slow_write(device: BlockDevice, buffer: memoryview) -> Callable[[], object]:
    return partial(device.write, 0, buffer, nobody)


def inline_read(device: BlockDevice, buffer: memoryview) -> Callable[[], object]:
    return partial(device.try_read, 0, buffer)


def inline_write(device: BlockDevice, buffer: memoryview) -> Callable[[], object]:
    return partial(device.try_write, 0, buffer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One kind of call: nanoseconds in the order of COLUMNS."""

    name: str
    times: tuple[float, ...]

    @property
    def fuses_cost(self) -> float:
        """What the fuses cost: both on against the cheaper of one off."""
        return self.times[3] - min(self.times[1:3])


def measure(name: str, call: Call, below: BlockDevice, *, calls: int, turns: int) -> Row:
    """Time `call` on each of `devices(below)`."""
    buffer = memoryview(bytearray(LENGTH))
    targets = [call(device, buffer) for device in devices(below)]
    best = [float("inf")] * len(targets)
    numbers = range(calls)
    for turn in range(turns):
        for shift in range(len(targets)):
            index = (turn + shift) % len(targets)
            target = targets[index]
            began = time.perf_counter_ns()
            for _ in numbers:
                target()
            best[index] = min(best[index], (time.perf_counter_ns() - began) / calls)
    return Row(name=name, times=tuple(best))


def measure_all(directory: Path, *, calls: int, turns: int) -> list[Row]:
    """Every row; `directory` is where the real image is made."""
    nothing = Nothing()
    rows = [
        measure(name, call, nothing, calls=calls, turns=turns)
        for name, call in (
            ("`try_read`", inline_read),
            ("`try_write`", inline_write),
            ("`read`, answered at once", slow_read),
            ("`write`, answered at once", slow_write),
        )
    ]
    image = directory / "disk.raw"
    image.write_bytes(os.urandom(SIZE))
    engine = make_engine("threads")
    try:
        volume: Volume = open_volume(image, OpenOptions(io="inline"), engine)
        try:
            for name, call in (("`try_read`", inline_read), ("`try_write`", inline_write)):
                title = f"{name}, 4 KiB of an image on tmpfs"
                rows.append(measure(title, call, volume, calls=calls // 10, turns=turns))
        finally:
            volume.abandon()
    finally:
        engine.close()
    return rows


def render(rows: list[Row]) -> str:
    """The table in Markdown."""
    lines = [
        "| ns per call | " + " | ".join(COLUMNS) + " | fuses |",
        "|---|" + "---:|" * (len(COLUMNS) + 1),
    ]
    for row in rows:
        times = " | ".join(f"{one:,.0f}" for one in row.times)
        lines.append(f"| {row.name} | {times} | {row.fuses_cost:+,.0f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.gate", description=__doc__)
    parser.add_argument("--calls", type=int, default=4000, help="calls of one turn")
    parser.add_argument("--turns", type=int, default=500)
    options = parser.parse_args()

    async def run() -> list[Row]:
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="bench-gate.") as directory:
            return measure_all(Path(directory), calls=options.calls, turns=options.turns)

    rows = trio.run(run)
    print(render(rows))
    slow = [row.name for row in rows if row.fuses_cost > TARGET * row.times[3]]
    for name in slow:
        print(f"{name}: the fuses cost more than {TARGET:.0%}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
