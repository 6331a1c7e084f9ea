"""Opening: what is accepted, what is refused and in which words; refusing writes nothing."""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from image_format import IN_USE
from ploopd.errors import (
    CorruptImageError,
    DeniedError,
    DescriptorError,
    ExitCode,
    ImageFormatError,
    LockedError,
    NotFoundError,
    PloopError,
    UncleanImageError,
    UnsupportedError,
)
from ploopd.fileio.engine import make_engine
from ploopd.fileio.faults import FaultyOs
from ploopd.storage.opener import OpenOptions, open_volume
from ploopd.storage.probe import ImageFormat
from ploopd.storage.volume import Volume
from tests.support import images, oracles
from tests.support.volumes import wait_until_closed

CLUSTER = 64 << 10
CLUSTERS = 6
SIZE = CLUSTER * CLUSTERS


def open_it(path: Path | str, **options: Any) -> Volume:
    return open_volume(path, OpenOptions(**options), make_engine("threads"))


def abandon(volume: Volume) -> None:
    volume.abandon()
    wait_until_closed(volume)


def delta(directory: Path, name: str = "disk.hds", version: int = 2) -> Path:
    clusters = {index: bytes([index + 1]) * CLUSTER for index in (0, 2, 3)}
    return images.write_delta(
        directory / name, SIZE, clusters, cluster_size=CLUSTER, version=version, order=[0, 2, 3]
    )


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def u32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def truncate(size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, size)


def patched(offset: int, data: bytes) -> Callable[[Path], None]:
    return lambda path: patch(path, offset, data)


def unclean_and_broken(path: Path) -> None:
    patch(path, 44, u32(IN_USE))
    patch(path, 64 + 8, u32(1))


BAD_DELTAS: dict[str, tuple[Callable[[Path], None], type[PloopError], str, ExitCode]] = {
    "empty": (truncate(0), ImageFormatError, "magic", ExitCode.FORMAT),
    "cut in the header": (truncate(40), ImageFormatError, "length", ExitCode.FORMAT),
    "cut in the BAT": (truncate(70), ImageFormatError, "bat_entries", ExitCode.FORMAT),
    "cut in the data": (truncate(3 * CLUSTER), CorruptImageError, "BAT[3]", ExitCode.CORRUPT),
    "half a cluster": (
        truncate(3 * CLUSTER + 512),
        CorruptImageError,
        "BAT[3]",
        ExitCode.CORRUPT,
    ),
    "bad magic": (patched(0, b"X"), ImageFormatError, "magic", ExitCode.FORMAT),
    "type": (patched(16, u32(3)), ImageFormatError, "type", ExitCode.FORMAT),
    "zero cluster": (patched(28, u32(0)), ImageFormatError, "cluster_sectors", ExitCode.FORMAT),
    "absurd cluster": (
        patched(28, u32(0x7FFFFFFF)),
        ImageFormatError,
        "cluster_sectors",
        ExitCode.FORMAT,
    ),
    "odd cluster": (patched(28, u32(129)), ImageFormatError, "cluster_sectors", ExitCode.FORMAT),
    "long BAT": (patched(32, u32(1 << 30)), ImageFormatError, "bat_entries", ExitCode.FORMAT),
    "short BAT": (patched(32, u32(5)), ImageFormatError, "bat_entries", ExitCode.FORMAT),
    "no size": (patched(36, u32(0, 0)), ImageFormatError, "size_sectors", ExitCode.FORMAT),
    "first block": (
        patched(48, u32(100)),
        ImageFormatError,
        "first_block_sectors",
        ExitCode.FORMAT,
    ),
    "conversion": (patched(52, u32(2)), ImageFormatError, "flags", ExitCode.FORMAT),
    "past EOF": (patched(64, u32(77)), CorruptImageError, "BAT[0]", ExitCode.CORRUPT),
    "in header": (
        patched(48, u32(256)),
        CorruptImageError,
        "BAT[0]",
        ExitCode.CORRUPT,
    ),
    "duplicate": (patched(64 + 8, u32(1)), CorruptImageError, "BAT[2]", ExitCode.CORRUPT),
    "unclean and broken": (
        unclean_and_broken,
        UncleanImageError,
        "BAT[2]",
        ExitCode.UNCLEAN,
    ),
}


@pytest.mark.parametrize("name", BAD_DELTAS)
def test_bad_delta_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    spoil, error, field, code = BAD_DELTAS[name]
    path = delta(tmp_path)
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(error) as caught:
        open_it(path)
    assert caught.value.path == str(path)
    assert caught.value.field == field
    assert caught.value.value is not None
    assert caught.value.exit_code == code
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_misaligned_v1_entry(tmp_path: Path) -> None:
    path = delta(tmp_path, version=1)
    patch(path, 64, u32(129))
    with pytest.raises(ImageFormatError) as caught:
        open_it(path)
    assert (caught.value.field, caught.value.value) == ("BAT[0]", 129)


def test_errors_say_what_to_type(tmp_path: Path) -> None:
    path = delta(tmp_path)
    patch(path, 44, u32(IN_USE))
    patch(path, 64 + 8, u32(1))
    with pytest.raises(UncleanImageError, match=f"ploopctl image check --repair all {path}"):
        open_it(path)


def test_unclean_image_without_errors_is_served_with_a_note(tmp_path: Path) -> None:
    path = delta(tmp_path)
    patch(path, 44, u32(IN_USE))
    volume = open_it(path)
    abandon(volume)
    assert any("not closed cleanly" in note for note in volume.notes)


@pytest.mark.parametrize("word", [0, IN_USE, 0x312E3276, 0xDEAD])
def test_read_only_never_writes(tmp_path: Path, word: int) -> None:
    path = delta(tmp_path)
    patch(path, 44, u32(word))
    before = path.read_bytes()
    path.chmod(0o400)
    layer = FaultyOs()
    volume = open_volume(path, OpenOptions(read_only=True), make_engine("threads"), layer=layer)
    buffer = memoryview(bytearray(512))
    assert volume.read_only
    assert volume.try_read(CLUSTER, buffer)
    assert bytes(buffer) == bytes(512)
    abandon(volume)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
    assert not {op for op, _ in layer.calls} & {"write", "truncate", "fallocate"}


def test_in_use_is_set_and_the_extension_dropped_at_open(tmp_path: Path) -> None:
    path = delta(tmp_path)
    patch(path, 44, u32(0))
    patch(path, 56, struct.pack("<Q", 2 * CLUSTER // 512))
    volume = open_it(path)
    header = path.read_bytes()[:64]
    assert struct.unpack_from("<I", header, 44)[0] == IN_USE
    assert struct.unpack_from("<Q", header, 56)[0] == 0
    abandon(volume)


def test_cannot_be_opened_twice_nor_by_qemu(tmp_path: Path) -> None:
    path = delta(tmp_path)
    volume = open_it(path)
    before = path.read_bytes()
    with pytest.raises(LockedError) as caught:
        open_it(path)
    assert caught.value.exit_code == ExitCode.BUSY
    with pytest.raises(oracles.OracleError, match="lock"):
        oracles.run("qemu-io", "-f", "parallels", "-c", "read 0 512", str(path), accept=(0,))
    assert path.read_bytes() == before
    abandon(volume)


def test_missing_and_forbidden(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_it(tmp_path / "no.hds")
    with pytest.raises(NotFoundError, match="DiskDescriptor"):
        open_it(tmp_path)
    with pytest.raises(UnsupportedError):
        open_it("/dev/null")
    if os.geteuid():
        path = delta(tmp_path)
        path.chmod(0)
        with pytest.raises(DeniedError):
            open_it(path)


# Raw files and how they are told from deltas.


def test_raw_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(3 * CLUSTER + 512))
    volume = open_it(path)
    assert (volume.format_version, volume.size) == (0, 3 * CLUSTER + 512)
    assert [layer.kind for layer in volume.layers] == ["raw"]
    abandon(volume)


@pytest.mark.parametrize("name", ["root.hds", "root.hdd", "root.hds.{5fbaabe3}", "disk.img"])
def test_a_delta_with_a_damaged_magic_is_not_a_raw_disk(tmp_path: Path, name: str) -> None:
    path = delta(tmp_path, name)
    patch(path, 0, bytes(16))
    with pytest.raises(ImageFormatError) as caught:
        open_it(path)
    assert caught.value.field == "magic"


def test_other_formats_are_named(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    oracles.run("qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M")
    with pytest.raises(ImageFormatError, match="qcow2"):
        open_it(path)


def test_what_a_file_is_can_be_said(tmp_path: Path) -> None:
    path = tmp_path / "raw.hds"
    path.write_bytes(bytes(CLUSTER))
    with pytest.raises(ImageFormatError):
        open_it(path)
    volume = open_it(path, format=ImageFormat.RAW)
    assert volume.size == CLUSTER
    abandon(volume)


def test_raw_file_with_a_ragged_end(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1000))
    with pytest.raises(ImageFormatError) as caught:
        open_it(path)
    assert (caught.value.field, caught.value.value) == ("size", 1000)


# Descriptors.


def descriptor(directory: Path, *files: str, **options: Any) -> Path:
    entries = [(images.guid(n), "Compressed", file) for n, file in enumerate(files)]
    options.setdefault("top_guid", entries[-1][0])
    return images.write_descriptor(directory, SIZE, entries, cluster_size=CLUSTER, **options)


def test_directory_with_a_chain(tmp_path: Path) -> None:
    for name in ("base.hds", "top.hds"):
        delta(tmp_path, name)
    descriptor(tmp_path, "base.hds", "top.hds")
    volume = open_it(tmp_path)
    assert [(layer.level, Path(layer.path).name) for layer in volume.layers] == [
        (0, "top.hds"),
        (1, "base.hds"),
    ]
    assert volume.layers[0].guid == images.guid(1)
    abandon(volume)


def test_an_encrypted_disk_is_served_as_it_is_on_the_disk(tmp_path: Path) -> None:
    case = images.chain_of_three(tmp_path)
    descriptor = case.serve if case.serve.is_file() else case.serve / "DiskDescriptor.xml"
    key = "{4a6bba27-6b63-4ccb-87a9-60a1ff2bd0c4}"
    text = descriptor.read_text().replace(
        "</Disk_Parameters>",
        f"<Encryption><KeyId>{key}</KeyId></Encryption></Disk_Parameters>",
    )
    descriptor.write_text(text)
    volume = open_it(descriptor, read_only=True)
    assert [note for note in volume.notes if key in note]
    abandon(volume)


def test_bad_files_in_descriptors(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    secret = delta(outside)
    (inside / "link.hds").symlink_to(secret)
    os.mkfifo(inside / "fifo.hds")
    for name in ("no.hds", str(secret), "../out/disk.hds", "link.hds", "fifo.hds", ".", "/dev/sda"):
        path = descriptor(inside, name)
        with pytest.raises(DescriptorError) as caught:
            open_it(path)
        assert caught.value.exit_code == ExitCode.DESCRIPTOR
        assert caught.value.path == str(path)
        assert caught.value.field in ("File", "type")


def test_image_root_lets_a_descriptor_reach_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    delta(tmp_path / "b")
    path = descriptor(tmp_path / "a", "../b/disk.hds")
    with pytest.raises(DescriptorError):
        open_it(path)
    with pytest.raises(DescriptorError):
        open_it(path, image_root=tmp_path / "a")
    abandon(open_it(path, image_root=tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        (f"<Disk_size>{SIZE // 512}<", "<Disk_size>999<", "Disk_size"),
        (f"<Blocksize>{CLUSTER // 512}<", "<Blocksize>64<", "Blocksize"),
        (f"<TopGUID>{images.guid(1)}<", f"<TopGUID>{images.guid(9)}<", "TopGUID"),
        (f"<ParentGUID>{images.NO_GUID}<", f"<ParentGUID>{images.guid(1)}<", "ParentGUID"),
        ("Parallels_disk_image Version", "<!DOCTYPE x>", None),
    ],
)
def test_contradictory_descriptor(tmp_path: Path, old: str, new: str, field: str | None) -> None:
    for name in ("base.hds", "top.hds"):
        delta(tmp_path, name)
    path = descriptor(tmp_path, "base.hds", "top.hds")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(DescriptorError) as caught:
        open_it(path)
    assert caught.value.path == str(path)
    if field is not None:
        assert caught.value.field == field


def test_a_gigabyte_of_xml_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "DiskDescriptor.xml"
    path.write_bytes(b"<Parallels_disk_image>")
    os.truncate(path, 1 << 30)
    with pytest.raises(DescriptorError):
        open_it(path)


def test_interrupted_merge_is_refused(tmp_path: Path) -> None:
    for name in ("base.hds", "top.hds"):
        delta(tmp_path, name)
    path = descriptor(tmp_path, "base.hds", "top.hds")
    path.write_text(path.read_text().replace("</Shot>", "<TemporaryZero/></Shot>", 1))
    with pytest.raises(DescriptorError) as caught:
        open_it(path)
    assert caught.value.field == "TemporaryZero"


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda d: delta(d, "base.hds", version=1), "version"),
        (
            lambda d: images.write_delta(d / "base.hds", SIZE, {}, cluster_size=32 << 10),
            "cluster_size",
        ),
        (
            lambda d: images.write_delta(d / "base.hds", SIZE * 2, {}, cluster_size=CLUSTER),
            "size",
        ),
    ],
)
def test_layers_must_fit_together(tmp_path: Path, make: Callable[[Path], Path], field: str) -> None:
    make(tmp_path)
    top = delta(tmp_path, "top.hds")
    before = top.read_bytes()
    with pytest.raises(CorruptImageError) as caught:
        open_it(descriptor(tmp_path, "base.hds", "top.hds"))
    assert caught.value.field == field
    assert caught.value.path == str(tmp_path / "base.hds")
    assert top.read_bytes() == before


def test_a_broken_lower_delta_is_found(tmp_path: Path) -> None:
    base = delta(tmp_path, "base.hds")
    patch(base, 64, u32(99))
    top = delta(tmp_path, "top.hds")
    before = top.read_bytes()
    with pytest.raises(CorruptImageError) as caught:
        open_it(descriptor(tmp_path, "base.hds", "top.hds"))
    assert caught.value.path == str(base)
    assert top.read_bytes() == before


# Identity.


def test_identity_stays_with_the_image(tmp_path: Path) -> None:
    path = delta(tmp_path)
    volume = open_it(path)
    first = volume.identity
    abandon(volume)
    assert uuid.UUID((tmp_path / "disk.hds.uuid").read_text().strip()) == first
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("disk.hds", "disk.hds.uuid"):
        (tmp_path / name).rename(moved / name)
    volume = open_it(moved / "disk.hds", read_only=True)
    assert volume.identity == first
    abandon(volume)
    volume = open_it(delta(tmp_path), read_only=True)
    assert volume.identity != first
    again = open_it(path, read_only=True)
    assert volume.identity == again.identity
    volume.abandon()
    abandon(again)


def test_a_damaged_identity_is_not_replaced(tmp_path: Path) -> None:
    path = delta(tmp_path)
    (tmp_path / "disk.hds.uuid").write_text("nonsense")
    before = path.read_bytes()
    with pytest.raises(ImageFormatError) as caught:
        open_it(path)
    assert caught.value.field == "uuid"
    assert path.read_bytes() == before
