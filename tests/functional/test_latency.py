"""Storage that answers after a millisecond: requests must wait side by side, not in a row."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench.jobs import Job, RunError, Sample, Timing, build_generator, run_job
from bench.servers import Endpoint
from tests.support import images, oracles
from tests.support.images import MIB
from tests.support.serve import ServeProcess
from tests.support.slowfs import SlowFs, SlowFsMissingError

pytestmark = [pytest.mark.functional, pytest.mark.fuse, pytest.mark.timeout(150)]

ROOT = Path(__file__).resolve().parents[2]
TIMING = Timing(warmup=0.3, measured=1.5, size_mib=64)
WANTED = 15.0
BUSY = 0.7
"""Cores used by others (slowfs itself takes up to 0.4): more, and CPU is measured, not waiting."""


def randread(depth: int) -> Job:
    return Job(
        name=f"qd{depth}", title="", operation="read", pattern="random", block=4096, depth=depth
    )


def ratio_on(delay_us: int, cache: str, generator: Path, directory: Path) -> tuple[float, bool]:
    """QD32 over QD1 at that latency, the best of three, and whether the machine was quiet."""
    slow = SlowFs(directory / "source", directory / "mount", delay_us=delay_us, build=directory)
    best, quiet = 0.0, False
    with slow:
        image = slow.mountpoint / "disk.hds"
        with ServeProcess(image, directory=directory, options=("--cache", cache)) as server:
            url = server.url
            endpoint = Endpoint(
                protocol="iscsi", host=url.host, port=url.port, name=url.iqn, lun=url.lun
            )

            def measure(depth: int) -> Sample:
                return run_job(generator, endpoint, server.pid, randread(depth), TIMING)

            for _ in range(3):
                single, many = measure(1), measure(32)
                assert single.latency_p50_us > delay_us, "the storage is not slow"
                best = max(best, many.iops / single.iops)
                quiet |= many.foreign_cpu < BUSY
                if best >= WANTED:
                    break
    return best, quiet


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_depth_hides_latency(cache: str, tmp_path: Path) -> None:
    """32 in flight give at least 15 times the rate of one.

    At 1 ms that takes some 13,000 requests a second.  Where other programs hold the CPUs, storage
    of 5 ms shows the same thing without needing them.
    """
    if oracles.have("pkg-config", "fusermount3"):
        pytest.skip("not installed: apt-get install gcc pkg-config fuse3 libfuse3-dev")
    (tmp_path / "source").mkdir()
    size = TIMING.size_mib * MIB
    raw = images.make_content(tmp_path / "content.raw", size, seed=1, density=1.0)
    shutil.move(images.qemu_image(tmp_path, "disk.hds", raw), tmp_path / "source" / "disk.hds")
    try:
        generator = build_generator(ROOT / "bench" / "loadgen.c", tmp_path)
        ratio, quiet = ratio_on(1000, cache, generator, tmp_path)
        if ratio < WANTED and not quiet:
            ratio, quiet = ratio_on(5000, cache, generator, tmp_path)
    except (RunError, SlowFsMissingError) as error:
        pytest.skip(str(error))
    assert ratio >= WANTED, f"QD32 is only {ratio:.1f} times as fast as QD1 (quiet: {quiet})"
