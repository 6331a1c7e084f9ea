"""Format extension and dirty bitmaps: bytes, rules, and QEMU as a reader of what we write."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_format import (
    CLOSED_V20,
    CLOSED_V21,
    IN_USE,
    DirtyBitmap,
    FormatError,
    FormatExtension,
    PvdHeader,
    Section,
    dirty_bitmap,
    extension,
    new_header,
)

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 32 * KIB
HEADER = new_header(size=16 * MIB, cluster_size=CLUSTER).replace(
    in_use=CLOSED_V21, ext_offset_sectors=64
)
ID = uuid.UUID("01234567-89ab-cdef-0123-456789abcdef")


def body(*sections: bytes) -> bytes:
    rest = b"".join(sections).ljust(CLUSTER - 24, b"\0")
    digest = hashlib.md5(rest, usedforsecurity=False).digest()
    return struct.pack("<Q", 0xAB234CEF23DCEA87) + digest + rest


def section(magic: int, flags: int, data: bytes) -> bytes:
    head = struct.pack("<QQII", magic, flags, len(data), 0)
    return head + data + bytes(-len(data) % 8)


def bitmap_data(size: int = 32768, granularity: int = 128, l1: tuple[int, ...] = (0,)) -> bytes:
    fixed = struct.pack("<Q16sII", size, ID.bytes, granularity, len(l1))
    return fixed + struct.pack(f"<{len(l1)}Q", *l1)


MAGIC = 0x20385FAE252CB34A


def test_parses_sections_in_order() -> None:
    data = body(section(MAGIC, 0, bitmap_data()), section(7, 2, b"transit"), section(9, 0, b""))
    found = FormatExtension.parse(data, HEADER)
    assert [one.magic for one in found.sections] == [MAGIC, 7, 9]
    assert found.sections[1].data == b"transit"
    assert found.bitmaps == (
        DirtyBitmap(id=ID, size_sectors=32768, granularity_sectors=128, l1=(0,)),
    )
    assert found.pack(CLUSTER) == data


@given(
    st.lists(
        st.builds(
            Section,
            magic=st.integers(1, (1 << 64) - 1).filter(lambda magic: magic != MAGIC),
            flags=st.integers(0, 3),
            data=st.binary(max_size=100),
        ),
        max_size=8,
    )
)
def test_extensions_survive_a_round_trip(sections: list[Section]) -> None:
    written = FormatExtension(sections=tuple(sections), bitmaps=()).pack(CLUSTER)
    assert len(written) == CLUSTER
    assert FormatExtension.parse(written, HEADER).sections == tuple(sections)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (body()[:-1], "length"),
        (b"\0" + body()[1:], "ext_magic"),
        (body()[:30] + b"!" + body()[31:], "md5"),
        (body(struct.pack("<QQII", 5, 0, CLUSTER, 0)), "data_size"),
        (body(section(5, 0, bytes(CLUSTER - 24 - 24 - 16)), struct.pack("<Q", 6)), "section"),
        (body(section(MAGIC, 0, b"short")), "data_size"),
        (body(section(MAGIC, 0, bitmap_data() + bytes(8))), "l1_size"),
        (body(section(MAGIC, 0, bitmap_data(l1=(0, 0)))), "l1_size"),
        (body(section(MAGIC, 0, bitmap_data(granularity=100))), "granularity_sectors"),
        (body(section(MAGIC, 0, bitmap_data(granularity=0))), "granularity_sectors"),
        (body(section(MAGIC, 0, bitmap_data(size=64))), "size_sectors"),
    ],
)
def test_broken_extensions_are_refused(data: bytes, field: str) -> None:
    with pytest.raises(FormatError) as caught:
        FormatExtension.parse(data, HEADER, file="a.hds", offset=32768)
    assert caught.value.field == field
    assert caught.value.offset is not None
    assert caught.value.offset >= 32768


def test_sections_that_do_not_fit_are_refused() -> None:
    large = FormatExtension(sections=(Section(magic=5, flags=0, data=bytes(CLUSTER)),), bitmaps=())
    with pytest.raises(FormatError):
        large.pack(CLUSTER)


def test_rules_for_unknown_sections() -> None:
    sections = tuple(Section(magic=m, flags=f, data=b"") for m, f in ((1, 0), (2, 1), (3, 2)))
    found = FormatExtension(sections=sections, bitmaps=())
    necessary = found.unknown_necessary()
    assert necessary is not None
    assert necessary.magic == 2
    assert [one.magic for one in found.surviving().sections] == [2, 3]
    bitmap = dirty_bitmap.new_bitmap(HEADER, ID)
    known = extension.with_bitmaps([bitmap])
    assert known.unknown_necessary() is None
    assert known.surviving() == known


class Image:
    """A file in memory with an extension at cluster 1 and room for five clusters."""

    def __init__(self, ext: bytes) -> None:
        self.data = bytes(CLUSTER) + ext + bytes(3 * CLUSTER)

    def read_at(self, length: int, offset: int) -> bytes:
        return self.data[offset : offset + length]

    def load(self, header: PvdHeader) -> FormatExtension | None:
        return extension.load(self.read_at, header, len(self.data), file="a.hds")


def test_only_the_closing_word_v21_makes_it_count() -> None:
    image = Image(body(section(MAGIC, 0, bitmap_data())))
    assert image.load(HEADER) is not None
    for word in (CLOSED_V20, IN_USE, 5):
        assert image.load(HEADER.replace(in_use=word)) is None
    assert image.load(HEADER.replace(ext_offset_sectors=0)) is None


@pytest.mark.parametrize("sectors", [1, 32768, 64 * 5, 65, 1 << 60])
def test_extension_outside_the_data_area(sectors: int) -> None:
    with pytest.raises(FormatError) as caught:
        Image(body()).load(HEADER.replace(ext_offset_sectors=sectors))
    assert (caught.value.field, caught.value.value) == ("ext_offset_sectors", sectors)


@pytest.mark.parametrize("entry", [2, 63, 65, 64 * 5, 1 << 63])
def test_bitmap_clusters_outside_the_data_area(entry: int) -> None:
    image = Image(body(section(MAGIC, 0, bitmap_data(l1=(entry,)))))
    with pytest.raises(FormatError) as caught:
        image.load(HEADER)
    assert caught.value.value == entry


def test_clusters_that_belong_to_the_extension() -> None:
    found = Image(body(section(MAGIC, 0, bitmap_data(l1=(128,))))).load(HEADER)
    assert found is not None
    assert found.clusters(HEADER) == (1, 2)
    for entry in (0, 1):
        found = Image(body(section(MAGIC, 0, bitmap_data(l1=(entry,))))).load(HEADER)
        assert found is not None
        assert found.clusters(HEADER) == (1,)


def test_shared_cluster_is_refused() -> None:
    with pytest.raises(FormatError) as caught:
        Image(body(section(MAGIC, 0, bitmap_data(l1=(64,))))).load(HEADER)
    assert caught.value.field == "clusters"


@pytest.mark.functional
def test_qemu_reads_the_bitmap_that_we_write(tmp_path: Path) -> None:
    header = new_header(size=16 * MIB, cluster_size=CLUSTER).replace(
        in_use=CLOSED_V21, ext_offset_sectors=64
    )
    # 256 bits of 64 KiB: the first and the tenth stretch are dirty.
    bitmap = DirtyBitmap(id=ID, size_sectors=32768, granularity_sectors=128, l1=(128,))
    image = tmp_path / "b.hds"
    image.write_bytes(
        header.pack().ljust(CLUSTER, b"\0")
        + extension.with_bitmaps([bitmap]).pack(CLUSTER)
        + b"\x01\x02".ljust(CLUSTER, b"\0")
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [
            "qemu-nbd",
            "-r",
            "-f",
            "parallels",
            "-B",
            str(ID),
            "-b",
            "127.0.0.1",
            "-p",
            str(port),
            "-t",
            str(image),
        ],
        env={**os.environ, "LC_ALL": "C"},
    )
    try:
        options = f"driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={port}"
        command = ["qemu-img", "map", "--output=json", "--image-opts"]
        command += [f"{options},x-dirty-bitmap=qemu:dirty-bitmap:{ID}"]
        deadline = time.monotonic() + 10
        while True:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0 or time.monotonic() > deadline:
                break
            assert server.poll() is None, "qemu-nbd refused the image"
            time.sleep(0.05)
    finally:
        server.terminate()
        server.wait()
    assert done.returncode == 0, done.stderr
    # "present": false is how this driver shows the dirty parts.
    dirty = [(one["start"], one["length"]) for one in json.loads(done.stdout) if not one["present"]]
    assert dirty == [(0, 65536), (9 * 65536, 65536)]
