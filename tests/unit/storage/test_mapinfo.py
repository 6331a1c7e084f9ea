"""Info and map of single images and chains, against QEMU's own answers."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from ploopd.errors import (
    CorruptImageError,
    DeniedError,
    DescriptorError,
    ImageFormatError,
    NotFoundError,
    PloopError,
    UnsupportedError,
)
from ploopd.storage.check import check_all
from ploopd.storage.device import Extent, ExtentKind
from ploopd.storage.mapinfo import image_info, image_map
from tests.support import oracles
from tests.support.images import write_delta, write_descriptor
from tests.unit.storage.broken_images import (
    CLUSTER,
    IN_USE,
    SIZE,
    content,
    make,
    set_entry,
    set_word,
)

BASE, MIDDLE = (f"{{00000000-0000-0000-0000-00000000000{n}}}" for n in (1, 2))
TOP = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"


def delta(path: Path, *clusters: int, size: int = SIZE, version: int = 2) -> Path:
    return write_delta(
        path, size, {c: content(c) for c in clusters}, cluster_size=CLUSTER, version=version
    )


def make_chain(directory: Path, *, raw_base: bool = False) -> list[oracles.Layer]:
    if raw_base:
        (directory / "base").write_bytes(content(1) * 40)
        kind, driver = "Plain", "raw"
    else:
        delta(directory / "base", 0, 1, 2, 10, size=SIZE - 8 * CLUSTER)
        kind, driver = "Compressed", "parallels"
    delta(directory / "middle", 2, 3, 20)
    delta(directory / "top", 3, 4, 39)
    images = [(BASE, kind, "base"), (MIDDLE, "Compressed", "middle"), (TOP, "Compressed", "top")]
    write_descriptor(directory, SIZE, images, cluster_size=CLUSTER)
    drivers = (driver, "parallels", "parallels")
    return [(d, directory / n) for d, n in zip(drivers, ("base", "middle", "top"), strict=True)]


def qemu_map(layers: list[oracles.Layer]) -> list[dict[str, Any]]:
    spec = oracles.chain_spec(layers)
    return list(json.loads(oracles.run("qemu-img", "map", "--output=json", spec)))


def per_cluster(extents: list[Extent]) -> list[tuple[int | None, int | None]]:
    """(depth, host offset) of each virtual cluster, None for holes."""
    found: list[tuple[int | None, int | None]] = []
    for one in extents:
        assert one.offset == len(found) * CLUSTER
        for at in range(0, one.length, CLUSTER):
            hole = one.kind is ExtentKind.HOLE
            host = one.host_offset
            found.append((None, None) if hole or host is None else (one.depth, host + at))
    return found


def qemu_per_cluster(layers: list[oracles.Layer]) -> list[tuple[int | None, int | None]]:
    found: list[tuple[int | None, int | None]] = []
    for one in qemu_map(layers):
        assert one["start"] == len(found) * CLUSTER
        for at in range(0, one["length"], CLUSTER):
            found.append((one["depth"], one["offset"] + at) if one["data"] else (None, None))
    return found


@pytest.mark.parametrize("version", [1, 2])
def test_map_of_a_delta_is_qemus(tmp_path: Path, version: int) -> None:
    image = make(tmp_path / "a.hds", version)
    ours = list(image_map(image))
    assert per_cluster(ours) == qemu_per_cluster([("parallels", image)])
    assert {one.path for one in ours if one.kind is ExtentKind.DATA} == {str(image)}


@pytest.mark.parametrize("raw_base", [False, True])
def test_map_of_a_chain_is_qemus(tmp_path: Path, raw_base: bool) -> None:
    layers = make_chain(tmp_path, raw_base=raw_base)
    ours = list(image_map(tmp_path))
    assert per_cluster(ours) == qemu_per_cluster(layers)
    assert ours == list(image_map(tmp_path / "DiskDescriptor.xml"))
    names = {one.depth: one.path for one in ours if one.path is not None}
    assert names == {depth: str(path) for depth, (_, path) in enumerate(reversed(layers))}


def test_neighbours_are_merged(tmp_path: Path) -> None:
    image = write_delta(
        tmp_path / "a.hds",
        SIZE,
        {c: content(c) for c in range(10)},
        cluster_size=CLUSTER,
        order=range(10),
    )
    assert [(one.offset, one.length, one.kind) for one in image_map(image)] == [
        (0, 10 * CLUSTER, ExtentKind.DATA),
        (10 * CLUSTER, 30 * CLUSTER, ExtentKind.HOLE),
    ]


def test_map_ends_where_the_disk_ends(tmp_path: Path) -> None:
    image = delta(tmp_path / "a.hds", 39, size=SIZE - 1024)
    assert sum(one.length for one in image_map(image)) == SIZE - 1024


def test_info_of_a_delta(tmp_path: Path) -> None:
    image = make(tmp_path / "a.hds")
    set_word(image, 44, IN_USE)
    found = image_info(image)
    theirs = json.loads(oracles.run("qemu-img", "info", "-U", "--output=json", str(image)))
    assert found.virtual_size == theirs["virtual-size"]
    assert found.actual_size == theirs["actual-size"]
    [layer] = found.layers
    assert (layer.version, layer.cluster_size, layer.bat_entries) == (2, CLUSTER, 40)
    assert (layer.unclean, layer.state, layer.extension) == (True, "in use", False)
    assert layer.first_block_offset == CLUSTER
    assert found.descriptor is None


def test_info_of_a_chain(tmp_path: Path) -> None:
    make_chain(tmp_path)
    found = image_info(tmp_path)
    assert [(layer.guid, os.path.basename(layer.path)) for layer in found.layers] == [
        (TOP, "top"),
        (MIDDLE, "middle"),
        (BASE, "base"),
    ]
    assert found.layers[2].virtual_size == SIZE - 8 * CLUSTER
    assert found.descriptor == str(tmp_path / "DiskDescriptor.xml")


def test_info_of_a_raw_file(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(4096))
    found = image_info(tmp_path / "disk.raw")
    assert (found.virtual_size, found.layers[0].format, found.layers[0].version) == (4096, "raw", 0)


def test_map_refuses_a_broken_table(tmp_path: Path) -> None:
    image = make(tmp_path / "a.hds")
    set_entry(image, 30, 3)
    with pytest.raises(CorruptImageError) as caught:
        list(image_map(image))
    assert caught.value.field == "BAT[30]"
    assert image_info(image).virtual_size == SIZE


# Descriptors that must not lead anywhere else.


def descriptor_with(directory: Path, name: str) -> Path:
    return write_descriptor(directory, SIZE, [(TOP, "Compressed", name)], cluster_size=CLUSTER)


def looks(path: Path) -> list[Any]:
    """The three offline commands."""
    return [image_info, lambda p: list(image_map(p)), check_all]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("missing.hds", "missing.hds"),
        ("/etc/passwd", "/etc/passwd"),
        ("../outside.hds", "../outside.hds"),
        ("sub/../../outside.hds", "sub/../../outside.hds"),
        ("link.hds", "link.hds"),
        ("link_dir/outside.hds", "link_dir/outside.hds"),
    ],
)
def test_names_that_are_not_opened(tmp_path: Path, name: str, value: str) -> None:
    inside = tmp_path / "vm"
    inside.mkdir()
    (inside / "sub").mkdir()
    make(tmp_path / "outside.hds")
    (inside / "link.hds").symlink_to(tmp_path / "outside.hds")
    (inside / "link_dir").symlink_to(tmp_path)
    descriptor_with(inside, name)
    for look in looks(inside):
        with pytest.raises(DescriptorError) as caught:
            look(inside)
        assert caught.value.value == value
        assert caught.value.field == "File"
        assert "DiskDescriptor.xml" in str(caught.value)


def test_device_nodes_and_pipes_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    descriptor_with(tmp_path, "pipe")
    for look in looks(tmp_path):
        with pytest.raises(DescriptorError) as caught:
            look(tmp_path)
        assert caught.value.value == "FIFO"


def test_a_gibibyte_of_xml_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "DiskDescriptor.xml"
    with path.open("wb") as file:
        file.write(b"<Parallels_disk_image>")
        file.truncate(1 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for look in looks(tmp_path):
        with pytest.raises(DescriptorError) as caught:
            look(path)
        assert caught.value.field == "length"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("<!DOCTYPE x><Parallels_disk_image/>", "DOCTYPE"),
        ("not xml", "line"),
        ("<Parallels_disk_image/>", "Disk_Parameters"),
    ],
)
def test_broken_descriptors(tmp_path: Path, text: str, field: str) -> None:
    (tmp_path / "DiskDescriptor.xml").write_text(text)
    for look in looks(tmp_path):
        with pytest.raises(DescriptorError) as caught:
            look(tmp_path)
        assert caught.value.field == field


def test_chains_that_do_not_fit(tmp_path: Path) -> None:
    make_chain(tmp_path)
    delta(tmp_path / "base", 0, size=SIZE + CLUSTER)
    with pytest.raises(CorruptImageError) as caught:
        image_info(tmp_path)
    assert caught.value.field == "size"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("missing", NotFoundError), ("empty", NotFoundError), ("zero.hds", ImageFormatError)],
)
def test_paths_that_are_no_images(tmp_path: Path, name: str, kind: type[PloopError]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "zero.hds").write_bytes(b"")
    with pytest.raises(kind) as caught:
        image_info(tmp_path / name)
    assert name in str(caught.value)


def test_devices_are_not_images() -> None:
    with pytest.raises(UnsupportedError):
        image_info("/dev/null")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    image = make(tmp_path / "a.hds")
    image.chmod(0)
    with pytest.raises(DeniedError):
        image_info(image)
