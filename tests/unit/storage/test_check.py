"""What the check finds, what it says, and that looking changes nothing."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from image_format import CLOSED_V21, DirtyBitmap, extension
from ploopd.errors import (
    DescriptorError,
    ImageFormatError,
    LockedError,
    NotFoundError,
    StorageError,
    UnsupportedError,
)
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.storage.check import check_all, check_image
from tests.support.images import write_descriptor
from tests.unit.storage.broken_images import (
    CLUSTER,
    IN_USE,
    SECTORS,
    SIZE,
    append,
    make,
    patch,
    set_entry,
    set_word,
    truncate,
)

Break = Callable[[Path], object]


@pytest.fixture(params=[1, 2])
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def image(tmp_path: Path, version: int) -> Path:
    return make(tmp_path / "a.hds", version)


def kinds(report: object) -> list[str]:
    return [one.kind for one in report.details]  # type: ignore[attr-defined]


def test_a_sound_image(image: Path) -> None:
    report = check_image(image)
    assert report.as_dict() == {
        "filename": str(image),
        "format": "parallels",
        "image-end-offset": 6 * CLUSTER,
        "total-clusters": 40,
        "allocated-clusters": 5,
        "fragmented-clusters": 2,  # places by virtual cluster: 2 3 1 4 5
        "corruptions": 0,
        "leaks": 0,
        "corruptions-fixed": 0,
        "leaks-fixed": 0,
        "check-errors": 0,
        "details": [],
    }


UNIT = {1: SECTORS, 2: 1}

CORRUPTIONS: list[tuple[str, Callable[[Path, int], object], str, str | None, int]] = [
    ("in use", lambda p, u: set_word(p, 44, IN_USE), "unclean", "in_use", 1),
    ("bad in-use word", lambda p, u: set_word(p, 44, 1), "unclean", "in_use", 1),
    ("past EOF", lambda p, u: set_entry(p, 5, 6 * u), "past-eof", "BAT[5]", 1),
    ("far past EOF", lambda p, u: set_entry(p, 5, 0xFFFFFF * u), "past-eof", "BAT[5]", 1),
    ("cut off", lambda p, u: truncate(p, 6 * CLUSTER - 512), "cut-off", "BAT[39]", 1),
    ("duplicate", lambda p, u: set_entry(p, 30, 3 * u), "duplicate", "BAT[30]", 1),
    ("beyond the disk", lambda p, u: set_entry(p, 41, 1), "beyond-disk", "slots", 1),
]


@pytest.mark.parametrize(
    ("damage", "kind", "field", "count"),
    [case[1:] for case in CORRUPTIONS],
    ids=[case[0] for case in CORRUPTIONS],
)
def test_corruption_is_found_and_nothing_is_written(
    image: Path,
    version: int,
    damage: Callable[[Path, int], object],
    kind: str,
    field: str,
    count: int,
) -> None:
    damage(image, UNIT[version])
    before = hashlib.sha256(image.read_bytes()).digest()
    stamp = image.stat().st_mtime_ns
    report = check_image(image)
    assert (report.corruptions, report.leaks) == (count, 0)
    assert [(one.kind, one.field) for one in report.details] == [(kind, field)]
    assert hashlib.sha256(image.read_bytes()).digest() == before
    assert image.stat().st_mtime_ns == stamp


def test_entries_inside_the_header(tmp_path: Path) -> None:
    # With one header cluster there is no such entry but 0; the data area may begin later.
    image = make(tmp_path / "a.hds")
    set_word(image, 48, 2 * SECTORS)
    report = check_image(image)
    assert kinds(report) == ["in-header"]
    assert report.details[0].field == "BAT[7]"
    assert report.details[0].value == 1


def test_misaligned_entries_of_version_1(tmp_path: Path) -> None:
    image = make(tmp_path / "a.hds", version=1)
    set_entry(image, 5, 2 * SECTORS + 1)
    append(image, CLUSTER)
    report = check_image(image)
    assert (report.corruptions, report.leaks) == (1, 0)
    assert kinds(report) == ["misaligned", "no-repair", "leaks-unknown"]


def test_many_findings_are_a_number(tmp_path: Path) -> None:
    image = make(tmp_path / "a.hds")
    for cluster in range(40):
        set_entry(image, cluster, 1000 + cluster)
    report = check_image(image)
    assert report.corruptions == 40
    assert len(report.details) == 16 + 1 + 1
    assert sum(one.count for one in report.details if one.kind == "past-eof") == 40


@pytest.mark.parametrize(
    ("damage", "leaks", "end"),
    [
        (lambda p: append(p, 3 * CLUSTER), 3, 6),
        (lambda p: append(p, 512), 1, 6),
        (lambda p: truncate(p, 100 * CLUSTER), 94, 6),
        (lambda p: [set_entry(p, 39, 0)], 1, 5),
        (lambda p: [set_entry(p, 0, 0), set_entry(p, 3, 0)], 2, 6),
    ],
    ids=["tail", "ragged tail", "sparse tail", "last", "inside"],
)
def test_leaks(tmp_path: Path, damage: Break, leaks: int, end: int) -> None:
    image = make(tmp_path / "a.hds")
    damage(image)
    report = check_image(image)
    assert (report.corruptions, report.leaks) == (0, leaks)
    assert report.image_end_offset == end * CLUSTER
    assert sum(one.count for one in report.details) == leaks


def test_punched_clusters_are_no_leaks(tmp_path: Path) -> None:
    image = make(tmp_path / "a.hds")
    set_entry(image, 0, 0)
    subprocess.run(
        ["fallocate", "--punch-hole", "-o", str(2 * CLUSTER), "-l", str(CLUSTER), str(image)],
        check=True,
    )
    assert check_image(image).leaks == 0


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (lambda p: truncate(p, 63), "length"),
        (lambda p: truncate(p, 0), None),
        (lambda p: patch(p, 0, b"X"), "magic"),
        (lambda p: set_word(p, 16, 3), "type"),
        (lambda p: set_word(p, 28, 0), "cluster_sectors"),
        (lambda p: set_word(p, 28, 0xFFFFFFFF), "cluster_sectors"),
        (lambda p: set_word(p, 32, 39), "bat_entries"),
        (lambda p: truncate(p, 200), "bat_entries"),
        (lambda p: set_word(p, 36, SIZE // 512 + 1), "bat_entries"),
        (lambda p: set_word(p, 48, 100), "first_block_sectors"),
        (lambda p: set_word(p, 48, 100 * SECTORS), "first_block_sectors"),
        (lambda p: set_word(p, 52, 2), "flags"),
    ],
)
@pytest.mark.parametrize("repair", [None, "leaks", "all"])
def test_headers_that_cannot_be_used(
    tmp_path: Path, damage: Break, field: str, repair: object
) -> None:
    image = make(tmp_path / "a.hds")
    damage(image)
    before = image.read_bytes()
    with pytest.raises(ImageFormatError) as caught:
        check_image(image, repair=repair)  # type: ignore[arg-type]
    if field is not None:
        assert caught.value.field == field
    assert str(image) in str(caught.value)
    assert image.read_bytes() == before


def test_what_is_not_a_delta(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(CLUSTER))
    with pytest.raises(UnsupportedError):
        check_image(raw)
    with pytest.raises(NotFoundError):
        check_image(tmp_path / "missing")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UnsupportedError):
        check_image(tmp_path / "fifo")
    with pytest.raises(UnsupportedError):
        check_image("/dev/null")


def add_extension(image: Path, sections: extension.FormatExtension, *, word: int) -> None:
    """Put an extension into cluster 6 and one cluster of bits into 7."""
    append(image, 2 * CLUSTER, b"\1")
    patch(image, 6 * CLUSTER, sections.pack(CLUSTER))
    set_word(image, 44, word)
    patch(image, 56, struct.pack("<Q", 6 * SECTORS))


def bitmap_at_7() -> extension.FormatExtension:
    import uuid

    bitmap = DirtyBitmap(
        id=uuid.UUID(int=5),
        size_sectors=SIZE // 512,
        granularity_sectors=128,
        l1=(7 * SECTORS,),
    )
    return extension.with_bitmaps([bitmap])


def test_a_valid_extension_is_in_use_and_stays(tmp_path: Path) -> None:
    image = make(tmp_path / "a.hds")
    add_extension(image, bitmap_at_7(), word=CLOSED_V21)
    append(image, CLUSTER)
    report = check_image(image)
    assert (report.corruptions, report.leaks, kinds(report)) == (0, 1, ["tail"])
    before = image.read_bytes()
    for repair in ("leaks", "all"):
        repaired = check_image(image, repair=repair)  # type: ignore[arg-type]
        assert (repaired.corruptions, repaired.leaks) == (0, 0)
    assert image.read_bytes() == before[: 8 * CLUSTER]


def test_an_entry_that_names_the_extension_is_a_duplicate(tmp_path: Path) -> None:
    image = make(tmp_path / "a.hds")
    add_extension(image, bitmap_at_7(), word=CLOSED_V21)
    set_entry(image, 2, 7)
    report = check_image(image)
    assert [(one.kind, one.field) for one in report.details] == [("duplicate", "BAT[2]")]
    assert check_image(image, repair="all").corruptions == 0


def test_an_outdated_extension_is_dropped_with_its_clusters(tmp_path: Path) -> None:
    image = make(tmp_path / "a.hds")
    add_extension(image, bitmap_at_7(), word=0)
    report = check_image(image)
    assert (report.corruptions, report.leaks) == (0, 2)
    assert kinds(report) == ["tail", "stale-extension"]
    assert check_image(image, repair="leaks").leaks == 0
    data = image.read_bytes()
    assert len(data) == 6 * CLUSTER
    assert data[56:64] == bytes(8)


def test_a_broken_extension(tmp_path: Path) -> None:
    image = make(tmp_path / "a.hds")
    add_extension(image, bitmap_at_7(), word=CLOSED_V21)
    patch(image, 6 * CLUSTER + 100, b"?")
    before = image.read_bytes()
    report = check_image(image)
    assert (report.corruptions, report.leaks) == (1, 0)
    assert (report.details[0].kind, report.details[0].field) == ("extension", "md5")
    # Its clusters cannot be told from leaks, so giving back leaks must not touch them.
    check_image(image, repair="leaks")
    assert image.read_bytes() == before
    repaired = check_image(image, repair="all")
    assert (repaired.corruptions, repaired.leaks, repaired.corruptions_fixed) == (0, 0, 1)
    assert image.read_bytes()[44:48] == bytes(4)


def test_a_necessary_section_forbids_repairs(tmp_path: Path) -> None:
    image = make(tmp_path / "a.hds")
    section = extension.Section(magic=5, flags=extension.FLAG_NECESSARY, data=b"")
    add_extension(
        image, extension.FormatExtension(sections=(section,), bitmaps=()), word=CLOSED_V21
    )
    before = image.read_bytes()
    assert check_image(image).corruptions == 0
    for repair in ("leaks", "all"):
        with pytest.raises(UnsupportedError):
            check_image(image, repair=repair)  # type: ignore[arg-type]
    assert image.read_bytes() == before


def test_an_image_that_qemu_writes_to_is_locked(tmp_path: Path) -> None:
    image = make(tmp_path / "a.hds")
    with subprocess.Popen(
        ["qemu-io", "-f", "parallels", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write(b"write 0 4k\n")
        writer.stdin.flush()
        while b"wrote" not in writer.stdout.readline():
            pass
        for repair in (None, "all"):
            with pytest.raises(LockedError):
                check_image(image, repair=repair)  # type: ignore[arg-type]
        writer.stdin.close()


def test_a_read_error_is_not_a_verdict(tmp_path: Path) -> None:
    image = make(tmp_path / "a.hds")
    layer = FaultyOs(Fault(op="read", nth=3, error=5))
    with pytest.raises(StorageError):
        check_image(image, layer=layer)


def test_a_descriptor_means_all_its_deltas(tmp_path: Path) -> None:
    make(tmp_path / "base.hds")
    make(tmp_path / "top.hds")
    append(tmp_path / "base.hds", CLUSTER)
    names = [
        ("{00000000-0000-0000-0000-000000000001}", "Compressed", "base.hds"),
        ("{5fbaabe3-6958-40ff-92a7-860e329aab41}", "Compressed", "top.hds"),
    ]
    write_descriptor(tmp_path, SIZE, names, cluster_size=CLUSTER)
    reports = check_all(tmp_path)
    assert [os.path.basename(one.filename) for one in reports] == ["base.hds", "top.hds"]
    assert [one.leaks for one in reports] == [1, 0]
    (tmp_path / "base.hds").unlink()
    with pytest.raises(DescriptorError):
        check_all(tmp_path)
