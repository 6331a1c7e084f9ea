"""A verifying load: self-describing blocks, and a journal of what the target has promised.

Each 4 KiB block says which block it is, which version and of which run, with a checksum.  The
journal remembers per block every content that the target may now return: exactly the last one while
all is well, the last flushed one or any later one after a crash.
"""

from __future__ import annotations

import random
import struct
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.initiator import GOOD, Answer, Initiator, Kind

BLOCK = 4096
SECTORS = BLOCK // 512
HEADER = struct.Struct("<8sQQQI")
MAGIC = b"ploopblk"
INITIAL = 0


class LoadError(AssertionError):
    """The target answered with an error or with wrong data."""


class BlockCodec:
    """Makes and recognises self-describing blocks of one run (`seed`)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._filler = random.Random(seed).randbytes(1 << 20)

    def make(self, block: int, version: int) -> bytes:
        start = (block * 2654435761 + version * 40503) % ((1 << 20) - BLOCK)
        filler = self._filler[start : start + BLOCK - HEADER.size]
        checksum = zlib.crc32(filler, version ^ block)
        return HEADER.pack(MAGIC, block, version, self.seed, checksum) + filler

    def identify(self, data: bytes) -> str:
        """What a block says of itself, for messages."""
        magic, block, version, seed, _ = HEADER.unpack_from(data)
        if magic != MAGIC:
            return "zeros" if not any(data) else f"foreign data {data[:16].hex()}"
        whole = "intact" if data == self.make(block, version) else "TORN"
        return f"block {block} version {version} seed {seed:#x} ({whole})"


class Journal:
    """What every block may contain.

    `candidates[block]` lists versions in the order of issue; the first one is guaranteed.  A block
    that is not listed has its initial content: `initial(block)`, zeros by default.  Versions count
    up; a negative one stands for zeros.
    """

    def __init__(self, seed: int, initial: Callable[[int], bytes] | None = None) -> None:
        self.codec = BlockCodec(seed)
        self.initial = initial or (lambda block: bytes(BLOCK))
        self.candidates: dict[int, list[int]] = {}
        self.acknowledged: dict[int, int] = {}
        self.version = 0

    def issue(self, block: int, *, zero: bool = False) -> int:
        """A write of the block is about to be sent; returns the version to write."""
        self.version += 1
        version = -self.version if zero else self.version
        self.candidates.setdefault(block, [INITIAL]).append(version)
        return version

    def acknowledge(self, block: int, version: int) -> None:
        """The write of that version has ended with GOOD."""
        if abs(version) > abs(self.acknowledged.get(block, INITIAL)):
            self.acknowledged[block] = version

    def snapshot(self) -> dict[int, int]:
        """What a flush that is sent now will make durable."""
        return dict(self.acknowledged)

    def flushed(self, snapshot: dict[int, int]) -> None:
        """The flush has been acknowledged: older versions must never be seen again."""
        for block, version in snapshot.items():
            versions = self.candidates[block]
            while abs(versions[0]) < abs(version):
                del versions[0]
            if self.acknowledged.get(block) == version:
                del self.acknowledged[block]

    def content(self, block: int, version: int) -> bytes:
        if version == INITIAL:
            return self.initial(block)
        return bytes(BLOCK) if version < 0 else self.codec.make(block, version)

    def expect_last(self, block: int, data: bytes) -> None:
        """Raise LoadError unless the block has its newest version."""
        versions = self.candidates.get(block, [INITIAL])
        if data != self.content(block, versions[-1]):
            self._complain(block, versions[-1:], data)

    def expect_any(self, block: int, data: bytes) -> None:
        """After a crash: raise LoadError unless the block has a version that may have survived.

        What was found becomes the only one allowed from now on.
        """
        versions = self.candidates.get(block, [INITIAL])
        for version in reversed(versions):
            if data == self.content(block, version):
                self.candidates[block] = [version]
                self.acknowledged.pop(block, None)
                return
        self._complain(block, versions, data)

    def _complain(self, block: int, versions: list[int], data: bytes) -> None:
        raise LoadError(
            f"block {block} (byte {block * BLOCK}) contains {self.codec.identify(data)}, "
            f"expected version {' or '.join(map(str, versions))}"
        )

    def verify_file(self, raw: Path, *, size: int) -> int:
        """Every block of a raw file: known ones by the journal, all others must be initial.

        Returns the number of blocks that the load had written.
        """
        with raw.open("rb") as file:
            for block in range(size // BLOCK):
                data = file.read(BLOCK)
                if block in self.candidates:
                    self.expect_any(block, data)
                elif data != self.initial(block):
                    self._complain(block, [INITIAL], data)
        return len(self.candidates)


@dataclass(slots=True)
class Mix:
    """Shares of the kinds of requests, and how large they are in blocks."""

    write: float = 0.6
    read: float = 0.3
    zero: float = 0.0
    unmap: float = 0.0
    flush: float = 0.02
    largest: int = 8


@dataclass(slots=True)
class _Request:
    kind: str
    blocks: range
    versions: list[int] = field(default_factory=list)
    snapshot: dict[int, int] = field(default_factory=dict)
    started: float = 0.0


class Load:
    """Keeps `depth` requests in flight on the blocks in `area` and checks everything that returns.

    Without `overlap` no two requests in flight touch the same block.  With it, writes may race on
    one block, and the one issued last must win.  `repeat`: what ends with a unit attention is sent
    again, as every driver of a disk does; `attentions` are those that were seen.
    """

    def __init__(
        self,
        initiator: Initiator,
        journal: Journal,
        area: range,
        *,
        depth: int = 32,
        seed: int = 1,
        mix: Mix | None = None,
        overlap: bool = False,
        repeat: bool = False,
    ) -> None:
        self.initiator = initiator
        self.journal = journal
        self.area = area
        self.depth = depth
        self.mix = mix or Mix()
        self.overlap = overlap
        self.repeat = repeat
        self.attentions: list[str] = []
        self.random = random.Random(seed)
        self.completed = 0
        self.longest = 0.0
        self._requests: dict[int, _Request] = {}
        self._busy: dict[int, int] = {}

    @property
    def in_flight(self) -> int:
        return len(self._requests)

    def run(
        self,
        *,
        seconds: float | None = None,
        requests: int | None = None,
        until: Callable[[], bool] | None = None,
        tick: Callable[[], None] | None = None,
        stall: float = 60.0,
    ) -> None:
        """Go on until the time, the number of requests or `until` says stop; leaves none in flight.

        `tick` is called about every 10 ms.  Raises LoadError for a bad answer or when nothing is
        answered for `stall` seconds, ConnectionLostError when the connection breaks.
        """
        began = time.monotonic()
        goal = None if requests is None else self.completed + requests

        def finished() -> bool:
            if goal is not None and self.completed >= goal:
                return True
            if until is not None and until():
                return True
            return seconds is not None and time.monotonic() - began >= seconds

        while not finished():
            self._fill()
            self.step(stall, tick)
        self.finish(stall, tick)

    def step(self, stall: float = 60.0, tick: Callable[[], None] | None = None) -> None:
        """Wait for answers and check them."""
        waiting_since = time.monotonic()
        while True:
            if tick is not None:
                tick()
            answers = self.initiator.poll(0.01)
            if answers:
                break
            if time.monotonic() - waiting_since > stall:
                raise LoadError(f"no answer for {stall} s with {self.in_flight} in flight")
        for answer in answers:
            self._take(answer)

    def finish(self, stall: float = 60.0, tick: Callable[[], None] | None = None) -> None:
        """Wait until nothing is in flight."""
        while self._requests:
            self.step(stall, tick)

    def flush(self) -> None:
        """A flush by itself, waited for."""
        self.finish()
        self._submit_flush()
        self.finish()

    def verify(self, blocks: Iterable[int] | None = None, *, after_crash: bool = False) -> int:
        """Read blocks back (all known ones by default) and check them; returns how many."""
        self.finish()
        wanted = sorted(self.journal.candidates if blocks is None else blocks)
        kind = "recover" if after_crash else "read"
        position = 0
        while position < len(wanted) or self._requests:
            while position < len(wanted) and self.in_flight < self.depth:
                first = wanted[position]
                count = 1
                while (
                    count < 64
                    and position + count < len(wanted)
                    and wanted[position + count] == first + count
                ):
                    count += 1
                self._submit(_Request(kind, range(first, first + count)))
                position += count
            self.step()
        return len(wanted)

    def _fill(self) -> None:
        attempts = 0
        while self.in_flight < self.depth and attempts < 4 * self.depth:
            attempts += 1
            choice = self.random.random()
            mix = self.mix
            if choice < mix.flush:
                self._submit_flush()
                continue
            choice -= mix.flush
            blocks = self._choose_blocks()
            kind = next(
                (k for k, share in self._shares() if (choice := choice - share) < 0), "write"
            )
            free = not any(block in self._busy for block in blocks)
            if free or (self.overlap and kind == "write" and self._only_writes(blocks)):
                self._submit(_Request(kind, blocks))

    def _shares(self) -> list[tuple[str, float]]:
        mix = self.mix
        return [
            ("write", mix.write),
            ("read", mix.read),
            ("zero", mix.zero),
            ("unmap", mix.unmap),
        ]

    def _only_writes(self, blocks: range) -> bool:
        return all(self._busy.get(block, 0) >= 0 for block in blocks)

    def _choose_blocks(self) -> range:
        count = min(self.random.randint(1, self.mix.largest), len(self.area))
        first = self.random.randrange(self.area.start, self.area.stop - count + 1)
        return range(first, first + count)

    def _submit_flush(self) -> None:
        request = _Request("flush", range(0), snapshot=self.journal.snapshot())
        self._send(request)

    def _submit(self, request: _Request) -> None:
        blocks = request.blocks
        is_write = request.kind in ("write", "zero", "unmap")
        for block in blocks:
            # Writers are counted up, the single reader that is allowed is -1.
            self._busy[block] = self._busy.get(block, 0) + 1 if is_write else -1
        if is_write:
            zero = request.kind != "write"
            request.versions = [self.journal.issue(block, zero=zero) for block in blocks]
        self._send(request)

    def _send(self, request: _Request) -> None:
        blocks, journal, initiator = request.blocks, self.journal, self.initiator
        lba, sectors = blocks.start * SECTORS, len(blocks) * SECTORS
        if request.kind == "write":
            pairs = zip(blocks, request.versions, strict=True)
            tag = initiator.write(lba, b"".join(journal.codec.make(b, v) for b, v in pairs))
        elif request.kind == "zero":
            tag = initiator.write_zeroes(lba, sectors)
        elif request.kind == "unmap":
            tag = initiator.unmap(lba, sectors)
        elif request.kind == "flush":
            tag = initiator.synchronize_cache()
        else:
            tag = initiator.read(lba, sectors)
        request.started = time.monotonic()
        self._requests[tag] = request

    def _take(self, answer: Answer) -> None:
        if answer.kind is not Kind.COMMAND:
            return
        request = self._requests.pop(answer.tag)
        self.longest = max(self.longest, time.monotonic() - request.started)
        if self.repeat and answer.sense_text.startswith("sense 06"):
            self.attentions.append(answer.sense_text)
            self._send(request)
            return
        if answer.status != GOOD:
            raise LoadError(
                f"{request.kind} of blocks {request.blocks} ended with {answer.sense_text}"
            )
        self.completed += 1
        for block in request.blocks:
            left = self._busy[block] - 1
            if left > 0:
                self._busy[block] = left
            else:
                del self._busy[block]
        self._judge(request, answer)

    def _judge(self, request: _Request, answer: Answer) -> None:
        journal = self.journal
        if request.kind == "flush":
            journal.flushed(request.snapshot)
            return
        for place, block in enumerate(request.blocks):
            if request.kind in ("read", "recover"):
                data = answer.data[place * BLOCK : (place + 1) * BLOCK]
                if request.kind == "read":
                    journal.expect_last(block, data)
                else:
                    journal.expect_any(block, data)
            else:
                journal.acknowledge(block, request.versions[place])


def initial_from(raw: Path) -> Callable[[int], bytes]:
    """The initial content of a disk that was made from a raw file."""

    def read(block: int) -> bytes:
        with raw.open("rb") as file:
            file.seek(block * BLOCK)
            return file.read(BLOCK).ljust(BLOCK, b"\0")

    return read
