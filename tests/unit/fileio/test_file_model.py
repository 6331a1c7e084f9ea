"""Random reads, writes, holes and allocations under every policy against a byte array."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from ploopd.fileio import uring
from ploopd.fileio.engine import make_engine
from ploopd.fileio.file import CacheMode, File

SIZE = 1 << 16

VARIANTS = [
    ("io_uring", "auto", CacheMode.WRITEBACK),
    ("io_uring", "io_uring", CacheMode.WRITEBACK),
    ("io_uring", "auto", CacheMode.NONE),
    ("io_uring", "threads", CacheMode.WRITEBACK),
    ("threads", "auto", CacheMode.WRITEBACK),
    ("threads", "auto", CacheMode.NONE),
    ("threads", "inline", CacheMode.WRITEBACK),
]

position = st.integers(0, SIZE - 1)
extent = st.tuples(position, st.integers(1, 9000)).map(lambda p: (p[0], min(p[1], SIZE - p[0])))
sectors = st.tuples(st.integers(0, 127), st.integers(1, 16)).map(
    lambda p: (p[0] * 512, min(p[1], 128 - p[0]) * 512)
)
step = st.tuples(
    st.sampled_from(["read", "write", "write", "punch", "allocate", "sync", "blocking"]),
    st.one_of(extent, sectors),
    st.integers(1, 255),
)


async def run_steps(
    path: Path,
    variant: tuple[str, str, CacheMode],
    steps: list,  # type: ignore[type-arg]
) -> bytearray:
    kind, io, cache = variant
    engine = make_engine(kind)
    model = bytearray(SIZE)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        file = File.open(path, read_only=False, engine=engine, cache=cache, io=io)
        for number, (verb, (offset, length), fill) in enumerate(steps):
            match verb:
                case "read":
                    view = memoryview(bytearray(length + 1))[1:]
                    if not file.try_read(view, offset):
                        await file.aread(view, offset)
                    assert view == model[offset : offset + length]
                case "write":
                    data = bytes((fill + number + i) & 255 for i in range(length))
                    if not file.try_write(memoryview(data), offset):
                        await file.awrite(data, offset)
                    model[offset : offset + length] = data
                case "punch":
                    await file.async_punch(offset, length)
                    model[offset : offset + length] = bytes(length)
                case "allocate":
                    await file.async_allocate(offset, length)
                case "sync":
                    await file.async_sync()
                case "blocking":
                    assert file.pread(length, offset) == model[offset : offset + length]
        file.close()
        nursery.cancel_scope.cancel()
    engine.close()
    return model


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v[0]}-{v[1]}-{v[2].value}")
@pytest.mark.parametrize("parent", ["/dev/shm", None], ids=["memory", "disk"])
@settings(max_examples=12, deadline=None)
@given(steps=st.lists(step, min_size=10, max_size=40))
def test_a_file_is_an_array_of_bytes(
    variant: tuple[str, str, CacheMode],
    parent: str | None,
    steps: list,  # type: ignore[type-arg]
) -> None:
    if variant[0] == "io_uring" and uring.probe() is not None:
        pytest.skip("no io_uring")
    with tempfile.TemporaryDirectory(dir=parent, prefix="ploopd-test-") as directory:
        path = Path(directory) / "image"
        path.write_bytes(bytes(SIZE))
        model = trio.run(run_steps, path, variant, steps)
        assert path.read_bytes() == model
