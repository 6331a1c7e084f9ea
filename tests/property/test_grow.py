"""Random images that grow again and again: the content stays, the new part is zeros, and QEMU sees
the same disk as we do."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_format import PvdHeader, parse_descriptor
from ploopd.storage.check import check_all
from ploopd.storage.grow import grow_image
from tests.support import images, oracles

pytestmark = [pytest.mark.functional, pytest.mark.timeout(300)]

SECTOR = 512
KIB = 1024
EXAMPLES = 60


@dataclass(frozen=True, kw_only=True)
class Case:
    """`sectors` of the disk; for each layer, base first, which of its clusters it has, and how many
    sectors of the disk it lacks.  `growths`: sectors by which the disk grows."""

    version: int
    cluster_size: int
    sectors: int
    layers: tuple[tuple[frozenset[int], int], ...]
    raw_base: bool
    leaks: int
    growths: tuple[int, ...]
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    cluster = draw(st.sampled_from((32 * KIB, 64 * KIB, 256 * KIB)))
    per_cluster = cluster // SECTOR
    clusters = draw(st.integers(1, 12))
    sectors = clusters * per_cluster - draw(st.sampled_from((0, 0, 1, per_cluster // 2)))
    layers = tuple(
        draw(
            st.tuples(
                st.frozensets(st.integers(0, clusters - 1), max_size=clusters),
                st.integers(0, sectors // 2),
            )
        )
        for _ in range(draw(st.integers(0, 2)))
    )
    top = draw(st.frozensets(st.integers(0, clusters - 1), max_size=clusters))
    entries = per_cluster * SECTOR // 4  # of a cluster of BAT
    growth = st.one_of(st.integers(0, 4 * per_cluster), st.integers(0, 4 * entries * per_cluster))
    return Case(
        version=draw(st.sampled_from((1, 2))),
        cluster_size=cluster,
        sectors=sectors,
        layers=(*layers, (top, 0)),
        raw_base=draw(st.booleans()),
        leaks=draw(st.integers(0, 3)),
        growths=tuple(draw(st.lists(growth, min_size=1, max_size=3))),
        seed=draw(st.integers(0, 1 << 32)),
    )


def make(case: Case, directory: Path) -> tuple[list[oracles.Layer], bytes]:
    """The files, and what the disk holds."""
    generator = random.Random(case.seed)
    cluster, size = case.cluster_size, case.sectors * SECTOR
    content = bytearray(-(-size // cluster) * cluster)
    layers: list[oracles.Layer] = []
    rows = []
    end = size
    sizes = []
    for _, shorter in reversed(case.layers):
        end = max(SECTOR, end - shorter * SECTOR)
        sizes.append(end)
    sizes.reverse()
    for number, (chosen, _) in enumerate(case.layers):
        path = directory / f"{number}.hds"
        own = sizes[number]
        if case.raw_base and number == 0 and len(case.layers) > 1:
            data = generator.randbytes(own)
            path.write_bytes(data)
            content[:own] = data
            layers.append(("raw", path))
        else:
            clusters = {
                index: generator.randbytes(cluster) for index in chosen if index * cluster < own
            }
            last = own // cluster
            if own < size and last in clusters:
                # What a shorter delta has behind its end is not defined: QEMU does not show it.
                clusters[last] = clusters[last][: own % cluster].ljust(cluster, b"\0")
            order = tuple(sorted(clusters, key=lambda _: generator.random()))
            images.write_delta(
                path, own, clusters, cluster_size=cluster, version=case.version, order=order
            )
            for index, data in clusters.items():
                content[index * cluster : (index + 1) * cluster] = data
            layers.append(("parallels", path))
        kind = "Plain" if layers[-1][0] == "raw" else "Compressed"
        guid = images.TOP_GUID if number == len(case.layers) - 1 else images.guid(number)
        rows.append((guid, kind, path.name))
    with layers[-1][1].open("ab") as file:
        file.write(generator.randbytes(case.leaks * cluster))
    images.write_descriptor(directory, size, rows, cluster_size=cluster)
    return layers, bytes(content[:size])


@settings(max_examples=EXAMPLES, deadline=None)
@given(case=cases())
def test_content_stays_and_the_rest_is_zeros(case: Case) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        layers, content = make(case, directory)
        top = layers[-1][1]
        size = case.sectors * SECTOR
        for growth in case.growths:
            wanted = size + growth * SECTOR
            grown = grow_image(directory, wanted)
            assert grown.previous == size
            assert wanted <= grown.size < wanted + case.cluster_size
            assert grown.size % case.cluster_size == 0 or grown.size == size
            size = grown.size
            header = PvdHeader.parse(top.read_bytes()[:64])
            said = parse_descriptor((directory / "DiskDescriptor.xml").read_bytes())
            assert header.size == said.disk_size_sectors * SECTOR == size
            for report in check_all(directory):
                assert report.corruptions == 0, report.details
        judge(layers, content, size, directory)


def judge(layers: list[oracles.Layer], content: bytes, size: int, directory: Path) -> None:
    seen = oracles.read_through_qemu(layers, directory / "seen.raw")
    assert seen.stat().st_size == size
    expected = directory / "expected.raw"
    with expected.open("wb") as file:
        file.write(content)
        file.truncate(size)
    oracles.assert_same_content(seen, expected)
