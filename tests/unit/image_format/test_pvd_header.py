"""The 64 bytes of a header: layout, geometry rules and QEMU's opinion."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_format import (
    CLOSED_V21,
    IN_USE,
    CloseState,
    FormatError,
    PvdHeader,
    chs_geometry,
    new_header,
)

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
LAYOUT = struct.Struct("<16sIIIIIQIIIQ")

# The header that QEMU 7.2 writes for `create -f parallels a.hds 64M`.
QEMU_64M = bytes.fromhex(
    "576974686f75467265537061634578740200000010000000000100000008000040000000000002000000000000000000"
    "00080000000000000000000000000000"
)


def header_64m(**changes: int) -> PvdHeader:
    return PvdHeader.parse(QEMU_64M).replace(**changes)


def test_parses_the_header_that_qemu_writes() -> None:
    header = PvdHeader.parse(QEMU_64M)
    assert header == PvdHeader(
        version=2,
        heads=16,
        cylinders=256,
        cluster_sectors=2048,
        bat_entries=64,
        size_sectors=131072,
        in_use=0,
        first_block_sectors=2048,
        flags=0,
        ext_offset_sectors=0,
    )
    assert (header.size, header.cluster_size, header.bat_bytes) == (64 * MIB, MIB, 256)
    assert (header.data_offset, header.header_clusters) == (MIB, 1)
    assert header.pack() == QEMU_64M


def test_version_1_has_entries_in_sectors() -> None:
    header = PvdHeader.parse(b"WithoutFreeSpace" + QEMU_64M[16:])
    assert header.version == 1
    assert header.entry_scale == 2048
    assert PvdHeader.parse(QEMU_64M).entry_scale == 1


u32 = st.integers(0, 0xFFFFFFFF)
u64 = st.integers(0, (1 << 64) - 1)


@given(
    st.sampled_from([b"WithoutFreeSpace", b"WithouFreSpacExt"]),
    st.tuples(u32, u32, st.integers(1, 0xFFFFFFFF), u32, u64, u32, u32, u32, u64),
)
def test_every_header_survives_a_round_trip(magic: bytes, fields: tuple[int, ...]) -> None:
    raw = LAYOUT.pack(magic, 2, *fields)
    assert PvdHeader.parse(raw).pack() == raw


@given(st.binary(max_size=200), st.integers(0, 1 << 45))
def test_garbage_gives_format_errors_only(data: bytes, file_size: int) -> None:
    for start in (b"", b"WithouFreSpacExt\x02\0\0\0", b"WithoutFreeSpace\x02\0\0\0"):
        error = refusal(start + data, file_size)
        assert error is None or (error.file == "x" and error.field)


def refusal(data: bytes, file_size: int) -> FormatError | None:
    try:
        header = PvdHeader.parse(data, file="x")
        header.check_geometry(file_size, "x", writable=bool(file_size & 1))
    except FormatError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("data", "field", "value"),
    [
        (b"", "length", 0),
        (QEMU_64M[:63], "length", 63),
        (b"WithouFreSpacEx\0" + QEMU_64M[16:], "magic", b"WithouFreSpacEx\0"),
        (QEMU_64M[:16] + struct.pack("<I", 3) + QEMU_64M[20:], "type", 3),
        (QEMU_64M[:28] + bytes(4) + QEMU_64M[32:], "cluster_sectors", 0),
    ],
)
def test_parse_refuses(data: bytes, field: str, value: object) -> None:
    with pytest.raises(FormatError) as caught:
        PvdHeader.parse(data, file="a.hds")
    assert (caught.value.field, caught.value.value) == (field, value)
    assert "a.hds" in str(caught.value)
    assert field in str(caught.value)


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"cluster_sectors": 0xFFFFFFFF}, "cluster_sectors"),
        ({"size_sectors": 0}, "size_sectors"),
        ({"size_sectors": 1 << 60}, "size_sectors"),
        ({"bat_entries": 63}, "bat_entries"),
        ({"size_sectors": 131073}, "bat_entries"),
        ({"bat_entries": 1 << 19, "size_sectors": 2048 << 19}, "bat_entries"),
        ({"first_block_sectors": 0}, "first_block_sectors"),
        ({"first_block_sectors": 100}, "first_block_sectors"),
        ({"first_block_sectors": 2048 * 9}, "first_block_sectors"),
        ({"flags": 2}, "flags"),
    ],
)
def test_geometry_refuses_for_reading_and_writing(
    changes: dict[str, int], field: str, writable: bool
) -> None:
    header = header_64m(**changes)
    with pytest.raises(FormatError) as caught:
        header.check_geometry(2 * MIB, "a.hds", writable)
    assert caught.value.field == field
    assert caught.value.value == getattr(header, field)
    assert caught.value.offset is not None
    raw = header.pack()
    width = 8 if field == "size_sectors" else 4
    found = raw[caught.value.offset : caught.value.offset + width]
    assert int.from_bytes(found, "little") == caught.value.value


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"cluster_sectors": 126, "bat_entries": 1041, "first_block_sectors": 126}, None),
        ({"cluster_sectors": 32, "bat_entries": 4096, "first_block_sectors": 64}, None),
        ({"bat_entries": 65}, "bat_entries"),
    ],
)
def test_some_images_can_only_be_read(changes: dict[str, int], field: str | None) -> None:
    header = header_64m(**changes)
    header.check_geometry(2 * MIB, "a.hds", writable=False)
    with pytest.raises(FormatError) as caught:
        header.check_geometry(2 * MIB, "a.hds", writable=True)
    assert caught.value.field == (field or "cluster_sectors")


def test_a_data_area_that_begins_late_is_legal() -> None:
    header_64m(first_block_sectors=4096).check_geometry(2 * MIB, "a.hds", writable=True)


def test_old_version_1_images_need_no_first_block() -> None:
    header = PvdHeader.parse(b"WithoutFreeSpace" + QEMU_64M[16:]).replace(first_block_sectors=0)
    header.check_geometry(MIB, "old.hdd", writable=False)
    assert header.data_offset == 512
    with pytest.raises(FormatError):
        header.check_geometry(MIB, "old.hdd", writable=True)


@pytest.mark.parametrize(
    ("word", "state", "unclean"),
    [
        (0, CloseState.CLOSED, False),
        (CLOSED_V21, CloseState.CLOSED_WITH_EXTENSION, False),
        (IN_USE, CloseState.IN_USE, True),
        (1, CloseState.UNKNOWN, True),
    ],
)
def test_in_use_word(word: int, state: CloseState, unclean: bool) -> None:
    header = header_64m(in_use=word)
    assert header.close_state is state
    assert header.unclean is unclean


def test_in_use_word_is_ynot_in_the_file() -> None:
    assert header_64m(in_use=IN_USE).pack()[44:48] == b"Ynot"
    assert header_64m(in_use=CLOSED_V21).pack()[44:48] == b"v2.1"


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("cluster", [32 * KIB, 64 * KIB, 256 * KIB, MIB, 64 * MIB])
@pytest.mark.parametrize("size", [1, 512, 100 * MIB, GIB + 1, 50 * GIB])
def test_new_headers_are_legal_for_writing(size: int, cluster: int, version: int) -> None:
    header = new_header(size=size, cluster_size=cluster, version=version)
    header.check_geometry(header.data_offset, "new", writable=True)
    assert 0 <= header.size - size < cluster
    assert header.size == header.bat_entries * cluster
    assert header.data_offset - cluster < 64 + header.bat_bytes <= header.data_offset


@pytest.mark.parametrize(
    ("entries", "clusters"), [(8176, 1), (8177, 2), (8176 + 8192, 2), (8177 + 8192, 3)]
)
def test_bat_fills_its_clusters(entries: int, clusters: int) -> None:
    header = new_header(size=entries * 32 * KIB, cluster_size=32 * KIB)
    assert header.header_clusters == clusters


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"size": 0}, "size"),
        ({"size": -1}, "size"),
        ({"size": MIB, "version": 3}, "version"),
        ({"size": MIB, "cluster_size": 0}, "cluster_size"),
        ({"size": MIB, "cluster_size": 3 << 19}, "cluster_size"),
        ({"size": MIB, "cluster_size": 16 * KIB}, "cluster_size"),
        ({"size": MIB, "cluster_size": 128 * MIB}, "cluster_size"),
        ({"size": 2 * TIB, "version": 1}, "size"),
        ({"size": 8 * TIB, "cluster_size": 32 * KIB}, "size"),
    ],
)
def test_new_header_refuses(arguments: dict[str, int], field: str) -> None:
    with pytest.raises(FormatError) as caught:
        new_header(**arguments)
    assert caught.value.field == field


def test_largest_disks() -> None:
    assert new_header(size=2 * TIB - MIB, version=1).size == 2 * TIB - MIB
    assert new_header(size=16 * TIB).bat_entries == 1 << 24


def test_geometry_is_libploops() -> None:
    # `ploop grow -s 4G` of Debian's ploop 1.15 writes 8322 cylinders and 16 heads.
    assert chs_geometry(4 * GIB // 512) == (8322, 16, 63)
    cylinders, heads, sectors = chs_geometry(10 * GIB // 512)
    assert cylinders * heads * sectors == 10 * GIB // 512


@pytest.mark.parametrize("cluster", [64 * KIB, MIB])
def test_same_fields_as_qemu(tmp_path: Path, cluster: int) -> None:
    image = tmp_path / "q.hds"
    subprocess.run(
        [
            "qemu-img",
            "create",
            "-q",
            "-f",
            "parallels",
            "-o",
            f"cluster_size={cluster}",
            str(image),
            "2G",
        ],
        check=True,
    )
    theirs = PvdHeader.parse(image.read_bytes()[:64])
    ours = new_header(size=2 * GIB, cluster_size=cluster)
    assert ours.replace(heads=theirs.heads, cylinders=theirs.cylinders) == theirs
    assert ours.data_offset == image.stat().st_size
