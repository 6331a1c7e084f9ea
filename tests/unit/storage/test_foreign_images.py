"""Images that Debian's libploop has worked on: read, checked and mapped as QEMU does it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from image_format import PvdHeader, chain, parse_descriptor
from ploopd.storage.check import check_image
from ploopd.storage.create import create_image
from ploopd.storage.mapinfo import image_info
from tests.support import oracles
from tests.unit.storage.test_mapinfo import CLUSTER, image_map, per_cluster, qemu_per_cluster

MIB, GIB = 1 << 20, 1 << 30


@pytest.fixture(autouse=True)
def locks() -> None:
    oracles.require_libploop_locks()


def written(directory: Path, name: str, version: int, *commands: str) -> Path:
    """A new delta of 512 MiB, written to by QEMU, without holes (libploop refuses them)."""
    made = Path(create_image(directory / f"{name}.tmp", 512 * MIB, CLUSTER, version).path)
    oracles.qemu_io(str(made), *commands, driver="parallels")
    subprocess.run(["cp", "--sparse=never", str(made), str(directory / name)], check=True)
    return directory / name


@pytest.mark.parametrize("version", [1, 2])
def test_a_grown_image(tmp_path: Path, version: int) -> None:
    """Its BAT takes clusters that held data, which libploop moves."""
    image = written(tmp_path, "a.hds", version, "write -P 3 0 400k", "write -P 4 100M 300k")
    oracles.run(oracles.PLOOP, "grow", "-s", "4G", str(image))
    report = check_image(image)
    assert (report.corruptions, report.leaks, report.details) == (0, 0, ())
    header = PvdHeader.parse(image.read_bytes()[:64])
    header.check_geometry(image.stat().st_size, writable=True)
    assert (header.version, header.size) == (version, 4 * GIB)
    assert per_cluster(list(image_map(image))) == qemu_per_cluster([("parallels", image)])


@pytest.mark.parametrize("version", [1, 2])
def test_merged_images(tmp_path: Path, version: int) -> None:
    base = written(tmp_path, "base", version, "write -P 3 0 400k")
    top = written(tmp_path, "top", version, "write -P 9 64k 128k", "write -P 8 200M 64k")
    oracles.run(oracles.PLOOP, "merge", str(top), str(base))
    report = check_image(base)
    assert (report.corruptions, report.leaks) == (0, 0)
    assert per_cluster(list(image_map(base))) == qemu_per_cluster([("parallels", base)])
    oracles.qemu_io(str(base), "read -P 9 64k 128k", "read -P 8 200M 64k", driver="parallels")


def test_snapshots_of_a_version_1_image(tmp_path: Path) -> None:
    made = create_image(f"{tmp_path}/vm/", 512 * MIB, CLUSTER, 1, descriptor=True)
    assert made.descriptor is not None
    for _ in range(2):
        oracles.run(oracles.PLOOP, "snapshot", made.descriptor)
    found = parse_descriptor(Path(made.descriptor).read_bytes())
    assert len(chain(found)) == 3
    layers = image_info(made.descriptor).layers
    assert [layer.guid for layer in reversed(layers)] == [one.guid for one in chain(found)]
    # Our writing of their document is a document for them.
    Path(made.descriptor).write_bytes(found.to_xml())
    listed = oracles.run(oracles.PLOOP, "snapshot-list", "-H", "-o", "uuid", made.descriptor)
    assert sorted(listed.split()) == sorted(shot.guid for shot in found.shots)


def test_a_converted_image(tmp_path: Path) -> None:
    made = create_image(f"{tmp_path}/vm/", 64 * MIB, CLUSTER, 2, descriptor=True)
    assert made.descriptor is not None
    oracles.qemu_io(made.path, "write -P 7 1M 300k", driver="parallels")
    subprocess.run(["cp", "--sparse=never", made.path, f"{tmp_path}/full"], check=True)
    Path(made.path).write_bytes((tmp_path / "full").read_bytes())
    oracles.run(oracles.PLOOP, "convert", "-v", "1", made.descriptor)
    [layer] = image_info(made.descriptor).layers
    assert layer.version == 1
    assert check_image(made.path).details == ()
    found = per_cluster(list(image_map(made.path)))
    assert found == qemu_per_cluster([("parallels", Path(made.path))])
