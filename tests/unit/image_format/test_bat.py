"""BAT entries: units, validation against a slow model, and the speed that large disks need."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_format import FormatError, PvdHeader, bat, new_header

KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40


def small(entries: int, version: int = 2, cluster: int = 32 * KIB) -> PvdHeader:
    return new_header(size=entries * cluster, cluster_size=cluster, version=version)


@pytest.mark.parametrize(("version", "values"), [(2, [0, 1, 7]), (1, [0, 64, 448])])
def test_entries_have_the_versions_unit(version: int, values: list[int]) -> None:
    header = small(3, version)
    raw = np.array(values, dtype="<u4").tobytes()
    assert bat.decode(raw, header).tolist() == [0, 1, 7]
    assert bat.encode(bat.decode(raw, header), header) == raw
    assert bat.encode_entry(header, 7) == raw[8:]
    assert bat.entry_offset(2) == 72


@given(st.sampled_from([1, 2]), st.lists(st.integers(0, 1 << 20), min_size=1, max_size=300))
def test_tables_survive_a_round_trip(version: int, indexes: list[int]) -> None:
    header = small(len(indexes), version)
    raw = bat.encode(np.array(indexes, dtype=np.uint32), header)
    assert bat.decode(raw, header).tolist() == indexes
    assert b"".join(bat.encode_entry(header, i) for i in indexes) == raw


def test_decoded_table_is_independent_and_writable() -> None:
    header = small(4)
    raw = bytearray(16)
    table = bat.decode(raw, header)
    table[1] = 5
    assert raw == bytes(16)


def test_misaligned_version_1_entry_is_named() -> None:
    raw = np.array([64, 65, 66], dtype="<u4").tobytes()
    with pytest.raises(FormatError) as caught:
        bat.decode(raw, small(3, version=1), file="old.hdd")
    assert (caught.value.field, caught.value.value, caught.value.offset) == ("BAT[1]", 65, 68)


def test_cut_table_is_refused() -> None:
    with pytest.raises(FormatError) as caught:
        bat.decode(bytes(8), small(3))
    assert caught.value.field == "bat_entries"
    with pytest.raises(ValueError, match="16 bytes"):
        bat.decode(bytes(16), small(3))


def test_version_1_cannot_name_clusters_beyond_2_tib() -> None:
    header = small(3, version=1)
    assert bat.encode_entry(header, (1 << 32) // 64 - 1)
    with pytest.raises(FormatError):
        bat.encode_entry(header, (1 << 32) // 64)
    with pytest.raises(FormatError):
        bat.encode(np.array([0, (1 << 32) // 64, 1], dtype=np.uint32), header)


def model(indexes: list[int], first: int, file_size: int, cluster: int, reserved: list[int]):
    """What `validate` must find, one entry at a time."""
    in_header, past, cut, duplicate = [], [], [], []
    used = Counter(reserved)
    for virtual, host in enumerate(indexes):
        if host == 0:
            continue
        if host < first:
            in_header.append(virtual)
        elif (host + 1) * cluster > file_size:
            past.append(virtual)
            if host * cluster < file_size:
                cut.append(virtual)
        else:
            if used[host]:
                duplicate.append(virtual)
            used[host] += 1
    whole = file_size // cluster
    leaks = [host for host in range(first, whole) if not used[host]]
    end = max([first, *(host + 1 for host in used)])
    return in_header, past, cut, duplicate, leaks, end


@settings(max_examples=300)
@given(
    st.lists(st.integers(0, 24), min_size=1, max_size=40),
    st.integers(1, 20 * 64),
    st.sets(st.integers(1, 20), max_size=2),
    st.integers(1, 3),
)
def test_validate_agrees_with_the_model(
    indexes: list[int], sectors: int, reserved: set[int], slack: int
) -> None:
    cluster = 32 * KIB
    header = small(len(indexes)).replace(first_block_sectors=64 * slack)
    file_size = max(sectors * 512, slack * cluster)
    taken = sorted(r for r in reserved if slack <= r < file_size // cluster)
    report = bat.validate(np.array(indexes, dtype=np.uint32), header, file_size, reserved=taken)
    in_header, past, cut, duplicate, leaks, end = model(indexes, slack, file_size, cluster, taken)
    assert report.in_header.tolist() == in_header
    assert report.past_eof.tolist() == past
    assert report.cut_off.tolist() == cut
    assert report.duplicate.tolist() == duplicate
    rows = report.leaks.tolist()
    assert [host for first, count in rows for host in range(first, first + count)] == leaks
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(rows))
    assert report.leaked_clusters == len(leaks)
    assert report.end_cluster == end
    assert report.allocated == sum(1 for host in indexes if host)
    assert report.errors == len(in_header) + len(past) + len(duplicate)


def test_validate_does_not_change_the_table() -> None:
    indexes = np.array([3, 2, 1, 1], dtype=np.uint32)
    bat.validate(indexes, small(4), 4 * 32 * KIB)
    assert indexes.tolist() == [3, 2, 1, 1]


def test_a_thin_16_tib_disk_takes_well_under_a_second() -> None:
    header = new_header(size=16 * TIB)
    raw = bytes(header.bat_bytes)
    begin = time.process_time()
    indexes = bat.decode(raw, header)
    report = bat.validate(indexes, header, header.data_offset)
    assert time.process_time() - begin < 0.8
    assert (report.allocated, report.errors, report.leaked_clusters) == (0, 0, 0)
    assert indexes.nbytes == 64 * MIB


def test_a_full_16_tib_disk_with_one_duplicate() -> None:
    header = new_header(size=16 * TIB)
    indexes = np.arange(header.bat_entries, dtype=np.uint32)[::-1] + np.uint32(65)
    indexes = np.ascontiguousarray(indexes)
    lost = int(indexes[5])
    indexes[5] = indexes[9_000_000]
    begin = time.process_time()
    report = bat.validate(indexes, header, header.data_offset + header.size)
    assert time.process_time() - begin < 3
    assert report.duplicate.tolist() == [9_000_000]
    assert report.leaks.tolist() == [[lost, 1]]
