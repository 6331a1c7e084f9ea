"""What initiators read is what QEMU's own parallels driver reads, and the other way round."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.functional.conftest import Serve
from tests.support import oracles
from tests.support.images import MIB, ImageCase, chain_of_three, make_content
from tests.support.oracles import qemu_io

pytestmark = pytest.mark.functional


def test_content_is_identical(image: ImageCase, serve: Serve, tmp_path: Path) -> None:
    before = {path: oracles.digest(path) for _, path in image.layers[:-1]}
    server = serve(image.serve)
    seen = oracles.read_through_iscsi(str(server.url), tmp_path / "iscsi.raw")
    oracles.assert_same_content(seen, image.raw)
    assert server.stop() == 0
    qemu = oracles.read_through_qemu(image.layers, tmp_path / "qemu.raw")
    oracles.assert_same_content(qemu, image.raw)
    assert {path: oracles.digest(path) for path in before} == before


def test_read_only_leaves_every_byte_alone(image: ImageCase, serve: Serve, tmp_path: Path) -> None:
    before = {path: oracles.digest(path) for _, path in image.layers}
    server = serve(image.serve, options=("--read-only",))
    seen = oracles.read_through_iscsi(str(server.url), tmp_path / "iscsi.raw")
    oracles.assert_same_content(seen, image.raw)
    with pytest.raises(oracles.OracleError):
        qemu_io(str(server.url), "write -P 1 0 4k")
    assert {path: oracles.digest(path) for path in before} == before
    assert server.stop() == 0
    assert {path: oracles.digest(path) for path in before} == before


WRITES = (
    # offset, length, pattern: inside a cluster, over a border, single sectors, whole clusters,
    # holes, clusters of lower deltas, the last sector.
    (4096, 4096, 0x11),
    (MIB - 8192, 16384, 0x22),
    (3 * MIB + 512, 512, 0x33),
    (5 * MIB, 2 * MIB, 0x44),
    (17 * MIB + 1536, 70 * 1024, 0x55),
    (25 * MIB, MIB, 0x66),
    (29 * MIB + 65536, 131072, 0x77),
)


def test_writes_read_back_through_qemu(image: ImageCase, serve: Serve, tmp_path: Path) -> None:
    lower = {path: oracles.digest(path) for _, path in image.layers[:-1]}
    size = image.raw.stat().st_size
    writes = [*WRITES, (size - 512, 512, 0x88)]
    server = serve(image.serve)
    qemu_io(str(server.url), *(f"write -P {p} {o} {n}" for o, n, p in writes), "flush")
    with image.raw.open("r+b") as model:
        for offset, length, pattern in writes:
            model.seek(offset)
            model.write(bytes([pattern]) * length)
    qemu_io(str(server.url), *(f"read -P {p} {o} {n}" for o, n, p in writes), read_only=True)
    assert server.stop() == 0, server.stderr
    seen = oracles.read_through_qemu(image.layers, tmp_path / "qemu.raw")
    oracles.assert_same_content(seen, image.raw)
    assert {path: oracles.digest(path) for path in lower} == lower
    assert oracles.bat_problems(image.top) == []
    assert oracles.in_use_word(image.top) == 0
    report = oracles.qemu_check(image.top)
    assert not report.get("leaks"), "preallocated space was not given back"


def test_whole_disk_copy_onto_a_thin_image(serve: Serve, tmp_path: Path) -> None:
    """qemu-img writes a whole disk over iSCSI, and the image then holds it."""
    source = make_content(tmp_path / "source.raw", 48 * MIB, seed=11, density=0.4)
    image = tmp_path / "thin.hds"
    oracles.run("qemu-img", "create", "-q", "-f", "parallels", str(image), "48M")
    server = serve(image)
    oracles.run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), str(server.url))
    assert server.stop() == 0
    oracles.run("qemu-img", "compare", "-f", "raw", "-F", "parallels", str(source), str(image))
    assert oracles.bat_problems(image) == []


def test_many_random_writes_agree_with_a_model(
    simple: ImageCase, serve: Serve, tmp_path: Path
) -> None:
    generator = random.Random(99)
    model = bytearray(simple.raw.read_bytes())
    server = serve(simple.serve)
    commands = []
    for _ in range(400):
        length = 512 * generator.randint(1, 400)
        offset = 512 * generator.randrange((len(model) - length) // 512)
        pattern = generator.randint(1, 255)
        kind = generator.choice(["write", "write", "write", "zero", "discard"])
        model[offset : offset + length] = bytes([pattern if kind == "write" else 0]) * length
        if kind == "write":
            commands.append(f"write -P {pattern} {offset} {length}")
        elif kind == "zero":
            commands.append(f"write -z {offset} {length}")
        else:
            # QEMU drops the unaligned edges of a discard: write-zeroes says what is meant.
            commands.append(f"write -z -u {offset} {length}")
    qemu_io(str(server.url), *commands)
    expected = tmp_path / "model.raw"
    expected.write_bytes(model)
    seen = oracles.read_through_iscsi(str(server.url), tmp_path / "iscsi.raw")
    oracles.assert_same_content(seen, expected)
    assert server.stop() == 0
    seen = oracles.read_through_qemu(simple.layers, tmp_path / "qemu.raw")
    oracles.assert_same_content(seen, expected)
    assert oracles.bat_problems(simple.top) == []


def test_discard_frees_clusters_and_reads_zeros(simple: ImageCase, serve: Serve) -> None:
    server = serve(simple.serve)
    url = str(server.url)
    qemu_io(url, "write -P 9 8M 8M", "flush")
    qemu_io(url, "discard 9M 4M", "read -P 0 9M 4M", "read -P 9 8M 1M", "read -P 9 13M 3M")
    assert server.stop() == 0
    rows = oracles.run("qemu-img", "map", "-f", "parallels", "--output=json", str(simple.top))
    holes = [r for r in json.loads(rows) if not r["data"] and r["start"] <= 9 * MIB]
    assert any(r["start"] + r["length"] >= 13 * MIB for r in holes), "clusters were not freed"
    assert oracles.bat_problems(simple.top) == []


def test_discard_over_lower_data_reads_zeros(tmp_path: Path, serve: Serve) -> None:
    """In a chain an unmapped cluster must not show the lower delta's data again."""
    directory = tmp_path / "chain"
    directory.mkdir()
    case = chain_of_three(directory)
    server = serve(case.serve)
    qemu_io(str(server.url), "discard 20M 10M", "read -P 0 20M 10M", "write -z 40M 3M", "flush")
    assert server.stop() == 0
    with case.raw.open("r+b") as model:
        model.seek(20 * MIB)
        model.write(bytes(10 * MIB))
        model.seek(40 * MIB)
        model.write(bytes(3 * MIB))
    seen = oracles.read_through_qemu(case.layers, tmp_path / "qemu.raw")
    oracles.assert_same_content(seen, case.raw)
