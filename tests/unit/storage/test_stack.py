"""Chains as a whole: large ones fit into time and memory, odd ones are read as QEMU reads them."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trio

from image_format import new_header
from tests.support import images, oracles
from tests.support.volumes import open_disk, running_engine

CLUSTER = 32 << 10

MEASURE = """
import re, sys, time
from ploopd.fileio.engine import make_engine
from ploopd.storage.opener import OpenOptions, open_volume
engine = make_engine("threads")
start = time.process_time()
volume = open_volume(sys.argv[1], OpenOptions(read_only=True), engine)
seconds = time.process_time() - start
status = open("/proc/self/status").read()  # not getrusage: that counts our parent's peak, too
print(seconds, int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024, flush=True)
volume.abandon()
"""


def thin_delta(path: Path, size: int, allocated: int, seed: int) -> Path:
    """A sparse file of any size with `allocated` entries in random places."""
    header = new_header(size=size)
    generator = np.random.default_rng(seed)
    entries = np.zeros(header.bat_entries, dtype="<u4")
    places = generator.choice(header.bat_entries, allocated, replace=False)
    entries[places] = np.arange(allocated) + header.header_clusters
    with path.open("wb") as file:
        file.write(header.pack())
        file.write(entries.tobytes())
        file.truncate(header.data_offset + allocated * header.cluster_size)
    return path


def measure(path: Path) -> tuple[float, float]:
    """CPU seconds and peak MiB of a process that opens the image."""
    command = [sys.executable, "-c", MEASURE, str(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, mebibytes = map(float, output.split())
    return seconds, mebibytes


@pytest.mark.slow
def test_16_tib_open_in_two_seconds(shm: Path) -> None:
    path = thin_delta(shm / "disk.hds", 16 << 40, 100_000, seed=1)
    seconds, mebibytes = measure(path)
    assert seconds <= 2
    assert mebibytes < 400


@pytest.mark.slow
def test_one_bat_at_a_time_is_in_memory(shm: Path) -> None:
    """128 tables of 4 MiB and a map of 5 MiB: all of them would be half a GiB."""
    entries = []
    for number in range(128):
        thin_delta(shm / f"{number}.hds", 1 << 40, 500, seed=number)
        entries.append((images.guid(number), "Compressed", f"{number}.hds"))
    path = images.write_descriptor(shm, 1 << 40, entries, top_guid=entries[-1][0])
    seconds, mebibytes = measure(path)
    assert seconds <= 4
    assert mebibytes < 150


def read_all(path: Path) -> bytes:
    async def run() -> bytes:
        async with (
            running_engine("threads") as engine,
            open_disk(path, engine, read_only=True) as disk,
        ):
            return await disk.read(0, disk.size)

    return trio.run(run)


def test_any_cluster_size_can_be_read(tmp_path: Path) -> None:
    raw = images.make_content(tmp_path / "raw", 3 << 20, seed=4)
    path = images.qemu_image(tmp_path, "disk.hds", raw, "cluster_size=63k")
    assert struct.unpack_from("<I", path.read_bytes(), 28)[0] == 126
    assert read_all(path) == raw.read_bytes()


def test_version_1_over_version_2_can_be_read(tmp_path: Path) -> None:
    size = 8 * CLUSTER
    images.write_delta(tmp_path / "base.hds", size, {1: b"\x01" * CLUSTER}, cluster_size=CLUSTER)
    images.write_delta(
        tmp_path / "top.hds", size, {2: b"\x02" * CLUSTER}, cluster_size=CLUSTER, version=1
    )
    entries = [
        (images.guid(0), "Compressed", "base.hds"),
        (images.guid(1), "Compressed", "top.hds"),
    ]
    path = images.write_descriptor(
        tmp_path, size, entries, cluster_size=CLUSTER, top_guid=entries[-1][0]
    )
    expected = bytes(CLUSTER) + b"\x01" * CLUSTER + b"\x02" * CLUSTER + bytes(5 * CLUSTER)
    assert read_all(path) == expected


@pytest.mark.parametrize("whole", [True, False])
def test_raw_base_that_is_shorter_than_the_disk(tmp_path: Path, whole: bool) -> None:
    size = 6 * CLUSTER
    base = os.urandom(3 * CLUSTER + (0 if whole else 1536))
    (tmp_path / "base.raw").write_bytes(base)
    top = images.write_delta(tmp_path / "top.hds", size, {}, cluster_size=CLUSTER)
    entries = [
        (images.guid(0), "Plain", "base.raw"),
        (images.guid(1), "Compressed", "top.hds"),
    ]
    path = images.write_descriptor(
        tmp_path, size, entries, cluster_size=CLUSTER, top_guid=entries[-1][0]
    )
    expected = bytearray(base.ljust(size, b"\0"))
    assert read_all(path) == expected

    async def run() -> None:
        async with running_engine() as engine, open_disk(path, engine) as disk:
            await disk.write(4 * CLUSTER - 512, b"\x07" * 512)

    trio.run(run)
    expected[4 * CLUSTER - 512 : 4 * CLUSTER] = b"\x07" * 512
    assert read_all(path) == expected
    layers = [("raw", tmp_path / "base.raw"), ("parallels", top)]
    assert oracles.read_through_qemu(layers, tmp_path / "out").read_bytes() == expected


def test_a_single_raw_image_in_a_descriptor(tmp_path: Path) -> None:
    size = 3 * CLUSTER + 512
    content = os.urandom(size)
    (tmp_path / "disk.raw").write_bytes(content)
    path = images.write_descriptor(
        tmp_path,
        size,
        [(images.guid(0), "Plain", "disk.raw")],
        cluster_size=CLUSTER,
        top_guid=images.guid(0),
    )
    assert read_all(path) == content
