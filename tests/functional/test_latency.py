"""Storage that answers after a millisecond: requests must wait side by side, not in a row."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import images, oracles
from tests.support.images import MIB
from tests.support.serve import ServeProcess
from tests.support.slowfs import SlowFs, SlowFsMissingError

pytestmark = [pytest.mark.functional, pytest.mark.fuse, pytest.mark.timeout(120)]

SIZE_MIB = 64
ATTEMPTS = 3


def reads_per_second(generator: Path, server: ServeProcess, depth: int) -> float:
    url = server.url
    target = ["iscsi", url.host, str(url.port), url.iqn, str(url.lun)]
    job = ["read", "random", "4096", str(depth), "1.5", "0.3", str(SIZE_MIB)]
    result = subprocess.run(
        [str(generator), *target, *job], capture_output=True, text=True, timeout=30, check=True
    )
    return float(json.loads(result.stdout)["iops"])


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_depth_hides_latency(cache: str, tmp_path: Path) -> None:
    """32 in flight give at least 15 times the rate of one (the best of a few attempts counts)."""
    if oracles.have("cc", "pkg-config", "fusermount3"):
        pytest.skip("not installed: apt-get install gcc pkg-config fuse3 libfuse3-dev")
    from bench.jobs import build_generator

    root = Path(__file__).resolve().parents[2]
    generator = build_generator(root / "bench" / "loadgen.c", tmp_path)
    source = tmp_path / "source"
    source.mkdir()
    raw = images.make_content(tmp_path / "content.raw", SIZE_MIB * MIB, seed=1, density=1.0)
    shutil.move(images.qemu_image(tmp_path, "disk.hds", raw), source / "disk.hds")
    try:
        slow = SlowFs(source, tmp_path / "mount", delay_us=1000, build=tmp_path)
        slow.__enter__()
    except SlowFsMissingError as error:
        pytest.skip(str(error))
    try:
        image = slow.mountpoint / "disk.hds"
        with ServeProcess(image, directory=tmp_path, options=("--cache", cache)) as server:
            ratios = []
            for _ in range(ATTEMPTS):
                single = reads_per_second(generator, server, 1)
                ratios.append(reads_per_second(generator, server, 32) / single)
                if ratios[-1] >= 15:
                    break
            assert max(ratios) >= 15, f"QD32 is {ratios} times as fast as QD1"
    finally:
        slow.__exit__()
